using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>What becomes of samples in flight when new weights take over, between two steps.</summary>
public enum UpdatePolicy
{
    /// <summary>Drop their keys and values, recompute them under the new weights, go on.</summary>
    Recompute,

    /// <summary>Go on with the keys and values they have.</summary>
    Keep,

    /// <summary>Let groups that have begun end on the old weights first; new ones wait for the new weights.</summary>
    Drain,

    /// <summary>End groups that have begun, returning their partial tokens.</summary>
    Abort,
}

/// <summary>Where the bytes of an update land.</summary>
public enum UpdateMode
{
    /// <summary>Staged where the device has memory for a second set of weights, else in place.</summary>
    Auto,

    /// <summary>Beside the weights in service, which serve on until the commit.</summary>
    Staged,

    /// <summary>In the weights in service, while no step runs.</summary>
    InPlace,
}

/// <summary>One tensor of an update: its Hugging Face name, the type and full shape, and where in the payload its bytes are.</summary>
/// <param name="Name">The checkpoint's.</param>
/// <param name="Type">Of the bytes sent.</param>
/// <param name="Shape">Of the full tensor.</param>
/// <param name="Offset">In the payload.</param>
/// <param name="SparseCount">
/// Null: all elements are sent. Else only so many: that many uint32 indices into the flattened tensor, ascending, then as many values.
/// </param>
public readonly record struct ManifestTensor(string Name, DType Type, IReadOnlyList<long> Shape, long Offset, long? SparseCount = null)
{
    /// <summary>Of the full tensor.</summary>
    public long Elements
    {
        get
        {
            long product = 1;
            for (int i = 0; i < Shape.Count; i++) product *= Shape[i];
            return product;
        }
    }

    /// <summary>In the payload.</summary>
    public long Bytes => SparseCount is { } count ? count * (sizeof(uint) + Type.Size()) : Elements * Type.Size();
}

/// <summary>Everything the preflight needs to know before a byte moves.</summary>
public sealed record UpdateManifest
{
    public required IReadOnlyList<ManifestTensor> Tensors { get; init; }

    public required long PayloadBytes { get; init; }

    /// <summary>Must be the version being served: compare and set.</summary>
    public required ulong BaseVersion { get; init; }

    /// <summary>Must be greater than the base version.</summary>
    public required ulong NewVersion { get; init; }

    public UpdatePolicy Policy { get; init; }

    public UpdateMode Mode { get; init; }

    /// <summary>Tensors that are not named keep their bytes; without this, one that is not named is a problem.</summary>
    public bool Partial { get; init; }

    /// <summary>Named to a second updater, which is refused.</summary>
    public string Owner { get; init; } = "";

    /// <summary>Whether every byte of the model is sent, so that nothing of what is in service is needed.</summary>
    public bool IsFull => !Partial && Tensors.All(tensor => tensor.SparseCount is null);
}

/// <summary>The preflight found these; no byte has moved.</summary>
public sealed class UpdateRejectedException(IReadOnlyList<Problem> problems)
    : Exception($"the update was rejected: {string.Join("; ", problems)}")
{
    public IReadOnlyList<Problem> Problems { get; } = problems;
}

/// <summary>Why an update did not commit, in few words: what a metric is labelled with.</summary>
public enum UpdateFailure
{
    /// <summary>The manifest did not fit.</summary>
    Rejected,

    /// <summary>Bytes came out of order, too few or too many, or messages did.</summary>
    Protocol,

    /// <summary>The bytes could not be read where the sender said they stand.</summary>
    Source,

    /// <summary>What arrived is not what was sent.</summary>
    Digest,

    /// <summary>The sender ended it, or is gone.</summary>
    Sender,

    /// <summary>It took longer than its deadline.</summary>
    Deadline,

    /// <summary>The engine stops or has failed.</summary>
    Engine,
}

/// <summary>The update failed on the way. Staged, the old weights are still served; in place, the engine may be poisoned.</summary>
public sealed class UpdateFailedException(UpdateFailure failure, string reason) : Exception(reason)
{
    public UpdateFailure Failure { get; } = failure;
}

/// <summary>What a commit did. Seconds are wall time.</summary>
public sealed record CommitResult
{
    public required ulong Version { get; init; }

    /// <summary>Of all that was sent, as weights.proto combines it.</summary>
    public required byte[] Digest { get; init; }

    /// <summary>Checking the manifest, and allocating the spare set at the first staged update.</summary>
    public required double PreflightSeconds { get; init; }

    /// <summary>From there to the last byte.</summary>
    public required double TransferSeconds { get; init; }

    /// <summary>Hashing and packing, summed over cores.</summary>
    public required double ApplySeconds { get; init; }

    /// <summary>From the order to commit to the step boundary where the new weights took over.</summary>
    public required double SwapSeconds { get; init; }

    /// <summary>How long no step could run: the swap itself, or all of an update in place from its first byte.</summary>
    public required double StallSeconds { get; init; }
}
