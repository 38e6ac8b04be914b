using System.Diagnostics;
using System.Runtime.ExceptionServices;
using System.Runtime.InteropServices;

namespace Rollout.Kernels;

/// <summary>Work made of independent units. Created once and reused, so that a step allocates nothing.</summary>
internal abstract class Job
{
    /// <summary>Does one unit. Worker 0 is the thread that called <see cref="Workers.Run"/>.</summary>
    public abstract void Execute(int unit, int worker);
}

/// <summary>
/// Persistent threads that share the units of one job at a time. Each starts with a contiguous range of units of its own and takes them one
/// by one: the next unit's data mostly follow this one's in memory, where prefetching finds them. A thread that has none left takes the
/// last unit of another's range, so the threads finish together even when another process takes time from one of them, and nothing waits
/// for a thread that has not woken up in time.
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
    private readonly Padded[] _ranges; // of each worker: first unit not taken << 32 | one past the last
    private Padded _state;
    private Job? _job;
    private int _sleeping;
    private volatile bool _stop;
    private Exception? _error;

    public Workers(int count)
    {
        Count = count;
        _ranges = new Padded[count];
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
        for (int worker = 0; worker < Count; worker++)
            _ranges[worker].Value = ((long)units * worker / Count << 32) | ((long)units * (worker + 1) / Count);
        long generation = (_state.Value >> 32) + 1;
        Interlocked.Exchange(ref _state.Value, (generation << 32) | Open);
        if (Volatile.Read(ref _sleeping) > 0)
        {
            lock (_gate)
                Monitor.PulseAll(_gate);
        }

        TakeUnits(job, 0);
        Interlocked.And(ref _state.Value, ~Open);
        for (int spins = 0; (Volatile.Read(ref _state.Value) & Inside) != 0; spins++)
        {
            // A thread that was descheduled may need this core to finish.
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
            while (TryTakeFirst(ref _ranges[worker].Value, out int unit))
                job.Execute(unit, worker);
            for (int other = 1; other < Count; other++)
            {
                while (TryTakeLast(ref _ranges[(worker + other) % Count].Value, out int unit))
                    job.Execute(unit, worker);
            }
        }
        catch (Exception error)
        {
            Interlocked.CompareExchange(ref _error, error, null);
            foreach (ref Padded range in _ranges.AsSpan())
                Interlocked.Exchange(ref range.Value, 0);
        }
    }

    private static bool TryTakeFirst(ref long range, out int unit)
    {
        long seen = Volatile.Read(ref range);
        while ((int)(seen >> 32) < (int)seen)
        {
            long was = Interlocked.CompareExchange(ref range, seen + (1L << 32), seen);
            if (was == seen)
            {
                unit = (int)(seen >> 32);
                return true;
            }

            seen = was;
        }

        unit = -1;
        return false;
    }

    private static bool TryTakeLast(ref long range, out int unit)
    {
        long seen = Volatile.Read(ref range);
        while ((int)(seen >> 32) < (int)seen)
        {
            long was = Interlocked.CompareExchange(ref range, seen - 1, seen);
            if (was == seen)
            {
                unit = (int)seen - 1;
                return true;
            }

            seen = was;
        }

        unit = -1;
        return false;
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
            if (Interlocked.CompareExchange(ref _state.Value, state + 1, state) != state)
                continue;
            done = state >> 32;
            TakeUnits(_job!, worker);
            Interlocked.Decrement(ref _state.Value);
        }
    }

    private long WaitForJob(long done)
    {
        long start = Stopwatch.GetTimestamp();
        while (!_stop)
        {
            for (int i = 0; i < 50; i++)
            {
                long state = Volatile.Read(ref _state.Value);
                if (IsNew(state, done))
                    return state;
                Thread.SpinWait(1);
            }

            if (Stopwatch.GetTimestamp() - start < s_spinTicks)
                continue;

            lock (_gate)
            {
                // Announced before the last check: either Run sees a sleeper or this thread sees the job.
                Interlocked.Increment(ref _sleeping);
                while (!_stop && !IsNew(Volatile.Read(ref _state.Value), done))
                    Monitor.Wait(_gate);
                _sleeping--;
            }

            start = Stopwatch.GetTimestamp();
        }

        return 0;
    }

    private static bool IsNew(long state, long done) => (state & Open) != 0 && state >> 32 != done;

    /// <summary>A word that several threads write, padded to two cache lines.</summary>
    [StructLayout(LayoutKind.Explicit, Size = 256)]
    private struct Padded
    {
        [FieldOffset(128)]
        public long Value;
    }
}
