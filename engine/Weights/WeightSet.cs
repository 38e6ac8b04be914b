using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>
/// All weights of a model on the device, in the fused form the transformer uses. An engine has one set in service and, while an update
/// is staged, a spare; a commit exchanges the two references between steps.
/// </summary>
public sealed class WeightSet : IDisposable
{
    private readonly WeightArena _arena;
    private readonly Dictionary<WeightSlot, Held> _weights = [];

    private WeightSet(WeightArena arena, int layers)
    {
        _arena = arena;
        Layers = new LayerWeights[layers];
    }

    public Weight Embedding { get; private set; } = null!;

    /// <summary>The embedding itself where the model ties the two.</summary>
    public Weight Head { get; private set; } = null!;

    public Weight FinalNorm { get; private set; } = null!;

    public LayerWeights[] Layers { get; }

    public long Bytes => _arena.Bytes;

    /// <summary>Whether the backend has gone through its <see cref="IBackend.Rehearsals"/> with this set. The loop's.</summary>
    internal bool IsRehearsed { get; set; }

    public Weight this[WeightSlot slot] => _weights[slot].Weight;

    /// <summary>Takes the memory; the contents come later.</summary>
    public static WeightSet Allocate(IBackend backend, LoadPlan plan, int layers)
    {
        WeightSet set = new(backend.AllocateWeights([.. plan.Weights.Select(shape => (shape.Outputs, shape.Inputs))]), layers);
        foreach ((WeightShape shape, Weight weight) in plan.Weights.Zip(set._arena.Weights)) set._weights.Add(shape.Slot, new Held(weight));
        set.Embedding = set.At(-1, WeightKind.Embedding)!;
        set.FinalNorm = set.At(-1, WeightKind.FinalNorm)!;
        set.Head = set.At(-1, WeightKind.Head) ?? set.Embedding;
        for (int layer = 0; layer < layers; layer++)
        {
            set.Layers[layer] = new LayerWeights
            {
                InputNorm = set.At(layer, WeightKind.InputNorm)!,
                Qkv = set.At(layer, WeightKind.Qkv)!,
                QkvBias = set.At(layer, WeightKind.QkvBias),
                QueryNorm = set.At(layer, WeightKind.QueryNorm),
                KeyNorm = set.At(layer, WeightKind.KeyNorm),
                AttentionOutput = set.At(layer, WeightKind.AttentionOutput)!,
                AttentionOutputBias = set.At(layer, WeightKind.AttentionOutputBias),
                PostAttentionNorm = set.At(layer, WeightKind.PostAttentionNorm)!,
                GateUp = set.At(layer, WeightKind.GateUp)!,
                GateUpBias = set.At(layer, WeightKind.GateUpBias),
                Down = set.At(layer, WeightKind.Down)!,
                DownBias = set.At(layer, WeightKind.DownBias),
            };
        }

        return set;
    }

    /// <summary>The version that brought what a weight holds; null while that is not known.</summary>
    public ulong? VersionOf(WeightSlot slot) => _weights[slot].Version;

    /// <summary>A weight holds what this version brought.</summary>
    public void Holds(WeightSlot slot, ulong version) => _weights[slot].Version = version;

    /// <summary>A weight is being written: what it holds is not known until <see cref="Holds"/>.</summary>
    public void Changing(WeightSlot slot) => _weights[slot].Version = null;

    /// <summary>Weights that do not hold what the other set's do.</summary>
    public IEnumerable<WeightSlot> NotHolding(WeightSet other)
        => _weights.Keys.Where(slot => other.VersionOf(slot) is { } version && VersionOf(slot) != version);

    /// <summary>Gives the memory back to the machine, contents lost.</summary>
    public void Discard()
    {
        foreach (Held held in _weights.Values) held.Version = null;
        _arena.Discard();
    }

    /// <summary>Takes the memory again.</summary>
    /// <exception cref="OutOfMemoryException">The device has not got it all; none is held.</exception>
    public void Restore() => _arena.Restore();

    public void Dispose() => _arena.Dispose();

    private Weight? At(int layer, WeightKind kind) => _weights.GetValueOrDefault(new WeightSlot(layer, kind))?.Weight;

    /// <summary>A weight, and the version that last changed it; null while what it holds is not known.</summary>
    private sealed class Held(Weight weight)
    {
        public Weight Weight => weight;

        public ulong? Version { get; set; }
    }
}

/// <summary>One block of the transformer. What a family does not have is null.</summary>
public sealed record LayerWeights
{
    public required Weight InputNorm { get; init; }

    /// <summary>[heads*headDim + 2*kvHeads*headDim, hidden], rows in the order q, k, v.</summary>
    public required Weight Qkv { get; init; }

    public Weight? QkvBias { get; init; }

    public Weight? QueryNorm { get; init; }

    public Weight? KeyNorm { get; init; }

    /// <summary>[hidden, heads*headDim].</summary>
    public required Weight AttentionOutput { get; init; }

    public Weight? AttentionOutputBias { get; init; }

    public required Weight PostAttentionNorm { get; init; }

    /// <summary>[2*intermediate, hidden], gate before up.</summary>
    public required Weight GateUp { get; init; }

    public Weight? GateUpBias { get; init; }

    /// <summary>[hidden, intermediate].</summary>
    public required Weight Down { get; init; }

    public Weight? DownBias { get; init; }
}
