using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>hidden += output(attention(qkv(norm(hidden)))), with grouped queries, rotary positions and paged keys and values.</summary>
internal sealed class Attention
{
    private readonly AttentionSpec _spec;
    private readonly float _epsilon;
    private readonly WeightSlot _norm;       // [1, hidden]
    private readonly WeightSlot _qkv;        // [heads*headDim + 2*kvHeads*headDim, hidden]: rows of q, then k, then v
    private readonly WeightSlot? _qkvBias;
    private readonly WeightSlot? _queryNorm; // [1, headDim]
    private readonly WeightSlot? _keyNorm;   // [1, headDim]
    private readonly WeightSlot _output;     // [hidden, heads*headDim]
    private readonly WeightSlot? _outputBias;
    private readonly TensorSlot _normed;     // [rows, hidden]
    private readonly TensorSlot _projected;  // [rows, heads*headDim + 2*kvHeads*headDim]
    private readonly TensorSlot _attended;   // [rows, heads*headDim]
    private readonly RopeSlot _rope;

    /// <param name="model">The model that the block is a part of.</param>
    /// <param name="spec">The block.</param>
    /// <param name="name">Of the layer, in a checkpoint: "model.layers.0".</param>
    /// <param name="weights">Takes what the block declares.</param>
    /// <param name="workspace">Takes what it needs to compute.</param>
    public Attention(ModelSpec model, AttentionSpec spec, string name, LoadPlan weights, WorkspacePlan workspace)
    {
        int hidden = model.HiddenSize, queries = spec.QueryWidth, keysValues = spec.KvWidth;
        _spec = spec;
        _epsilon = model.RmsNormEpsilon;
        string self = $"{name}.self_attn";
        _norm = weights.Vector($"{name}.attention_norm", ($"{name}.input_layernorm.weight", hidden));
        _qkv = weights.Matrix($"{name}.qkv", hidden,
            ($"{self}.q_proj.weight", queries), ($"{self}.k_proj.weight", keysValues), ($"{self}.v_proj.weight", keysValues));
        if (spec.QkvBias)
        {
            _qkvBias = weights.Vector($"{name}.qkv_bias",
                ($"{self}.q_proj.bias", queries), ($"{self}.k_proj.bias", keysValues), ($"{self}.v_proj.bias", keysValues));
        }

        if (spec.QueryKeyNorm)
        {
            _queryNorm = weights.Vector($"{name}.query_norm", ($"{self}.q_norm.weight", spec.HeadDim));
            _keyNorm = weights.Vector($"{name}.key_norm", ($"{self}.k_norm.weight", spec.HeadDim));
        }

        _output = weights.Matrix($"{name}.attention_output", queries, ($"{self}.o_proj.weight", hidden));
        if (spec.OutputBias) _outputBias = weights.Vector($"{name}.attention_output_bias", ($"{self}.o_proj.bias", hidden));

        _normed = workspace.Tensor("normed", hidden, rounded: true);
        _projected = workspace.Tensor("qkv", queries + 2 * keysValues);
        _attended = workspace.Tensor("attended", queries, rounded: true);
        _rope = workspace.Rope(spec.Rope, spec.HeadDim);
    }

    public void Forward(in BlockCall call)
    {
        (Backend backend, WeightSet weights, Workspace workspace) = (call.Workspace.Backend, call.Weights, call.Workspace);
        (Tensor normed, Tensor qkv, Tensor attended) = (workspace[_normed], workspace[_projected], workspace[_attended]);
        backend.RmsNorm(call.Hidden, weights[_norm], _epsilon, normed, call.Rows);
        backend.MatMul(normed, weights[_qkv], weights[_qkvBias], qkv, call.Rows);
        backend.Attention(new AttentionCall
        {
            Qkv = qkv,
            Heads = _spec.Heads,
            QueryNorm = weights[_queryNorm],
            KeyNorm = weights[_keyNorm],
            Epsilon = _epsilon,
            Rope = workspace[_rope],
            Scale = 1 / MathF.Sqrt(_spec.HeadDim),
            Cache = call.Kv,
            Layer = call.Layer,
            Output = attended,
        });
        backend.MatMulAdd(attended, weights[_output], weights[_outputBias], call.Hidden, call.Rows);
    }
}
