using System.Collections.Concurrent;
using System.Runtime.ExceptionServices;

namespace Rollout.Engine;

/// <summary>
/// Runs work on all cores, on its own threads, so that the thread pool stays free to answer status calls meanwhile. The threads are
/// started once, because a trainer updates thousands of times.
/// </summary>
internal static class AllCores
{
    private static readonly Lazy<BlockingCollection<Action>> s_work = new(StartThreads);

    /// <summary>Runs the body for every item, starting with the first. Throws the first error after all threads have finished.</summary>
    public static void ForEach<T>(IReadOnlyList<T> items, Action<T> body)
    {
        int threads = Math.Min(Environment.ProcessorCount, items.Count);
        int next = -1;
        ExceptionDispatchInfo? error = null;
        using CountdownEvent left = new(Math.Max(1, threads));
        if (threads <= 1) Work(); // one item is not worth a thread switch
        else
            for (int t = 0; t < threads; t++) s_work.Value.Add(Work);
        left.Wait();
        error?.Throw();

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

            left.Signal();
        }
    }

    private static BlockingCollection<Action> StartThreads()
    {
        BlockingCollection<Action> work = [];
        for (int t = 0; t < Environment.ProcessorCount; t++)
        {
            new Thread(() =>
            {
                foreach (Action action in work.GetConsumingEnumerable()) action();
            })
            {
                Name = "rollout weights",
                IsBackground = true,
            }.Start();
        }

        return work;
    }
}
