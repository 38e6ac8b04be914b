namespace Rollout.Engine;

/// <summary>
/// Whether the loop may run. A pause is a lease: it expires unless its owner renews it. Owned by the loop; other threads only read
/// <see cref="State"/>.
/// <code>
///   Running -- Begin(Wait) --> Pausing -- all begun groups ended --> Paused -- End, lease over --> Running
///      +------ Begin(Abort, Keep) --------------------------------------^
/// </code>
/// </summary>
internal sealed class Pause
{
    private volatile EngineState _state = EngineState.Running;
    private volatile string _owner = "";
    private long _leaseEnds; // Environment.TickCount64
    private TaskCompletionSource _inForce = new();

    public EngineState State => _state;

    public string Owner => _owner;

    /// <summary>Whether new groups must wait, while those that began run to their end.</summary>
    public bool HoldsNewGroups => _state == EngineState.Pausing;

    /// <summary>Returns a task that completes when no step will run any more.</summary>
    public Task Begin(PauseMode mode, string owner, TimeSpan lease)
    {
        if (_state == EngineState.Running) _inForce = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
        _owner = owner;
        _leaseEnds = Environment.TickCount64 + (long)lease.TotalMilliseconds;
        if (_state == EngineState.Paused) return _inForce.Task;
        if (mode == PauseMode.Wait) _state = EngineState.Pausing;
        else TakeForce();
        return _inForce.Task;
    }

    public void End()
    {
        _state = EngineState.Running;
        _owner = "";
        _inForce.TrySetResult(); // its waiters then read the state
    }

    /// <summary>
    /// Whether the pause stops the loop; called before every step. Ends the pause when its lease is over, and a waiting pause takes force
    /// when every group that began has ended.
    /// </summary>
    public bool Stops(Scheduler scheduler)
    {
        if (_state == EngineState.Running) return false;
        if (Environment.TickCount64 >= _leaseEnds) End();
        else if (_state == EngineState.Pausing && !scheduler.HasBegun) TakeForce();
        return _state == EngineState.Paused;
    }

    /// <summary>Milliseconds the loop may sleep; -1 without a lease.</summary>
    public int UntilLeaseEnds()
        => _state == EngineState.Running ? Timeout.Infinite : (int)Math.Clamp(_leaseEnds - Environment.TickCount64, 0, int.MaxValue);

    private void TakeForce()
    {
        _state = EngineState.Paused;
        _inForce.TrySetResult();
    }
}
