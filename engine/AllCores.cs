using System.Runtime.ExceptionServices;

namespace Rollout.Engine;

/// <summary>
/// Work on all cores, on threads of its own: the thread pool must stay free for whoever asks how things are going meanwhile.
/// </summary>
internal static class AllCores
{
    /// <summary>Runs the body for every item, the first items first. Throws the first error after all threads have ended.</summary>
    public static void ForEach<T>(IReadOnlyList<T> items, Action<T> body)
    {
        int next = -1;
        ExceptionDispatchInfo? error = null;
        void Work()
        {
            try
            {
                for (int i; error is null && (i = Interlocked.Increment(ref next)) < items.Count;) body(items[i]);
            }
            catch (Exception e)
            {
                Interlocked.CompareExchange(ref error, ExceptionDispatchInfo.Capture(e), null);
            }
        }

        Thread[] threads = new Thread[Math.Min(Environment.ProcessorCount, items.Count)];
        for (int t = 0; t < threads.Length; t++)
        {
            threads[t] = new Thread(Work) { Name = "rollout weights", IsBackground = true };
            threads[t].Start();
        }

        foreach (Thread thread in threads) thread.Join();
        error?.Throw();
    }
}
