using System.Diagnostics.CodeAnalysis;

namespace Rollout.Engine;

/// <summary>The weights that the transformer computes with, some of them fused from several tensors of a checkpoint.</summary>
public enum WeightKind
{
    /// <summary>[vocab, hidden]. Also the output head of a tied model.</summary>
    Embedding,

    /// <summary>[1, hidden].</summary>
    FinalNorm,

    /// <summary>[vocab, hidden]; absent from a tied model.</summary>
    Head,

    /// <summary>[1, hidden], before attention.</summary>
    InputNorm,

    /// <summary>[heads*headDim + 2*kvHeads*headDim, hidden]: rows of q, then k, then v.</summary>
    Qkv,

    /// <summary>[1, heads*headDim + 2*kvHeads*headDim].</summary>
    QkvBias,

    /// <summary>[1, headDim].</summary>
    QueryNorm,

    /// <summary>[1, headDim].</summary>
    KeyNorm,

    /// <summary>[hidden, heads*headDim].</summary>
    AttentionOutput,

    /// <summary>[1, hidden].</summary>
    AttentionOutputBias,

    /// <summary>[1, hidden], before the MLP.</summary>
    PostAttentionNorm,

    /// <summary>[2*intermediate, hidden]: rows of gate, then up.</summary>
    GateUp,

    /// <summary>[1, 2*intermediate].</summary>
    GateUpBias,

    /// <summary>[hidden, intermediate].</summary>
    Down,

    /// <summary>[1, hidden].</summary>
    DownBias,
}

/// <summary>One weight of the model.</summary>
/// <param name="Layer">From 0; -1 for a weight outside the layers.</param>
/// <param name="Kind">Which of the layer's, or of the model's.</param>
public readonly record struct WeightSlot(int Layer, WeightKind Kind);

/// <summary>A weight's dimensions.</summary>
/// <param name="Slot">The weight.</param>
/// <param name="Outputs">1 for a vector.</param>
/// <param name="Inputs">Length of a row.</param>
public readonly record struct WeightShape(WeightSlot Slot, int Outputs, int Inputs);

/// <summary>Where a checkpoint tensor goes: whole, in order, without a transform.</summary>
/// <param name="Source">Name in the checkpoint.</param>
/// <param name="Shape">Shape it must have there.</param>
/// <param name="Slot">The weight it is a part of.</param>
/// <param name="FirstElement">Where its first element goes: output * inputs + input of the weight.</param>
/// <param name="Tied">
/// The tensor repeats the embedding of a tied model. Checkpoints and trainers' state dictionaries often hold both names of the one
/// parameter; as transformers does, the second is accepted (its shape must be right) and its bytes are not used. It is never required.
/// </param>
public sealed record LoadEntry(string Source, IReadOnlyList<long> Shape, WeightSlot Slot, long FirstElement, bool Tied = false)
{
    /// <summary>The number of elements.</summary>
    public long Elements { get; } = Shape.Aggregate(1L, (product, length) => product * length);

    /// <summary>Whether a tensor sent for it has its shape.</summary>
    public bool HasShape(IReadOnlyList<long> shape)
    {
        if (shape.Count != Shape.Count) return false;
        for (int i = 0; i < Shape.Count; i++)
            if (shape[i] != Shape[i]) return false;
        return true;
    }
}

/// <summary>
/// What becomes of every tensor of a checkpoint or weight update, compiled once from a <see cref="ModelSpec"/>. Every element of every
/// weight is covered exactly once by the entries that are not tied.
/// </summary>
public sealed class LoadPlan
{
    private readonly Dictionary<string, LoadEntry> _entries = [];
    private readonly List<WeightShape> _weights = [];

    private LoadPlan()
    {
    }

    /// <summary>All weights the model needs, in the order the transformer uses them.</summary>
    public IReadOnlyList<WeightShape> Weights => _weights;

    /// <summary>All source tensors, those of one weight together.</summary>
    public IReadOnlyCollection<LoadEntry> Entries => _entries.Values;

    /// <summary>Finds the entry of a source tensor, in constant time.</summary>
    public bool TryFind(string source, [MaybeNullWhen(false)] out LoadEntry entry) => _entries.TryGetValue(source, out entry);

    /// <summary>The entry of a source tensor that the model has.</summary>
    public LoadEntry this[string source] => _entries[source];

