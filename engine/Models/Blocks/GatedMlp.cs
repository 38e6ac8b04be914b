using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>hidden += down(silu(gate(x)) * up(x)), x = norm(hidden).</summary>
internal sealed class GatedMlp
{
    private readonly float _epsilon;
    private readonly WeightSlot _norm;     // [1, hidden]
    private readonly WeightSlot _gateUp;   // [2*width, hidden]: rows of gate, then up
    private readonly WeightSlot? _gateUpBias;
    private readonly WeightSlot _down;     // [hidden, width]
    private readonly WeightSlot? _downBias;
    private readonly TensorSlot _normed;    // [rows, hidden]
    private readonly TensorSlot _projected; // [rows, 2*width]
    private readonly TensorSlot _activated; // [rows, width]

    /// <inheritdoc cref="Attention(ModelSpec, AttentionSpec, string, LoadPlan, WorkspacePlan)"/>
    public GatedMlp(ModelSpec model, GatedMlpSpec spec, string name, LoadPlan weights, WorkspacePlan workspace)
    {
        int hidden = model.HiddenSize, width = spec.Width;
        _epsilon = model.RmsNormEpsilon;
        string mlp = $"{name}.mlp";
        _norm = weights.Vector($"{name}.mlp_norm", ($"{name}.post_attention_layernorm.weight", hidden));
        _gateUp = weights.Matrix($"{name}.gate_up", hidden, ($"{mlp}.gate_proj.weight", width), ($"{mlp}.up_proj.weight", width));
        if (spec.Bias)
            _gateUpBias = weights.Vector($"{name}.gate_up_bias", ($"{mlp}.gate_proj.bias", width), ($"{mlp}.up_proj.bias", width));
        _down = weights.Matrix($"{name}.down", width, ($"{mlp}.down_proj.weight", hidden));
        if (spec.Bias) _downBias = weights.Vector($"{name}.down_bias", ($"{mlp}.down_proj.bias", hidden));

        _normed = workspace.Tensor("normed", hidden, rounded: true);
        _projected = workspace.Tensor("gate_up", 2 * width, rounded: true);
        _activated = workspace.Tensor("activated", width, rounded: true);
    }

    public void Forward(in BlockCall call)
    {
        (Backend backend, WeightSet weights, Workspace workspace) = (call.Workspace.Backend, call.Weights, call.Workspace);
        (Tensor normed, Tensor gateUp, Tensor activated) = (workspace[_normed], workspace[_projected], workspace[_activated]);
        backend.RmsNorm(call.Hidden, weights[_norm], _epsilon, normed, call.Rows);
        backend.MatMul(normed, weights[_gateUp], weights[_gateUpBias], gateUp, call.Rows);
        backend.GatedSilu(gateUp, activated, call.Rows);
        backend.MatMulAdd(activated, weights[_down], weights[_downBias], call.Hidden, call.Rows);
    }
}
