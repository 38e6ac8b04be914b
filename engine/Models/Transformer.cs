using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>
/// A model as its blocks: embed, then attention and feed-forward of every layer, then norm and head. It declares what it needs of weights,
/// keys and values, and workspace, and holds no memory itself.
/// </summary>
public sealed class Transformer
{
    private readonly float _epsilon;
    private readonly (Sublayer Attention, Sublayer FeedForward)[] _layers;
    private readonly WeightSlot _embedding; // [vocab, hidden]
    private readonly WeightSlot _finalNorm; // [1, hidden]
    private readonly WeightSlot _head;      // [vocab, hidden]; the embedding where the model ties the two
    private readonly WorkspacePlan _workspace = new();
    private readonly TensorSlot _hidden;     // [rows, hidden]: the residual stream
    private readonly TensorSlot _lastHidden; // [output rows, hidden]
    private readonly TensorSlot _logits;     // [output rows, vocab]

    public Transformer(ModelSpec spec)
    {
        ArgumentNullException.ThrowIfNull(spec);
        LoadPlan weights = new();
        _epsilon = spec.RmsNormEpsilon;
        _hidden = _workspace.Tensor("hidden", spec.HiddenSize);
        _lastHidden = _workspace.OutputTensor("hidden", spec.HiddenSize);
        _logits = _workspace.OutputTensor("logits", spec.VocabSize);
        _embedding = weights.Matrix("embedding", spec.HiddenSize, ("model.embed_tokens.weight", spec.VocabSize));
        _layers = [.. spec.Layers.Select((layer, i) => Declare(spec, layer, $"model.layers.{i}", weights))];
        _finalNorm = weights.Vector("final_norm", ("model.norm.weight", spec.HiddenSize));
        _head = _embedding;
        if (spec.TiedHead) weights.Tie("lm_head.weight", "model.embed_tokens.weight");
        else _head = weights.Matrix("head", spec.HiddenSize, ("lm_head.weight", spec.VocabSize));
        Weights = weights;
        Kv = [.. spec.Layers.Select(layer => layer.Attention.Kv)];
    }

    private (Sublayer Attention, Sublayer FeedForward) Declare(ModelSpec spec, LayerSpec layer, string name, LoadPlan weights)
    {
        // The names differ by family: "post_attention" is the MLP's norm where norms come before a block.
        (string ofAttention, string ofMlp) = layer.Norms == NormPlacement.BeforeBlock
            ? ("input_layernorm", "post_attention_layernorm") : ("post_attention_layernorm", "post_feedforward_layernorm");
        return (
            Sublayer("attention_norm", ofAttention,
                () => new Attention(layer.Attention, name, spec.HiddenSize, spec.RmsNormEpsilon, weights, _workspace)),
            Sublayer("mlp_norm", ofMlp, () => new GatedMlp(layer.FeedForward, name, spec.HiddenSize, weights, _workspace)));

        Sublayer Sublayer(string norm, string source, Func<Block> block)
            => new(spec, layer.Norms, $"{name}.{norm}", $"{name}.{source}.weight", weights, _workspace, block);
    }

    /// <summary>The weights, and where every tensor of a checkpoint goes.</summary>
    public LoadPlan Weights { get; }

    /// <summary>What each layer keeps of every token.</summary>
    public IReadOnlyList<KvLayout> Kv { get; }

    /// <summary>Allocates the memory that forward passes need, apart from weights, keys and values.</summary>
    /// <param name="backend">Of the device.</param>
    /// <param name="maxRows">Most tokens in a step.</param>
    /// <param name="maxContext">Longest sequence.</param>
    public Workspace AllocateWorkspace(Backend backend, int maxRows, int maxContext) => _workspace.Allocate(backend, maxRows, maxContext);

    /// <summary>Computes keys and values of the step's tokens, and the hidden states that <see cref="Sample"/> reads.</summary>
    public void Forward(StepLayout step, WeightSet weights, KvCache kv, Workspace workspace)
    {
        Tensor hidden = workspace[_hidden];
        workspace.Backend.BeginStep(step);
        workspace.Backend.Embed(weights[_embedding], hidden);
        for (int layer = 0; layer < _layers.Length; layer++)
        {
            BlockCall call = new(workspace, weights, kv, layer, hidden, step.RowCount);
            _layers[layer].Attention.Forward(call);
            _layers[layer].FeedForward.Forward(call);
        }
    }

    /// <summary>Logits of the step's output rows, and the answers to its queries.</summary>
    public void Sample(StepLayout step, WeightSet weights, Workspace workspace)
    {
        Backend backend = workspace.Backend;
        (Tensor lastHidden, Tensor logits) = (workspace[_lastHidden], workspace[_logits]);
        for (int first = 0; first < step.OutputCount; first += logits.Rows)
        {
            int count = Math.Min(logits.Rows, step.OutputCount - first);
            backend.GatherRows(workspace[_hidden], first, count, lastHidden);
            backend.RmsNorm(lastHidden, weights[_finalNorm], _epsilon, lastHidden, count);
            backend.MatMul(lastHidden, weights[_head], null, logits, count);
            backend.Sample(logits, first, count);
        }
    }
}
