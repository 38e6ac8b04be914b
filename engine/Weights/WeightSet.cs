using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>
/// All weights of a model on the device, in the fused form that its blocks use. An engine has one set in service and, while an update
/// is staged, a spare. A commit swaps the two references between steps.
/// </summary>
public sealed class WeightSet : IDisposable
{
    private readonly WeightArena _arena;
    private long _rehearsedBytes;
    private readonly ulong?[] _versions; // version of each weight's content; null while it is not known

    private WeightSet(WeightArena arena)
    {
        _arena = arena;
        _versions = new ulong?[arena.Weights.Count];
    }

    public long Bytes => _arena.Bytes;

    /// <summary>Whether the backend has run its <see cref="Backend.Rehearsals"/> with this set. Used by the loop only.</summary>
    internal bool IsRehearsed { get; set; }

    /// <summary>
    /// By how much the device's memory in use grew during the rehearsals: graphs that compute with this set. Written by the loop only.
    /// </summary>
    internal long RehearsedBytes { get => Volatile.Read(ref _rehearsedBytes); set => Volatile.Write(ref _rehearsedBytes, value); }

    public Weight this[WeightSlot slot] => _arena.Weights[slot.Index];

    /// <summary>In the order of <see cref="LoadPlan.Weights"/>.</summary>
    public IReadOnlyList<Weight> All => _arena.Weights;

    /// <summary>An optional weight; null where the model does not have it.</summary>
    public Weight? this[WeightSlot? slot] => slot is { } there ? this[there] : null;

    /// <summary>Allocates the memory; the content is written later.</summary>
    public static WeightSet Allocate(Backend backend, LoadPlan plan)
        => new(backend.AllocateWeights([.. plan.Weights.Select(weight => (weight.Outputs, weight.Inputs))]));

    /// <summary>The version of a weight's content; null while it is not known.</summary>
    public ulong? VersionOf(WeightSlot slot) => _versions[slot.Index];

    /// <summary>Records that a weight's content is of this version.</summary>
    public void Holds(WeightSlot slot, ulong version) => _versions[slot.Index] = version;

    /// <summary>Records that the content of every weight is of this version.</summary>
    public void HoldsAll(ulong version) => Array.Fill(_versions, version);

    /// <summary>Records that a weight is being written: its content is not known until <see cref="Holds"/>.</summary>
    public void Changing(WeightSlot slot) => _versions[slot.Index] = null;

    /// <summary>Weights whose content differs from the other set's.</summary>
    public IEnumerable<WeightSlot> NotHolding(WeightSet other)
    {
        for (int i = 0; i < _versions.Length; i++)
            if (other._versions[i] is { } version && _versions[i] != version) yield return new WeightSlot(i);
    }

    /// <summary>Frees the memory; the content is lost.</summary>
    public void Discard()
    {
        Array.Clear(_versions);
        _arena.Discard();
    }

    /// <inheritdoc cref="WeightArena.CanMoveToHost"/>
    public bool CanMoveToHost => _arena.CanMoveToHost;

    /// <inheritdoc cref="WeightArena.MoveToHost"/>
    public void MoveToHost() => _arena.MoveToHost();

    /// <summary>Allocates the memory again; its content is lost, or, after <see cref="MoveToHost"/>, as it was.</summary>
    /// <exception cref="OutOfMemoryException">The device does not have enough memory; nothing is allocated.</exception>
    public void Restore() => _arena.Restore();

    public void Dispose() => _arena.Dispose();
}
