namespace Rollout.Engine;

/// <summary>The settings of an operator. Everything else is derived and shown in <see cref="EngineStatus"/>.</summary>
public sealed record EngineOptions
{
    /// <summary>Longest sample, prompt included, in tokens. 0: the model's own limit.</summary>
    public int MaxContext { get; init; }

    /// <summary>Most samples in one step.</summary>
    public int MaxSequences { get; init; } = 256;

    /// <summary>
    /// Most tokens in one step: the chunk in which prompts are prefilled. 0: the backend's <see cref="Kernels.Backend.StepTokens"/>.
    /// </summary>
    public int MaxBatchTokens { get; init; }

    /// <summary>
    /// Bytes for keys and values. 0: what MaxSequences samples of full length need, at most the backend's
    /// <see cref="Kernels.Backend.KvCacheBudget"/>.
    /// </summary>
    public long KvCacheBytes { get; init; }

    /// <summary>
    /// Instead of bytes: the fraction, above 0 and up to 1, of the device memory that is free once the weights are loaded. 0: not given.
    /// </summary>
    public double KvCacheFraction { get; init; }

    /// <summary>Samples that may wait for a batch slot before requests are refused with "no room".</summary>
    public int MaxWaiting { get; init; } = 65_536;
}

public enum EngineState
{
    Running,
    Pausing,
    Paused,

    /// <summary>No step runs until an update in place ends.</summary>
    Updating,

    /// <summary>Some memory was given back; see <see cref="MemoryTags"/>.</summary>
    Sleeping,

    /// <summary>
    /// The weights in service cannot be trusted: an update in place ended half-way, or sleep discarded them. Only a full update ends this.
    /// </summary>
    Poisoned,

    Faulted,
}

public enum PauseMode
{
    /// <summary>End all groups, returning their partial tokens.</summary>
    Abort,

    /// <summary>Let groups that have begun end first; those that have not wait.</summary>
    Wait,

    /// <summary>Freeze between two steps.</summary>
    Keep,
}

/// <summary>
/// Read from any thread without waiting for the loop or the device: while steps run, two values may come from different steps.
/// </summary>
public sealed record EngineStatus
{
    public EngineState State { get; init; }

    public string Reason { get; init; } = "";

    public ulong Version { get; init; }

    /// <summary>Samples with a seat in the batch.</summary>
    public int Running { get; init; }

    /// <summary>Samples waiting for a seat.</summary>
    public int Waiting { get; init; }

    public int KvBlocksTotal { get; init; }

    /// <summary>Held by samples.</summary>
    public int KvBlocksUsed { get; init; }

    /// <summary>Free, but still holding a reusable prefix.</summary>
    public int KvBlocksCached { get; init; }

    public long Steps { get; init; }

    public long GeneratedTokens { get; init; }

    public long PrefilledTokens { get; init; }

    public long PrefixHitTokens { get; init; }

    public long Preemptions { get; init; }

    /// <summary>The owner of the update in progress, or null.</summary>
    public string? UpdateOwner { get; init; }

    public MemoryTags Asleep { get; init; }

    public MemoryInUse Memory { get; init; }
}

/// <summary>Bytes of the device, by what they are used for. What sleeps takes none.</summary>
/// <param name="Weights">The set in service.</param>
/// <param name="Staging">The spare set, from the first staged update on.</param>
/// <param name="KvCache">Keys and values.</param>
/// <param name="Graphs">Measured by the growth of all memory in use while graphs were captured; 0 on a CPU.</param>
/// <param name="Nccl">Measured likewise while ranks connected.</param>
/// <param name="Free">On the device, whoever uses the rest.</param>
public readonly record struct MemoryInUse(long Weights, long Staging, long KvCache, long Graphs, long Nccl, long Free);
