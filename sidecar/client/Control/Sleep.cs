namespace Rollout.Client;

/// <summary>Memory that the sidecar can give back while it is idle.</summary>
[Flags]
public enum MemoryTags
{
    None = 0,

    /// <summary>Discarded unless kept: after waking, a full push is then needed before sampling.</summary>
    Weights = 1,

    /// <summary>Keys and values, cached prefixes included.</summary>
    KvCache = 2,

    All = Weights | KvCache,
}

/// <param name="Tag">One tag.</param>
/// <param name="AllocatedBytes">Address space.</param>
/// <param name="FreedBytes">
/// Measured decrease of the memory in use: a GPU's, or the sidecar's resident memory, where pages never touched do not count.
/// </param>
/// <param name="FreeBytesBefore">Free on the GPU as its driver says, or on the machine.</param>
/// <param name="FreeBytesAfter">The same afterwards.</param>
/// <param name="HostBytes">Held by the host meanwhile, for weights that are kept.</param>
public readonly record struct FreedMemory(
    MemoryTags Tag, long AllocatedBytes, long FreedBytes, long FreeBytesBefore, long FreeBytesAfter, long HostBytes);

/// <param name="State">State of the engine now.</param>
/// <param name="Freed">Memory that was awake before and sleeps now.</param>
/// <param name="Asleep">All memory that sleeps now.</param>
public sealed record SleepResult(EngineState State, IReadOnlyList<FreedMemory> Freed, MemoryTags Asleep);

internal static class MemoryTagsExtensions
{
    public static IEnumerable<V1.MemoryTag> ToProto(this MemoryTags tags)
    {
        if (tags.HasFlag(MemoryTags.Weights))
            yield return V1.MemoryTag.Weights;
        if (tags.HasFlag(MemoryTags.KvCache))
            yield return V1.MemoryTag.KvCache;
    }

    public static MemoryTags From(IEnumerable<V1.MemoryTag> tags) => tags.Aggregate(MemoryTags.None, (all, tag) => all | From(tag));

    public static MemoryTags From(V1.MemoryTag tag) => tag switch
    {
        V1.MemoryTag.Weights => MemoryTags.Weights,
        V1.MemoryTag.KvCache => MemoryTags.KvCache,
        _ => throw new RolloutException($"the sidecar is newer than this client: unknown memory tag {(int)tag}"),
    };
}
