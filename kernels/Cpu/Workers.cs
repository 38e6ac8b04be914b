using System.Diagnostics;
using System.Runtime.ExceptionServices;
using System.Runtime.InteropServices;

namespace Rollout.Kernels;

/// <summary>Work that falls into independent units. Made once and used again, so that a step allocates nothing.</summary>
internal abstract class Job
{
    /// <summary>Does one unit. Worker 0 is the thread that called <see cref="Workers.Run"/>.</summary>
    public abstract void Execute(int unit, int worker);
}

/// <summary>
/// Persistent threads that share out the units of one job at a time. Units are taken one by one, so the threads finish together even when
/// another process steals time from one of them; a thread that has not woken up in time is not waited for.
/// </summary>
internal sealed class Workers : IDisposable
{
    // _state: generation << 32 | Open | number of threads inside the job.
    private const long Open = 1L << 31;
    private const long Inside = Open - 1;

    /// <summary>The gaps between the operations of a step are shorter than this, the gaps between steps may be.</summary>
    private static readonly long s_spinTicks = Stopwatch.Frequency / 10_000;

    private readonly Thread[] _threads;
    private readonly object _gate = new();
    private Shared _shared;
    private Job? _job;
    private int _units;
    private int _sleeping;
    private volatile bool _stop;
    private Exception? _error;

    public Workers(int count)
    {
        Count = count;
        _threads = new Thread[count - 1];
        for (int i = 0; i < _threads.Length; i++)
        {
            int worker = i + 1;
            _threads[i] = new Thread(() => Loop(worker)) { IsBackground = true, Name = $"rollout cpu {worker}" };
            _threads[i].Start();
        }
    }

    /// <summary>Threads, the caller included.</summary>
    public int Count { get; }

    /// <summary>Runs units 0 .. units - 1 and returns when all are done. The first exception of any thread is rethrown here.</summary>
    public void Run(Job job, int units, bool parallel = true)
    {
        if (!parallel || Count == 1 || units <= 1)
        {
            for (int unit = 0; unit < units; unit++)
                job.Execute(unit, 0);
            return;
        }

        _job = job;
        _units = units;
        _shared.Next = 0;
        long generation = (_shared.State >> 32) + 1;
        Interlocked.Exchange(ref _shared.State, (generation << 32) | Open);
        if (Volatile.Read(ref _sleeping) > 0)
        {
            lock (_gate)
                Monitor.PulseAll(_gate);
        }

        TakeUnits(job, 0);
        Interlocked.And(ref _shared.State, ~Open);
        for (int spins = 0; (Volatile.Read(ref _shared.State) & Inside) != 0; spins++)
        {
            // A thread that lost its core needs ours to finish.
            if (spins < 2000)
                Thread.SpinWait(1);
            else
                Thread.Yield();
        }

        if (_error is { } error)
        {
            _error = null;
            ExceptionDispatchInfo.Throw(error);
        }
    }

    public void Dispose()
    {
        _stop = true;
        lock (_gate)
            Monitor.PulseAll(_gate);
        foreach (Thread thread in _threads)
            thread.Join();
    }

    private void TakeUnits(Job job, int worker)
    {
        try
        {
            int units = _units;
            int unit;
            while ((unit = Interlocked.Increment(ref _shared.Next) - 1) < units)
                job.Execute(unit, worker);
        }
        catch (Exception error)
        {
            Interlocked.CompareExchange(ref _error, error, null);
            Volatile.Write(ref _shared.Next, int.MaxValue / 2);
        }
    }

    private void Loop(int worker)
    {
        long done = 0;
        while (true)
        {
            long state = WaitForJob(done);
            if (_stop)
                return;

            // Entering is a compare-and-swap against the state that was seen: a job that has closed meanwhile cannot be entered.
            if (Interlocked.CompareExchange(ref _shared.State, state + 1, state) != state)
                continue;
            done = state >> 32;
            TakeUnits(_job!, worker);
            Interlocked.Decrement(ref _shared.State);
        }
    }

    private long WaitForJob(long done)
    {
        long start = Stopwatch.GetTimestamp();
        while (!_stop)
        {
            for (int i = 0; i < 50; i++)
            {
                long state = Volatile.Read(ref _shared.State);
                if (IsNew(state, done))
                    return state;
                Thread.SpinWait(1);
            }

            if (Stopwatch.GetTimestamp() - start < s_spinTicks)
                continue;

            lock (_gate)
            {
                // Announced before the last look: either Run sees a sleeper or this thread sees the job.
                Interlocked.Increment(ref _sleeping);
                while (!_stop && !IsNew(Volatile.Read(ref _shared.State), done))
                    Monitor.Wait(_gate);
                _sleeping--;
            }

            start = Stopwatch.GetTimestamp();
        }

        return 0;
    }

    private static bool IsNew(long state, long done) => (state & Open) != 0 && state >> 32 != done;

    /// <summary>The two words that all threads write, a cache line pair apart.</summary>
    [StructLayout(LayoutKind.Explicit, Size = 384)]
    private struct Shared
    {
        [FieldOffset(128)]
        public long State;

        [FieldOffset(256)]
        public int Next;
    }
}
