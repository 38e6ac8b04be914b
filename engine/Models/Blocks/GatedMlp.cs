using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>down(silu(gate(x)) * up(x)).</summary>
internal sealed class GatedMlp : Block
{
    private readonly WeightSlot _gateUp;   // [2*width, hidden]: rows of gate, then up
    private readonly WeightSlot? _gateUpBias;
    private readonly WeightSlot _down;     // [hidden, width]
    private readonly WeightSlot? _downBias;
    private readonly TensorSlot _projected; // [rows, 2*width]
    private readonly TensorSlot _activated; // [rows, width]

    /// <inheritdoc cref="Attention(AttentionSpec, string, int, float, LoadPlan, WorkspacePlan)"/>
    public GatedMlp(GatedMlpSpec spec, string name, int hidden, LoadPlan weights, WorkspacePlan workspace)
    {
        int width = spec.Width;
        string mlp = $"{name}.mlp";
        _gateUp = weights.Matrix($"{name}.gate_up", hidden, ($"{mlp}.gate_proj.weight", width), ($"{mlp}.up_proj.weight", width));
        if (spec.Bias)
            _gateUpBias = weights.Vector($"{name}.gate_up_bias", ($"{mlp}.gate_proj.bias", width), ($"{mlp}.up_proj.bias", width));
        _down = weights.Matrix($"{name}.down", width, ($"{mlp}.down_proj.weight", hidden));
        if (spec.Bias) _downBias = weights.Vector($"{name}.down_bias", ($"{mlp}.down_proj.bias", hidden));

        _projected = workspace.Tensor("gate_up", 2 * width, rounded: true);
        _activated = workspace.Tensor("activated", width, rounded: true);
    }

    public override void Forward(in BlockCall call, Tensor input, Tensor output, bool add)
    {
        (Backend backend, WeightSet weights, Workspace workspace) = (call.Workspace.Backend, call.Weights, call.Workspace);
        (Tensor gateUp, Tensor activated) = (workspace[_projected], workspace[_activated]);
        backend.MatMul(input, weights[_gateUp], weights[_gateUpBias], gateUp, call.Rows);
        backend.GatedSilu(gateUp, activated, call.Rows);
        Project(call, activated, _down, _downBias, output, add);
    }
}
