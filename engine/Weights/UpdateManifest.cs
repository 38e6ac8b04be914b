using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>What happens to samples in flight when new weights take over, between two steps.</summary>
public enum UpdatePolicy
{
    /// <summary>Drop their keys and values, recompute them under the new weights, and continue.</summary>
    Recompute,

    /// <summary>Continue with their present keys and values.</summary>
    Keep,

    /// <summary>Let groups that have begun end on the old weights first; new ones wait for the new weights.</summary>
    Drain,

    /// <summary>End groups that have begun, returning their partial tokens.</summary>
    Abort,
}

/// <summary>Where the bytes of an update are written.</summary>
public enum UpdateMode
{
    /// <summary>Staged where the device has memory for a second set of weights, else in place.</summary>
    Auto,

    /// <summary>Into a second set of weights; the present ones stay in service until the commit.</summary>
    Staged,

    /// <summary>Into the weights in service, while no step runs.</summary>
    InPlace,
}

/// <summary>
/// One tensor of an update, or a slice of one: its Hugging Face name, the type and full shape, and where in the payload its bytes are.
/// </summary>
/// <param name="Name">The checkpoint's.</param>
/// <param name="Type">Of the bytes sent.</param>
/// <param name="Shape">Of the full tensor.</param>
/// <param name="Offset">In the payload of its part.</param>
/// <param name="SparseCount">
/// Null: all elements are sent. Otherwise the number of elements sent: that many uint32 indices into the flattened tensor, ascending,
/// then as many values.
/// </param>
public readonly record struct ManifestTensor(string Name, DType Type, IReadOnlyList<long> Shape, long Offset, long? SparseCount = null)
{
    /// <summary>The first index of dimension 0 that is sent; 0 unless a slice is.</summary>
    public long FirstRow { get; init; }

    /// <summary>
    /// How many indices of dimension 0 are sent: a slice, of which one tensor may have several, anywhere in the manifest. Null: all.
    /// </summary>
    public long? Rows { get; init; }

    /// <summary>Which of the update's parts brings it.</summary>
    public int Part { get; init; }

    /// <summary>Of the full tensor.</summary>
    public long Elements => Shape.Count == 0 ? 1 : Shape[0] * RowElements;

    /// <summary>At one index of dimension 0: of a vector, 1.</summary>
    public long RowElements
    {
        get
        {
            long product = 1;
            for (int i = 1; i < Shape.Count; i++) product *= Shape[i];
            return product;
        }
    }

    /// <summary>Whether every element is sent with it.</summary>
    public bool IsWhole => SparseCount is null && (Rows is null || Rows == Shape[0]);

    /// <summary>Of the bytes that are sent: a slice's own.</summary>
    public IReadOnlyList<long> SentShape => Rows is { } rows ? [rows, .. Shape.Skip(1)] : Shape;

    /// <summary>In the payload.</summary>
    public long Bytes => SparseCount is { } count
        ? count * (sizeof(uint) + Type.Size())
        : (Rows is { } rows ? rows * RowElements : Elements) * Type.Size();
}

/// <summary>Everything the preflight checks before a byte is sent.</summary>
public sealed record UpdateManifest
{
    public required IReadOnlyList<ManifestTensor> Tensors { get; init; }

    /// <summary>Of part 0.</summary>
    public required long PayloadBytes { get; init; }

    /// <summary>Of parts 1, 2, and so on, which come from other senders.</summary>
    public IReadOnlyList<long> JoinedPayloadBytes { get; init; } = [];

    /// <summary>Must be the version being served: compare and set.</summary>
    public required ulong BaseVersion { get; init; }

    /// <summary>Must be greater than the base version.</summary>
    public required ulong NewVersion { get; init; }

    public UpdatePolicy Policy { get; init; }

    public UpdateMode Mode { get; init; }

    /// <summary>Tensors that are not named keep their bytes; without this, one that is not named is a problem.</summary>
    public bool Partial { get; init; }

    /// <summary>Named in the error that a second updater gets.</summary>
    public string Owner { get; init; } = "";

    public long PayloadBytesOf(int part) => part == 0 ? PayloadBytes : JoinedPayloadBytes[part - 1];

    /// <summary>Whether every element of the model is sent, so that the weights in service are not needed.</summary>
    public bool IsFull => !Partial && Tensors.All(tensor => tensor.SparseCount is null);
}

/// <summary>Problems found by the preflight; no byte has been sent.</summary>
public sealed class UpdateRejectedException(ProblemList problems)
    : Exception($"the update was rejected: {problems}")
{
    public ProblemList Problems { get; } = problems;
}

/// <summary>Why an update did not commit; the label of a metric.</summary>
public enum UpdateFailure
{
    /// <summary>The manifest did not fit.</summary>
    Rejected,

    /// <summary>Bytes or messages arrived out of order, or there were too few or too many.</summary>
    Protocol,

    /// <summary>The bytes could not be read where the sender said they are.</summary>
    Source,

    /// <summary>The bytes received differ from those sent.</summary>
    Digest,

    /// <summary>The sender ended it or disconnected.</summary>
    Sender,

    /// <summary>It took longer than its deadline.</summary>
    Deadline,

    /// <summary>The engine stops or has failed.</summary>
    Engine,
}

/// <summary>The update failed. Staged: the old weights are still served. In place: the engine may be poisoned.</summary>
public sealed class UpdateFailedException(UpdateFailure failure, string reason) : Exception(reason)
{
    public UpdateFailure Failure { get; } = failure;
}

/// <summary>The result of a commit. Seconds are wall time.</summary>
public sealed record CommitResult
{
    public required ulong Version { get; init; }

    /// <summary>Digest of all that was sent, combined as in weights.proto.</summary>
    public required byte[] Digest { get; init; }

    /// <summary>Checking the manifest, and allocating the spare set at the first staged update.</summary>
    public required double PreflightSeconds { get; init; }

    /// <summary>From there to the last byte.</summary>
    public required double TransferSeconds { get; init; }

    /// <summary>Hashing and packing, summed over cores.</summary>
    public required double ApplySeconds { get; init; }

    /// <summary>From the commit request to the step boundary at which the new weights took over.</summary>
    public required double SwapSeconds { get; init; }

    /// <summary>How long no step could run: during the swap, or for an update in place from its first byte to the commit.</summary>
    public required double StallSeconds { get; init; }

    public required UpdateCounts Counts { get; init; }
}

/// <summary>What an update cost, from the check of its manifest to its commit.</summary>
public sealed record UpdateCounts
{
    /// <summary>Kernels that read the payload in device memory.</summary>
    public required long Launches { get; init; }

    /// <summary>Of memory on the device, for any purpose.</summary>
    public required long DeviceAllocations { get; init; }

    /// <summary>For steps on the new weights.</summary>
    public required long GraphsCaptured { get; init; }

    /// <summary>Payload bytes that the device read where they stood, each once.</summary>
    public required long DeviceBytes { get; init; }

    /// <summary>Payload bytes that passed through the host.</summary>
    public required long HostBytes { get; init; }
}
