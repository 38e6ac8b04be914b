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

/// <summary>One tensor of an update: a Hugging Face name, the type and full shape of the bytes sent, and where in the payload they stand.</summary>
public readonly record struct ManifestTensor(string Name, DType Type, IReadOnlyList<long> Shape, long Offset)
{
    public long Elements => Shape.Aggregate(1L, (product, dimension) => product * dimension);

    public long Bytes => Elements * Type.Size();
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

    /// <summary>Named to a second updater that is refused.</summary>
    public string Owner { get; init; } = "";
}

/// <summary>The preflight found these; no byte has moved.</summary>
public sealed class UpdateRejectedException(IReadOnlyList<Problem> problems)
    : Exception($"the update was rejected: {string.Join("; ", problems)}")
{
    public IReadOnlyList<Problem> Problems { get; } = problems;
}

/// <summary>The update failed on the way; the old weights are still served.</summary>
public sealed class UpdateFailedException(string reason) : Exception(reason);

/// <summary>What a commit did. Seconds are wall time.</summary>
public sealed record CommitResult(ulong Version, byte[] Digest, double TransferSeconds, double SwapSeconds, double StallSeconds);
