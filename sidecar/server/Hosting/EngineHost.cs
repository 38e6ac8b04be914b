using Rollout.Engine;
using Rollout.Server.Generation;

namespace Rollout.Server.Hosting;

/// <summary>
/// The server cannot serve this call now, because it is loading or stopping. Another try, here or elsewhere, may succeed.
/// </summary>
internal sealed class NotServingException(string message) : Exception(message);

/// <summary>Gives the services access to the engine. It goes once from loading to serving to stopping.</summary>
internal sealed class EngineHost
{
    private readonly CancellationTokenSource _stopping = new();
    private volatile RolloutEngine? _engine;

    /// <summary>Cancelled when the server begins to stop: calls that wait for their client then end.</summary>
    public CancellationToken Stopping => _stopping.Token;

    /// <summary>The engine, in any state; null while the model is being loaded.</summary>
    public RolloutEngine? Loaded => _engine;

    /// <summary>The engine, for a call that needs a loaded model.</summary>
    /// <exception cref="NotServingException">The model is still being loaded.</exception>
    public RolloutEngine Engine => _engine ?? throw new NotServingException("the model is still being loaded");

    /// <summary>The engine, for a call that starts work.</summary>
    /// <exception cref="NotServingException">The server is loading or stopping.</exception>
    public RolloutEngine Admitting
        => _stopping.IsCancellationRequested ? throw new NotServingException("the server is stopping") : Engine;

    /// <summary>Starts a group, unless the server is loading or stopping.</summary>
    /// <exception cref="NotServingException">It is.</exception>
    public GroupStream Start(Func<RolloutEngine, GroupStream> start)
    {
        GroupStream group = start(Admitting);

        // Stop() closes admissions before it aborts groups in flight; a group submitted between the two is ended here.
        if (_stopping.IsCancellationRequested) _ = group.AbortAsync();
        return group;
    }

    /// <summary>Whether health answers SERVING.</summary>
    public bool Serving => !_stopping.IsCancellationRequested && _engine is { } engine && engine.Status.State != EngineState.Faulted;

    public void Publish(RolloutEngine engine) => _engine = engine;

    /// <summary>
    /// Closes admissions, then ends groups in flight: every stream returns its partial tokens and completes. True if there were any.
    /// </summary>
    public bool Stop()
    {
        _stopping.Cancel();
        if (_engine is not { } engine) return false;
        EngineStatus status = engine.Status;
        engine.AbortAsync((IReadOnlyCollection<string>?)null);
        return status.Running + status.Waiting > 0 || status.UpdateOwner is not null;
    }
}
