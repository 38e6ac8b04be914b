namespace Rollout.Client;

/// <summary>What becomes of samples in flight when new weights take over, between two steps.</summary>
public enum UpdatePolicy
{
    /// <summary>Drop their keys and values, recompute them under the new weights, go on.</summary>
    Recompute,

    /// <summary>Go on with the keys and values they have; every token says which version drew it.</summary>
    Keep,

    /// <summary>Let groups that have begun end on the old weights first; new ones wait for the new weights.</summary>
    Drain,

    /// <summary>End groups that have begun; their samples come back with their partial tokens and finish reason abort.</summary>
    Abort,
}

/// <summary>How the bytes travel.</summary>
public enum PushTransport
{
    /// <summary>Through a file in /dev/shm: trainer and sidecar share a machine (and in containers, /dev/shm).</summary>
    SharedMemory,

    /// <summary>In the gRPC stream: works anywhere, slower.</summary>
    Inline,

    /// <summary>Through a safetensors file in <see cref="PushOptions.Folder"/>, on a disk that trainer and sidecar both see.</summary>
    File,
}

/// <summary>Where the bytes land.</summary>
public enum UpdateMode
{
    /// <summary>Staged where the sidecar's device has memory for a second set of weights, else in place.</summary>
    Auto,

    /// <summary>Beside the weights in service: samples go on meanwhile, and whatever fails leaves the old weights served.</summary>
    Staged,

    /// <summary>
    /// In the weights in service, while no sample goes on. Needs no memory, but a push that breaks half-way leaves the sidecar poisoned: it
    /// refuses to generate until a full push has ended well.
    /// </summary>
    InPlace,
}

/// <summary>How one push is done.</summary>
public sealed record PushOptions
{
    internal static readonly PushOptions Default = new();

    public UpdatePolicy Policy { get; init; } = UpdatePolicy.Recompute;

    public PushTransport Transport { get; init; } = PushTransport.SharedMemory;

    public UpdateMode Mode { get; init; } = UpdateMode.Auto;

    /// <summary>Tensors that are not given keep their values. Without it, one that is missing is a mistake that is refused.</summary>
    public bool Partial { get; init; }

    /// <summary>For <see cref="PushTransport.File"/>, which has no other default.</summary>
    public string? Folder { get; init; }

    /// <summary>Named to a second updater that is refused.</summary>
    public string Owner { get; init; } = $"{Environment.MachineName}/{Environment.ProcessId}";

    /// <summary>Of the whole push. The sidecar gets the same deadline and drops the update when it passes.</summary>
    public TimeSpan Timeout { get; init; } = TimeSpan.FromMinutes(10);

    /// <summary>
    /// Hash every byte that is sent and let the sidecar commit only if it received the same. Without it nothing notices bytes that
    /// changed on the way; it saves the hashing, a few hundredths of a second per gigabyte.
    /// </summary>
    public bool VerifyDigest { get; init; } = true;

    /// <summary>
    /// Tensors written to shared memory or a file at once. Above 1, sources are called from several threads, each source from one at a
    /// time.
    /// </summary>
    public int Parallelism { get; init; } = 1;

    /// <summary>The version these weights replace, where the caller knows; see <see cref="WeightPublisher.PushAsync"/>.</summary>
    public ulong? BaseVersion { get; init; }
}

/// <summary>Where the time of a push went, in seconds. The first four add up to about <see cref="Total"/>.</summary>
public sealed record PushTimings
{
    /// <summary>Until the sidecar has agreed to the manifest.</summary>
    public double Preflight { get; init; }

    /// <summary>Copying tensors out of the trainer, hashing and writing or sending them.</summary>
    public double Write { get; init; }

    /// <summary>From there until the sidecar has read all of it.</summary>
    public double Transfer { get; init; }

    /// <summary>From commit to the sidecar's answer that the new weights are served.</summary>
    public double Commit { get; init; }

    public double Total { get; init; }

    /// <summary>The sidecar's: reading, hashing and packing while decoding goes on.</summary>
    public double ServerTransfer { get; init; }

    /// <summary>The sidecar's: from commit to the step boundary where the new weights took over.</summary>
    public double ServerSwap { get; init; }

    /// <summary>The sidecar's: how long decoding stood still; in place, all the time from the first byte on.</summary>
    public double ServerStall { get; init; }
}

/// <summary>The new version is served.</summary>
public sealed record PushResult
{
    public required ulong Version { get; init; }

    /// <summary>XxHash128 over the tensors' digests in the order they were given, 32 hexadecimal digits; "" where not known.</summary>
    public required string Digest { get; init; }

    public required long PayloadBytes { get; init; }

    /// <summary>What the sidecar chose: staged or in place.</summary>
    public required UpdateMode Mode { get; init; }

    /// <summary>The sidecar's own are 0 with <see cref="ConfirmedByStatus"/>.</summary>
    public required PushTimings Timings { get; init; }

    /// <summary>The answer to the commit was lost; asking afterwards showed that it had been done.</summary>
    public bool ConfirmedByStatus { get; init; }
}
