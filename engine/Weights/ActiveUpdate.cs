namespace Rollout.Engine;

/// <summary>The state that <see cref="ServedWeights"/> keeps of the update in progress. There is at most one at a time.</summary>
/// <param name="manifest">Has passed the preflight.</param>
/// <param name="mode">Staged or in place.</param>
/// <param name="destination">The set that its bytes are written to: the spare one, or in place the one in service.</param>
internal sealed class ActiveUpdate(UpdateManifest manifest, UpdateMode mode, WeightSet destination)
{
    private volatile bool _hasTouchedServedWeights;

    public UpdateManifest Manifest { get; } = manifest;

    public UpdateMode Mode { get; } = mode;

    public WeightSet Destination { get; } = destination;

    /// <summary>In place: when steps stopped for it, by Stopwatch.</summary>
    public long? WritingSince { get; set; }

    /// <summary>Whether the weights in service may hold a byte of it: an end without a commit then poisons the engine.</summary>
    public bool HasTouchedServedWeights { get => _hasTouchedServedWeights; set => _hasTouchedServedWeights = value; }

    /// <summary>Why it ended without a commit.</summary>
    public UpdateFailure EndedFor { get; set; }
}
