using System.Threading.Tasks.Sources;

namespace Rollout.Engine;

/// <summary>
/// An auto-reset event with one awaiting reader, which allocates nothing when set: the reader's continuation runs on the thread pool,
/// never on the setter's thread (the engine's loop).
/// </summary>
internal sealed class Signal : IValueTaskSource, IThreadPoolWorkItem
{
    private const int Idle = 0;
    private const int Set = 1;
    private const int Waiting = 2;

    private ManualResetValueTaskSourceCore<bool> _core;
    private int _state;

    public void Raise()
    {
        while (true)
        {
            int state = Volatile.Read(ref _state);
            if (state == Set) return;
            int next = state == Idle ? Set : Idle;
            if (Interlocked.CompareExchange(ref _state, next, state) != state) continue;
            if (state == Waiting) ThreadPool.UnsafeQueueUserWorkItem(this, preferLocal: false);
            return;
        }
    }

    /// <summary>Completes when <see cref="Raise"/> was called since the last completed wait. One wait at a time.</summary>
    public ValueTask WaitAsync()
    {
        _core.Reset();
        if (Interlocked.CompareExchange(ref _state, Waiting, Idle) == Set)
        {
            Volatile.Write(ref _state, Idle);
            return ValueTask.CompletedTask;
        }

        return new ValueTask(this, _core.Version);
    }

    void IThreadPoolWorkItem.Execute() => _core.SetResult(true);

    void IValueTaskSource.GetResult(short token) => _core.GetResult(token);

    ValueTaskSourceStatus IValueTaskSource.GetStatus(short token) => _core.GetStatus(token);

    void IValueTaskSource.OnCompleted(Action<object?> continuation, object? state, short token, ValueTaskSourceOnCompletedFlags flags)
        => _core.OnCompleted(continuation, state, token, flags);
}