    /// <summary>The tensor that a tied one repeats.</summary>
    public LoadEntry OriginalOf(LoadEntry tied) => _entries.Values.First(entry => !entry.Tied && entry.Slot == tied.Slot);

    public static LoadPlan Compile(ModelSpec spec)
    {
        ArgumentNullException.ThrowIfNull(spec);
        var plan = new LoadPlan();
        var (hidden, query, keyValue) = (spec.HiddenSize, spec.Heads * spec.HeadDim, spec.KvHeads * spec.HeadDim);

        plan.Matrix(new(-1, WeightKind.Embedding), hidden, ("model.embed_tokens.weight", spec.VocabSize));
        for (var layer = 0; layer < spec.Layers; layer++)
        {
            var attention = $"model.layers.{layer}.self_attn";
            var mlp = $"model.layers.{layer}.mlp";
            WeightSlot Slot(WeightKind kind) => new(layer, kind);

            plan.Vector(Slot(WeightKind.InputNorm), ($"model.layers.{layer}.input_layernorm.weight", hidden));
            plan.Matrix(Slot(WeightKind.Qkv), hidden,
                ($"{attention}.q_proj.weight", query), ($"{attention}.k_proj.weight", keyValue), ($"{attention}.v_proj.weight", keyValue));
            if (spec.QkvBias)
            {
                plan.Vector(Slot(WeightKind.QkvBias),
                    ($"{attention}.q_proj.bias", query), ($"{attention}.k_proj.bias", keyValue), ($"{attention}.v_proj.bias", keyValue));
            }
            if (spec.QueryKeyNorm)
            {
                plan.Vector(Slot(WeightKind.QueryNorm), ($"{attention}.q_norm.weight", spec.HeadDim));
                plan.Vector(Slot(WeightKind.KeyNorm), ($"{attention}.k_norm.weight", spec.HeadDim));
            }
            plan.Matrix(Slot(WeightKind.AttentionOutput), query, ($"{attention}.o_proj.weight", hidden));
            if (spec.OutputBias)
                plan.Vector(Slot(WeightKind.AttentionOutputBias), ($"{attention}.o_proj.bias", hidden));

            plan.Vector(Slot(WeightKind.PostAttentionNorm), ($"model.layers.{layer}.post_attention_layernorm.weight", hidden));
            plan.Matrix(Slot(WeightKind.GateUp), hidden,
                ($"{mlp}.gate_proj.weight", spec.IntermediateSize), ($"{mlp}.up_proj.weight", spec.IntermediateSize));
            if (spec.MlpBias)
            {
                plan.Vector(Slot(WeightKind.GateUpBias),
                    ($"{mlp}.gate_proj.bias", spec.IntermediateSize), ($"{mlp}.up_proj.bias", spec.IntermediateSize));
            }
            plan.Matrix(Slot(WeightKind.Down), spec.IntermediateSize, ($"{mlp}.down_proj.weight", hidden));
            if (spec.MlpBias)
                plan.Vector(Slot(WeightKind.DownBias), ($"{mlp}.down_proj.bias", hidden));
        }
        plan.Vector(new(-1, WeightKind.FinalNorm), ("model.norm.weight", hidden));
        if (spec.TiedHead)
            plan.Add(new LoadEntry("lm_head.weight", [spec.VocabSize, hidden], new(-1, WeightKind.Embedding), 0, Tied: true));
        else
            plan.Matrix(new(-1, WeightKind.Head), hidden, ("lm_head.weight", spec.VocabSize));
        return plan;
    }

    /// <summary>A weight whose rows are those of the sources, one below the other.</summary>
    private void Matrix(WeightSlot slot, int inputs, params ReadOnlySpan<(string Name, int Outputs)> sources)
    {
        var outputs = 0;
        foreach (var (name, rows) in sources)
        {
            Add(new LoadEntry(name, [rows, inputs], slot, (long)outputs * inputs));
            outputs += rows;
        }
        _weights.Add(new WeightShape(slot, outputs, inputs));
    }

    /// <summary>A vector made of the sources, one after the other.</summary>
    private void Vector(WeightSlot slot, params ReadOnlySpan<(string Name, int Length)> sources)
    {
        var inputs = 0;
        foreach (var (name, length) in sources)
        {
            Add(new LoadEntry(name, [length], slot, inputs));
            inputs += length;
        }
        _weights.Add(new WeightShape(slot, 1, inputs));
    }

    private void Add(LoadEntry entry) => _entries.Add(entry.Source, entry);
}
