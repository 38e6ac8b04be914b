using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>
/// All weights of a model on the device, in the fused form that its blocks use. An engine has one set in service and, while an update
/// is staged, a spare; a commit exchanges the two references between steps.
/// </summary>
public sealed class WeightSet : IDisposable
{
    private readonly WeightArena _arena;
    private readonly ulong?[] _versions; // that brought what each weight holds; null while that is not known

    private WeightSet(WeightArena arena)
    {
        _arena = arena;
        _versions = new ulong?[arena.Weights.Count];
    }

    public long Bytes => _arena.Bytes;

    /// <summary>Whether the backend has gone through its <see cref="Backend.Rehearsals"/> with this set. The loop's.</summary>
    internal bool IsRehearsed { get; set; }

    public Weight this[WeightSlot slot] => _arena.Weights[slot.Index];

    /// <summary>In the order of <see cref="LoadPlan.Weights"/>.</summary>
    public IReadOnlyList<Weight> All => _arena.Weights;

    /// <summary>A weight that not every model has.</summary>
    public Weight? this[WeightSlot? slot] => slot is { } there ? this[there] : null;

    /// <summary>Takes the memory; the contents come later.</summary>
    public static WeightSet Allocate(Backend backend, LoadPlan plan)
        => new(backend.AllocateWeights([.. plan.Weights.Select(weight => (weight.Outputs, weight.Inputs))]));

    /// <summary>The version that brought what a weight holds; null while that is not known.</summary>
    public ulong? VersionOf(WeightSlot slot) => _versions[slot.Index];

    /// <summary>A weight holds what this version brought.</summary>
    public void Holds(WeightSlot slot, ulong version) => _versions[slot.Index] = version;

    /// <summary>Every weight holds what this version brought.</summary>
    public void HoldsAll(ulong version) => Array.Fill(_versions, version);

    /// <summary>A weight is being written: what it holds is not known until <see cref="Holds"/>.</summary>
    public void Changing(WeightSlot slot) => _versions[slot.Index] = null;

    /// <summary>Weights that do not hold what the other set's do.</summary>
    public IEnumerable<WeightSlot> NotHolding(WeightSet other)
    {
        for (int i = 0; i < _versions.Length; i++)
            if (other._versions[i] is { } version && _versions[i] != version) yield return new WeightSlot(i);
    }

    /// <summary>Gives the memory back to the machine, contents lost.</summary>
    public void Discard()
    {
        Array.Clear(_versions);
        _arena.Discard();
    }

    /// <summary>Takes the memory again.</summary>
    /// <exception cref="OutOfMemoryException">The device does not have it all; none is held.</exception>
    public void Restore() => _arena.Restore();

    public void Dispose() => _arena.Dispose();
}
