using System.Diagnostics;
using Rollout.Kernels.Cuda;

namespace Rollout.Engine;

/// <summary>Weight updates: their actions on the loop run between two steps.</summary>
public sealed partial class RolloutEngine
{
    /// <summary>
    /// The tensors being served. Where single elements have changed since the last call, hashes the pieces of 128 KiB that they are in, on
    /// the caller's thread and beside the running steps.
    /// </summary>
    public (ulong Version, IReadOnlyList<DescribedWeight> Weights) Describe() => _weights.Describe();

    /// <summary>Checks the manifest and begins an update. There is at most one at a time.</summary>
    /// <param name="manifest">What is going to be sent.</param>
    /// <param name="alsoWrong">Problems that the caller has found already; listed with the others.</param>
    /// <exception cref="UpdateRejectedException">The manifest does not fit; lists every problem.</exception>
    /// <exception cref="EngineStateException">
    /// Another update is in progress (the message names its owner), or the weights sleep.
    /// </exception>
    /// <exception cref="NoRoomException">Staging was requested and the device has no memory for it.</exception>
    public WeightUpdate BeginUpdate(UpdateManifest manifest, ProblemList? alsoWrong = null)
    {
        ThrowIfDown();
        Metrics.Started();
        long started = Stopwatch.GetTimestamp();
        CudaCounts before = Backend.Peers?.Counts ?? default;
        ActiveUpdate? update = null;
        try
        {
            update = _weights.Begin(manifest, alsoWrong ?? [], State);
            return new WeightUpdate(this, update, _transformer.Weights, Stopwatch.GetElapsedTime(started).TotalSeconds, before);
        }
        catch (Exception e)
        {
            if (update is not null) _weights.End(update, UpdateFailure.Engine); // no memory for the indices of sparse tensors
            Metrics.Failed(e is UpdateRejectedException ? "rejected" : "refused");
            throw;
        }
    }

    /// <summary>Staged: see <see cref="ServedWeights.PrepareStaging"/>.</summary>
    internal void PrepareStaging(ActiveUpdate update) => _weights.PrepareStaging(update);

    /// <summary>In place: completes when no step runs any more, until the update ends.</summary>
    internal Task StopStepsAsync(ActiveUpdate update, CancellationToken cancellation) => AtStepBoundaryAsync(update.Manifest.Policy, () =>
    {
        _weights.BeginWriting(update);
        if (update.Manifest.Policy == UpdatePolicy.Abort) AbortBegun();
    }, cancellation);

    /// <summary>Completes when the update is in service. Returns the seconds during which no step could run.</summary>
    internal async Task<double> CommitAsync(ActiveUpdate update, IReadOnlyList<ServedTensor> sent, CancellationToken cancellation)
    {
        double stall = 0;
        IReadOnlyList<ServedTensor> tensors = _weights.After(update, sent);
        await AtStepBoundaryAsync(update.Manifest.Policy, () =>
        {
            long started = update.WritingSince ?? Stopwatch.GetTimestamp();
            Rehearse(update.Destination); // first, since it may fail
            _weights.Commit(update, tensors);
            if (update.Manifest.Policy == UpdatePolicy.Abort) AbortBegun();
            _scheduler.WeightsChanged(Version, update.Manifest.Policy);
            stall = Stopwatch.GetElapsedTime(started).TotalSeconds;
        }, cancellation).ConfigureAwait(false);
        return stall;
    }

    /// <summary>
    /// Ends an update without a commit: on return another may begin, and the engine is poisoned if served weights were written.
    /// </summary>
    internal void EndUpdate(ActiveUpdate update, UpdateFailure why)
    {
        _weights.End(update, why);
        _wake.Release();
        Metrics.Failed(why.ToString().ToLowerInvariant());
    }

    /// <summary>An action of an update that runs between two steps, once its policy allows it.</summary>
    private sealed record BoundaryAction(UpdatePolicy Policy, Action Run)
    {
        public TaskCompletionSource Done { get; } = new(TaskCreationOptions.RunContinuationsAsynchronously);
    }

    /// <summary>Completes when the action has run, or when it is certain that it never will.</summary>
    private async Task AtStepBoundaryAsync(UpdatePolicy policy, Action run, CancellationToken cancellation)
    {
        BoundaryAction action = new(policy, run);
        await OnLoop(() =>
        {
            ThrowIfDown();
            return _boundaryAction = action;
        }).ConfigureAwait(false);
        using CancellationTokenRegistration takeBack = cancellation.UnsafeRegister(_ => Post(() =>
        {
            if (_boundaryAction != action) return; // it has run
            _boundaryAction = null;
            action.Done.TrySetException(new UpdateFailedException(UpdateFailure.Deadline,
                "the commit was withdrawn, by its deadline or its caller, before the engine could carry it out"));
        }), null);
        await action.Done.Task.ConfigureAwait(false);
    }

    /// <summary>
    /// Called by the loop between two steps. Under DRAIN the action waits until every group that began on the old weights has ended.
    /// </summary>
    private void TryRunBoundaryAction()
    {
        if (_boundaryAction is not { } action || (action.Policy == UpdatePolicy.Drain && _scheduler.HasBegun)) return;
        try
        {
            action.Run(); // any other exception ends the loop, which then fails the action
            _boundaryAction = null;
            action.Done.SetResult();
        }
        catch (UpdateFailedException e)
        {
            _boundaryAction = null;
            action.Done.SetException(e);
        }
    }

    private void AbortBegun()
    {
        foreach (Group group in _groups.Values.Where(group => group.Begun)) _scheduler.End(group, FinishReason.Abort);
    }
}
