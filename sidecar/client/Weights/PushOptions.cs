namespace Rollout.Client;

/// <summary>What happens to samples in flight when new weights take over, between two steps.</summary>
public enum UpdatePolicy
{
    /// <summary>Drop their keys and values, recompute them under the new weights, and continue.</summary>
    Recompute,

    /// <summary>Continue with their present keys and values; every token has the version that drew it.</summary>
    Keep,

    /// <summary>Let groups that have begun end on the old weights first; new ones wait for the new weights.</summary>
    Drain,

    /// <summary>End groups that have begun; their samples return their partial tokens and finish reason abort.</summary>
    Abort,
}

/// <summary>How the bytes are sent.</summary>
public enum PushTransport
{
    /// <summary>
    /// The fastest for where the tensors are: CUDA IPC from the memory of the sidecar's own GPU, NCCL from that of another, shared memory
    /// from the host's. The result says which and why.
    /// </summary>
    Auto,

    /// <summary>Through a file in /dev/shm: trainer and sidecar share a machine (and in containers, /dev/shm).</summary>
    SharedMemory,

    /// <summary>In the gRPC stream: works between any two machines, but is slower.</summary>
    Inline,

    /// <summary>Through a safetensors file in <see cref="PushOptions.Folder"/>, on a disk that trainer and sidecar both see.</summary>
    File,

    /// <summary>
    /// The sidecar reads the tensors in the memory of the GPU that both use. Chosen by <see cref="Auto"/>; nothing passes through the host.
    /// </summary>
    CudaIpc,

    /// <summary>
    /// The tensors are broadcast from the trainer's GPU to the sidecar's, which is another one. Chosen by <see cref="Auto"/>.
    /// </summary>
    Nccl,
}

/// <summary>Where the sidecar writes the bytes.</summary>
public enum UpdateMode
{
    /// <summary>Staged where the sidecar's device has memory for a second set of weights, else in place.</summary>
    Auto,

    /// <summary>Into a second set of weights: samples continue meanwhile, and any failure leaves the old weights served.</summary>
    Staged,

    /// <summary>
    /// Into the weights in service, while no step runs. Needs no memory, but a push that fails half-way leaves the sidecar poisoned: it
    /// refuses to generate until a full push has succeeded.
    /// </summary>
    InPlace,
}

/// <summary>Options of one push.</summary>
public sealed record PushOptions
{
    internal static readonly PushOptions Default = new();

    public UpdatePolicy Policy { get; init; } = UpdatePolicy.Recompute;

    public PushTransport Transport { get; init; } = PushTransport.Auto;

    public UpdateMode Mode { get; init; } = UpdateMode.Auto;

    /// <summary>Tensors that are not given keep their values. Without it, a push with a missing tensor is refused.</summary>
    public bool Partial { get; init; }

    /// <summary>Folder for <see cref="PushTransport.File"/>, which requires it.</summary>
    public string? Folder { get; init; }

    /// <summary>Named in the error that a second updater gets.</summary>
    public string Owner { get; init; } = $"{Environment.MachineName}/{Environment.ProcessId}";

    /// <summary>Timeout of the whole push. The sidecar gets the same deadline and drops the update when it passes.</summary>
    public TimeSpan Timeout { get; init; } = TimeSpan.FromMinutes(10);

    /// <summary>
    /// Hash every byte that is sent, and let the sidecar commit only if it received the same. Without it, bytes that change in transit are
    /// not detected; it saves the hashing, a few hundredths of a second per gigabyte. Tensors that stay on a GPU are hashed by the sidecar
    /// alone, which computes the digest of what it has read; its result has that.
    /// </summary>
    public bool VerifyDigest { get; init; } = true;

    /// <summary>
    /// Tensors written to shared memory or a file at once. Above 1, sources are called from several threads, each source from one at a
    /// time.
    /// </summary>
    public int Parallelism { get; init; } = 1;

    /// <summary>The version these weights replace, where the caller knows; see <see cref="WeightPublisher"/>.</summary>
    public ulong? BaseVersion { get; init; }
}

/// <summary>Durations of a push, in seconds. The first four add up to about <see cref="Total"/>.</summary>
public sealed record PushTimings
{
    /// <summary>Until the sidecar has accepted the manifest.</summary>
    public double Preflight { get; init; }

    /// <summary>Copying tensors out of the trainer, hashing and writing or sending them.</summary>
    public double Write { get; init; }

    /// <summary>From there until the sidecar has read all of it.</summary>
    public double Transfer { get; init; }

    /// <summary>From commit to the sidecar's answer that the new weights are served.</summary>
    public double Commit { get; init; }

    public double Total { get; init; }

    /// <summary>The sidecar's: reading, hashing and packing while decoding continues.</summary>
    public double ServerTransfer { get; init; }

    /// <summary>The sidecar's: from commit to the step boundary where the new weights took over.</summary>
    public double ServerSwap { get; init; }

    /// <summary>The sidecar's: how long no step could run; in place, all the time from the first byte on.</summary>
    public double ServerStall { get; init; }
}

/// <summary>What a push cost, counted. Those counted by the sidecar are 0 with <see cref="PushResult.ConfirmedByStatus"/>.</summary>
/// <param name="Messages">Sent to the sidecar for it: begin, where the payload is, commit.</param>
/// <param name="Buckets">Parts that the sidecar read on its device one after the other; 0 where the bytes passed through the host.</param>
/// <param name="HandlesOpened">By the sidecar, of this process's memory.</param>
/// <param name="Launches">Of kernels that read the payload on the sidecar's device.</param>
/// <param name="DeviceAllocations">By the sidecar, for working memory, which it keeps.</param>
/// <param name="GraphsCaptured">By the sidecar.</param>
/// <param name="DeviceBytes">Payload bytes that the sidecar read on its device.</param>
/// <param name="HostBytes">Payload bytes that passed through the host.</param>
public readonly record struct PushCounts(int Messages, int Buckets, long HandlesOpened, long Launches, long DeviceAllocations,
    long GraphsCaptured, long DeviceBytes, long HostBytes);

/// <summary>The new version is served.</summary>
public sealed record PushResult
{
    public PushCounts Counts { get; init; }

    public required ulong Version { get; init; }

    /// <summary>XXH3-128 over the tensors' digests in the order they were given, 32 hexadecimal digits; "" where not known.</summary>
    public required string Digest { get; init; }

    public required long PayloadBytes { get; init; }

    /// <summary>How the bytes were sent.</summary>
    public required PushTransport Transport { get; init; }

    /// <summary>Why they were sent so, in a sentence.</summary>
    public required string TransportReason { get; init; }

    /// <summary>What the sidecar chose: staged or in place.</summary>
    public required UpdateMode Mode { get; init; }

    /// <summary>Those measured by the sidecar are 0 with <see cref="ConfirmedByStatus"/>.</summary>
    public required PushTimings Timings { get; init; }

    /// <summary>The answer to the commit was lost; the status showed afterwards that it had been carried out.</summary>
    public bool ConfirmedByStatus { get; init; }
}
