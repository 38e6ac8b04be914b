namespace Rollout.Client;

public enum EngineState
{
    Loading,
    Running,
    Pausing,
    Paused,

    /// <summary>No step runs until an update in place ends.</summary>
    Updating,

    /// <summary>Some memory was given back; see <see cref="SidecarStatus.Asleep"/>.</summary>
    Sleeping,

    /// <summary>An update in place ended half-way, or the weights slept. Only a full push ends this.</summary>
    Poisoned,

    /// <summary>The device or an invariant failed; the sidecar must be restarted.</summary>
    Faulted,

    /// <summary>A state this client does not know.</summary>
    Other,
}

public enum PauseMode
{
    /// <summary>End all groups, returning their partial tokens.</summary>
    Abort,

    /// <summary>Let running groups end first; new ones wait.</summary>
    Wait,

    /// <summary>Freeze between two steps; samples continue at resume.</summary>
    Keep,
}

/// <summary>What the sidecar is doing. Counters grow from its start.</summary>
public sealed record SidecarStatus
{
    public required EngineState State { get; init; }

    /// <summary>Why the engine is faulted or poisoned, the owner of a pause or update, what sleeps; otherwise "".</summary>
    public string Reason { get; init; } = "";

    /// <summary>Version of the weights being served.</summary>
    public required ulong Version { get; init; }

    public string Model { get; init; } = "";

    public string Backend { get; init; } = "";

    /// <summary>Samples with a seat in the batch.</summary>
    public int Running { get; init; }

    /// <summary>Samples waiting for a seat.</summary>
    public int Waiting { get; init; }

    public long KvBlocksTotal { get; init; }

    /// <summary>Held by samples.</summary>
    public long KvBlocksUsed { get; init; }

    /// <summary>Free, but still holding a reusable prefix.</summary>
    public long KvBlocksCached { get; init; }

    public long Steps { get; init; }

    public long GeneratedTokens { get; init; }

    public long PrefilledTokens { get; init; }

    public long PrefixHitTokens { get; init; }

    public long Preemptions { get; init; }

    /// <summary>A weight update by <see cref="UpdateOwner"/> is in progress.</summary>
    public bool Updating { get; init; }

    public string UpdateOwner { get; init; } = "";

    public int VocabSize { get; init; }

    /// <summary>Tokens of one sample, prompt included.</summary>
    public int MaxContext { get; init; }

    public MemoryTags Asleep { get; init; }

    public MemoryInUse Memory { get; init; }

    internal static EngineState From(V1.EngineState state) => state switch
    {
        V1.EngineState.Loading => EngineState.Loading,
        V1.EngineState.Running => EngineState.Running,
        V1.EngineState.Pausing => EngineState.Pausing,
        V1.EngineState.Paused => EngineState.Paused,
        V1.EngineState.Updating => EngineState.Updating,
        V1.EngineState.Sleeping => EngineState.Sleeping,
        V1.EngineState.Poisoned => EngineState.Poisoned,
        V1.EngineState.Faulted => EngineState.Faulted,
        _ => EngineState.Other,
    };

    internal static SidecarStatus From(V1.StatusReply reply) => new()
    {
        State = From(reply.State),
        Reason = reply.Reason,
        Version = reply.Version,
        Model = reply.Model,
        Backend = reply.Backend,
        Running = (int)reply.Running,
        Waiting = (int)reply.Waiting,
        KvBlocksTotal = (long)reply.KvBlocksTotal,
        KvBlocksUsed = (long)reply.KvBlocksUsed,
        KvBlocksCached = (long)reply.KvBlocksCached,
        Steps = (long)reply.Steps,
        GeneratedTokens = (long)reply.GeneratedTokens,
        PrefilledTokens = (long)reply.PrefilledTokens,
        PrefixHitTokens = (long)reply.PrefixHitTokens,
        Preemptions = (long)reply.Preemptions,
        Updating = reply.Updating,
        UpdateOwner = reply.UpdateOwner,
        VocabSize = (int)reply.VocabSize,
        MaxContext = (int)reply.MaxContext,
        Asleep = MemoryTagsExtensions.From(reply.Asleep),
        Memory = reply.Memory is { } used
            ? new MemoryInUse(
                (long)used.Weights, (long)used.Staging, (long)used.KvCache, (long)used.Graphs, (long)used.Nccl, (long)used.Free)
            : default,
    };
}

/// <summary>Bytes of the sidecar's device, by what they are used for. What sleeps takes none.</summary>
/// <param name="Weights">The set in service.</param>
/// <param name="Staging">A second set, from the first staged push on.</param>
/// <param name="KvCache">Keys and values.</param>
/// <param name="Graphs">A GPU's: by how much all memory in use grew while graphs were captured.</param>
/// <param name="Nccl">Likewise, while ranks connected.</param>
/// <param name="Free">Whoever uses the rest.</param>
public readonly record struct MemoryInUse(long Weights, long Staging, long KvCache, long Graphs, long Nccl, long Free);
