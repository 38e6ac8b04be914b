namespace Rollout.Engine;

/// <summary>Memory that can be given back while the engine is idle.</summary>
[Flags]
public enum MemoryTags
{
    None = 0,

    /// <summary>The weights in service and the spare set.</summary>
    Weights = 1,

    /// <summary>Keys and values, cached prefixes included.</summary>
    KvCache = 2,

    All = Weights | KvCache,
}

/// <param name="Tag">One tag.</param>
/// <param name="AllocatedBytes">Address space.</param>
/// <param name="FreedBytes">
/// Measured decrease of the memory in use: a GPU's, or this process's, where pages never touched do not count.
/// </param>
/// <param name="FreeBytesBefore">Free on the device, or on the machine, as its driver says.</param>
/// <param name="FreeBytesAfter">The same afterwards.</param>
/// <param name="HostBytes">Of the host's memory, which keeps the content meanwhile.</param>
public readonly record struct FreedMemory(
    MemoryTags Tag, long AllocatedBytes, long FreedBytes, long FreeBytesBefore, long FreeBytesAfter, long HostBytes);

/// <summary>Sleep: gives memory back, so that a trainer on the same device can use it.</summary>
public sealed partial class RolloutEngine
{
    /// <summary>
    /// Frees the memory of those of these tags that are awake; completes when it is free. Weights that are not kept are discarded: after
    /// waking the engine is poisoned until a full update commits.
    /// </summary>
    /// <param name="tags">What to free.</param>
    /// <param name="keepWeights">Keep the weights in the host's memory, from which waking copies them back.</param>
    /// <exception cref="InvalidRequestException">Weights were to be kept, and none of them sleep, or the device is the host.</exception>
    /// <exception cref="NoRoomException">The host does not have enough memory to keep the weights; they stay awake.</exception>
    /// <exception cref="EngineStateException">
    /// Samples are in flight; while paused the KV cache alone may sleep, and the samples recompute after it. Or the weights were to sleep
    /// while an update is in progress.
    /// </exception>
    public Task<IReadOnlyList<FreedMemory>> SleepAsync(MemoryTags tags, bool keepWeights = false)
        => OnLoop<IReadOnlyList<FreedMemory>>(() =>
    {
        ThrowIfDown();
        ThrowUnlessCanKeep(tags, keepWeights);
        tags &= ~_asleep;
        bool frozen = _pause.State == EngineState.Paused && tags == MemoryTags.KvCache;
        if (tags != MemoryTags.None && !_scheduler.IsEmpty && !frozen)
        {
            throw new EngineStateException(State, $"{_scheduler.Running + _scheduler.Waiting} samples are in flight: pause with ABORT or "
                + "WAIT first (KEEP is enough for the KV cache alone)");
        }

        List<FreedMemory> freed = [];
        if (tags.HasFlag(MemoryTags.Weights)) freed.Add(Free(MemoryTags.Weights, () => _weights.Sleep(keepWeights, State)));
        if (tags.HasFlag(MemoryTags.KvCache))
        {
            _scheduler.DropAllKv();
            freed.Add(Free(MemoryTags.KvCache, () =>
            {
                _kv.Discard();
                return (_kv.Bytes, 0);
            }));
        }

        return freed;
    });

    /// <summary>Allocates the memory of those of these tags that sleep. Returns the tags that still sleep.</summary>
    /// <exception cref="NoRoomException">The device does not have enough memory; what could not be allocated stays asleep.</exception>
    public Task<MemoryTags> WakeUpAsync(MemoryTags tags) => OnLoop(() =>
    {
        ThrowIfDown();
        tags &= _asleep;
        try
        {
            if (tags.HasFlag(MemoryTags.KvCache))
            {
                _kv.Restore();
                _asleep &= ~MemoryTags.KvCache;
            }

            if (tags.HasFlag(MemoryTags.Weights))
            {
                _weights.Restore();
                _asleep &= ~MemoryTags.Weights;
            }

            if (_asleep == MemoryTags.None) Rehearse(_weights.Current);
        }
        catch (OutOfMemoryException e)
        {
            throw new NoRoomException($"the device has no memory for {tags & _asleep}: {e.Message}");
        }

        return _asleep;
    });

    private void ThrowUnlessCanKeep(MemoryTags tags, bool keepWeights)
    {
        if (!keepWeights || (tags.HasFlag(MemoryTags.Weights) && _weights.CanMoveToHost)) return;
        string problem = tags.HasFlag(MemoryTags.Weights)
            ? $"needs a device with memory of its own: on {Backend.Name} the weights are in the host's memory"
            : "keeps weights that are to sleep, and these are not";
        throw new InvalidRequestException(new([new Problem(nameof(keepWeights), problem)]));
    }

    private FreedMemory Free(MemoryTags tag, Func<(long Allocated, long OnHost)> free)
    {
        (long held, long available) = (Backend.HeldBytes, Backend.AvailableBytes);
        try
        {
            (long allocated, long onHost) = free();
            _asleep |= tag;
            return new FreedMemory(tag, allocated, Math.Max(0, held - Backend.HeldBytes), available, Backend.AvailableBytes, onHost);
        }
        catch (OutOfMemoryException e)
        {
            throw new NoRoomException($"{tag} stay awake: {e.Message}");
        }
    }
}
