using System.Diagnostics;

namespace Rollout.Engine;

/// <summary>Weight updates, as the loop sees them: moments between two steps.</summary>
public sealed partial class RolloutEngine
{
    /// <summary>The tensors being served, as they last came.</summary>
    public (ulong Version, IReadOnlyList<DescribedWeight> Weights) Describe() => _weights.Describe();

    /// <summary>Checks the manifest and gives the caller the one seat for updates.</summary>
    /// <param name="manifest">What is going to be sent.</param>
    /// <param name="alsoWrong">Problems that its reader found already, to be listed with the others.</param>
    /// <exception cref="UpdateRejectedException">The manifest does not fit; lists every problem.</exception>
    /// <exception cref="EngineStateException">Another update holds the seat, and the message names its owner; or the weights sleep.</exception>
    /// <exception cref="NoRoomException">Staging was asked for and the device has no memory for it.</exception>
    public WeightUpdate BeginUpdate(UpdateManifest manifest, IReadOnlyList<Problem>? alsoWrong = null)
    {
        ThrowIfDown();
        Metrics.Started();
        try
        {
            return _weights.Begin(this, manifest, alsoWrong ?? []);
        }
        catch (Exception e)
        {
            Metrics.Failed(e is UpdateRejectedException ? "rejected" : "refused");
            throw;
        }
    }

    /// <summary>Staged: see <see cref="ServedWeights.Open"/>.</summary>
    internal void CarryOver(WeightUpdate update) => _weights.Open(update);

    /// <summary>In place: completes when no step runs any more, until the update ends.</summary>
    internal Task StandStillAsync(WeightUpdate update, CancellationToken cancellation) => AtMomentAsync(update, () =>
    {
        _weights.ThrowUnlessSeated(update);
        if (update.Manifest.Policy == UpdatePolicy.Abort) AbortBegun();
        update.StandsSince = Stopwatch.GetTimestamp();
        _standsFor = update;
    }, cancellation);

    /// <summary>Completes when the update is in service: seconds no step could run.</summary>
    internal async Task<double> CommitAsync(WeightUpdate update, IReadOnlyList<DescribedWeight> described, CancellationToken cancellation)
    {
        double stall = 0;
        await AtMomentAsync(update, () =>
        {
            long started = _standsFor is null ? Stopwatch.GetTimestamp() : update.StandsSince;
            Rehearse(update.Destination); // first, since it may fail
            _weights.Commit(update, described);
            if (update.Manifest.Policy == UpdatePolicy.Abort) AbortBegun();
            _scheduler.WeightsChanged(Version, update.Manifest.Policy);
            _standsFor = null;
            stall = Stopwatch.GetElapsedTime(started).TotalSeconds;
        }, cancellation).ConfigureAwait(false);
        return stall;
    }

    /// <summary>Without a commit: the seat is free when this returns, and the engine poisoned if it has to be.</summary>
    internal void EndUpdate(WeightUpdate update)
    {
        _weights.End(update);
        if (_standsFor == update) _standsFor = null;
        _wake.Release();
        Metrics.Failed(update.Failure.ToString().ToLowerInvariant());
    }

    /// <summary>What an update wants done between two steps, once its policy lets it.</summary>
    private sealed record Moment(UpdatePolicy Policy, Action Act)
    {
        public TaskCompletionSource Done { get; } = new(TaskCreationOptions.RunContinuationsAsynchronously);
    }

    /// <summary>Orders a moment. Ends when it has come and gone, or when it is certain that it never will.</summary>
    private async Task AtMomentAsync(WeightUpdate update, Action act, CancellationToken cancellation)
    {
        Moment moment = new(update.Manifest.Policy, act);
        await OnLoop(() =>
        {
            ThrowIfDown();
            return _moment = moment;
        }).ConfigureAwait(false);
        using CancellationTokenRegistration takeBack = cancellation.UnsafeRegister(_ => Post(() =>
        {
            if (_moment != moment) return; // it has come
            _moment = null;
            moment.Done.TrySetException(new UpdateFailedException(UpdateFailure.Deadline,
                "the commit was taken back, by its deadline or its caller, before its moment came"));
        }), null);
        await moment.Done.Task.ConfigureAwait(false);
    }

    /// <summary>On the loop, between two steps. Under DRAIN the moment comes when nothing that began on the old weights is left.</summary>
    private void TryTake(Moment moment)
    {
        if (moment.Policy == UpdatePolicy.Drain && _scheduler.HasBegun) return;
        try
        {
            moment.Act(); // where it fails in another way than below the loop ends, and tells whoever waits for the moment
            _moment = null;
            moment.Done.SetResult();
        }
        catch (UpdateFailedException e)
        {
            _moment = null;
            moment.Done.SetException(e);
        }
    }

    private void AbortBegun()
    {
        foreach (Group group in _groups.Values.Where(group => group.Begun)) _scheduler.End(group, FinishReason.Abort);
    }
}
