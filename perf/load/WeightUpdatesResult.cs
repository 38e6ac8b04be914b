namespace Rollout.Load;

/// <summary>Seconds, medians; the machine's own limits from the same run.</summary>
internal sealed record WeightUpdatesResult
{
    public required string Backend { get; init; }

    public required double FmaGflops { get; init; }

    public required double ReadGBps { get; init; }

    /// <summary>Of the payload.</summary>
    public required long Bytes { get; init; }

    /// <summary>Copying the same number of bytes on all cores.</summary>
    public required double Memcpy { get; init; }

    /// <summary>Staged over shared memory, nothing generating: from the first payload message to the commit's answer.</summary>
    public required double SharedMemory { get; init; }

    /// <summary>The same while sequences decode: how long no step could run, as reported by the server.</summary>
    public required double Stall { get; init; }

    /// <summary>One decode step of those sequences without an update.</summary>
    public required double Step { get; init; }

    /// <summary>In place over shared memory: how long no step could run. Null: see <see cref="NoInPlace"/>.</summary>
    public required double? InPlace { get; init; }

    /// <summary>Why nothing was measured in place.</summary>
    public required string? NoInPlace { get; init; }

    /// <summary>Staged by chunks over gRPC on a Unix socket: from the first chunk to the commit's answer.</summary>
    public required double Inline { get; init; }

    /// <summary>The same number of bytes through a bare Unix socket.</summary>
    public required double Socket { get; init; }

    /// <summary>As <see cref="SharedMemory"/>, while sequences decode.</summary>
    public required double SharedMemoryLoaded { get; init; }

    /// <summary>Longest wait for a step's tokens around the swap, beyond the usual one, as the client saw it.</summary>
    public required double CommitGap { get; init; }

    /// <summary>As <see cref="CommitGap"/>, while the payload was being read: the cost of sharing the cores.</summary>
    public required double TransferGap { get; init; }
}
