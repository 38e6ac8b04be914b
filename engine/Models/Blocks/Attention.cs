using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>output(attention(qkv(x))), with grouped queries, rotary positions and paged keys and values.</summary>
internal sealed class Attention : Block
{
    private readonly AttentionSpec _spec;
    private readonly float _epsilon;
    private readonly WeightSlot _qkv;        // [heads*headDim + 2*kvHeads*headDim, hidden]: rows of q, then k, then v
    private readonly WeightSlot? _qkvBias;
    private readonly WeightSlot? _queryNorm; // [1, headDim], or [1, heads*headDim]
    private readonly WeightSlot? _keyNorm;   // [1, headDim], or [1, kvHeads*headDim]
    private readonly WeightSlot _output;     // [hidden, heads*headDim]
    private readonly WeightSlot? _outputBias;
    private readonly TensorSlot _projected;  // [rows, heads*headDim + 2*kvHeads*headDim]
    private readonly TensorSlot _attended;   // [rows, heads*headDim]
    private readonly RopeSlot _rope;

    /// <param name="spec">The block.</param>
    /// <param name="name">Of the layer, in a checkpoint: "model.layers.0".</param>
    /// <param name="hidden">Width of the residual stream.</param>
    /// <param name="epsilon">Of norms.</param>
    /// <param name="weights">The plan that the block's weights are added to.</param>
    /// <param name="workspace">The plan that its tensors are added to.</param>
    public Attention(AttentionSpec spec, string name, int hidden, float epsilon, LoadPlan weights, WorkspacePlan workspace)
    {
        int queries = spec.QueryWidth, keysValues = spec.KvWidth;
        _spec = spec;
        _epsilon = epsilon;
        string self = $"{name}.self_attn";
        _qkv = weights.Matrix($"{name}.qkv", hidden,
            ($"{self}.q_proj.weight", queries), ($"{self}.k_proj.weight", keysValues), ($"{self}.v_proj.weight", keysValues));
        if (spec.QkvBias)
        {
            _qkvBias = weights.Vector($"{name}.qkv_bias",
                ($"{self}.q_proj.bias", queries), ($"{self}.k_proj.bias", keysValues), ($"{self}.v_proj.bias", keysValues));
        }

        if (spec.QueryKeyNorm != QueryKeyNorm.None)
        {
            bool each = spec.QueryKeyNorm == QueryKeyNorm.EachHead;
            _queryNorm = weights.Vector($"{name}.query_norm", ($"{self}.q_norm.weight", each ? spec.HeadDim : queries));
            _keyNorm = weights.Vector($"{name}.key_norm", ($"{self}.k_norm.weight", each ? spec.HeadDim : keysValues));
        }

        _output = weights.Matrix($"{name}.attention_output", queries, ($"{self}.o_proj.weight", hidden));
        if (spec.OutputBias) _outputBias = weights.Vector($"{name}.attention_output_bias", ($"{self}.o_proj.bias", hidden));

        _projected = workspace.Tensor("qkv", queries + 2 * keysValues);
        _attended = workspace.Tensor("attended", queries, rounded: true);
        _rope = workspace.Rope(spec.Rope, spec.HeadDim);
    }

    public override void Forward(in BlockCall call, Tensor input, Tensor output, bool add)
    {
        (Backend backend, WeightSet weights, Workspace workspace) = (call.Workspace.Backend, call.Weights, call.Workspace);
        (Tensor qkv, Tensor attended) = (workspace[_projected], workspace[_attended]);
        backend.MatMul(input, weights[_qkv], weights[_qkvBias], qkv, call.Rows);
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
        Project(call, attended, _output, _outputBias, output, add);
    }
}
