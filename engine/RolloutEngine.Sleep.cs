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
/// <param name="FreedBytes">Measured decrease of the memory that the process uses; pages never touched do not count.</param>
public readonly record struct FreedMemory(MemoryTags Tag, long AllocatedBytes, long FreedBytes);

/// <summary>Sleep: gives memory back, so that a trainer on the same device can use it.</summary>
public sealed partial class RolloutEngine
{
    /// <summary>
    /// Frees the memory of those of these tags that are awake; completes when it is free. Weights are discarded: after waking the engine is
    /// poisoned until a full update commits.
    /// </summary>
    /// <exception cref="EngineStateException">
    /// Samples are in flight; while paused the KV cache alone may sleep, and the samples recompute after it. Or the weights were to sleep
    /// while an update is in progress.
    /// </exception>
    public Task<IReadOnlyList<FreedMemory>> SleepAsync(MemoryTags tags) => OnLoop<IReadOnlyList<FreedMemory>>(() =>
    {
        ThrowIfDown();
        tags &= ~_asleep;
        bool frozen = _pause.State == EngineState.Paused && tags == MemoryTags.KvCache;
        if (tags != MemoryTags.None && !_scheduler.IsEmpty && !frozen)
        {
            throw new EngineStateException(State, $"{_scheduler.Running + _scheduler.Waiting} samples are in flight: pause with ABORT or "
                + "WAIT first (KEEP is enough for the KV cache alone)");
        }

        List<FreedMemory> freed = [];
        if (tags.HasFlag(MemoryTags.Weights)) freed.Add(Free(MemoryTags.Weights, () => _weights.Discard(State)));
        if (tags.HasFlag(MemoryTags.KvCache))
        {
            _scheduler.DropAllKv();
            freed.Add(Free(MemoryTags.KvCache, () =>
            {
                _kv.Discard();
                return _kv.Bytes;
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

    private FreedMemory Free(MemoryTags tag, Func<long> discard)
    {
        long before = Backend.HeldBytes;
        long allocated = discard();
        _asleep |= tag;
        return new FreedMemory(tag, allocated, Math.Max(0, before - Backend.HeldBytes));
    }
}
