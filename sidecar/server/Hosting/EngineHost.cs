using Rollout.Engine;
using Rollout.Server.Generation;

namespace Rollout.Server.Hosting;

/// <summary>The server cannot serve this call now: it is loading or leaving. Another try, here or elsewhere, may succeed.</summary>
internal sealed class NotServingException(string message) : Exception(message);

/// <summary>What the services see of the engine: not there yet, serving, or leaving. Each step is taken once.</summary>
internal sealed class EngineHost
{
    private readonly CancellationTokenSource _stopping = new();
    private volatile RolloutEngine? _engine;

    /// <summary>Cancelled when the server begins to stop: calls that wait for their client give up.</summary>
    public CancellationToken Stopping => _stopping.Token;

    /// <summary>The engine, in whatever state; null while the model is being loaded.</summary>
    public RolloutEngine? Loaded => _engine;

    /// <summary>The engine, for a call that needs it to be there.</summary>
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

        // Stop() closes admissions before it aborts what is in flight; a group that slipped in between the two is ended here.
        if (_stopping.IsCancellationRequested) _ = group.AbortAsync();
        return group;
    }

    /// <summary>Whether health answers SERVING.</summary>
    public bool Serving => !_stopping.IsCancellationRequested && _engine is { } engine && engine.Status.State != EngineState.Faulted;

    public void Publish(RolloutEngine engine) => _engine = engine;

    /// <summary>
    /// Closes admissions, then ends what is in flight: every stream delivers its partial tokens and completes. Says whether there was any.
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
