using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>A part of a layer: attention or feed-forward, without the norm and the residual around it.</summary>
internal abstract class Block
{
    /// <summary>output = the block of input, or output += it.</summary>
    /// <param name="call">The step.</param>
    /// <param name="input">[rows, hidden].</param>
    /// <param name="output">[rows, hidden]; not the input.</param>
    /// <param name="add">Whether <paramref name="output"/> is added to.</param>
    public abstract void Forward(in BlockCall call, Tensor input, Tensor output, bool add);

    /// <summary>The block's last projection: output = weight of input, or output += it.</summary>
    protected static void Project(in BlockCall call, Tensor input, WeightSlot weight, WeightSlot? bias, Tensor output, bool add)
    {
        Backend backend = call.Workspace.Backend;
        if (add) backend.MatMulAdd(input, call.Weights[weight], call.Weights[bias], output, call.Rows);
        else backend.MatMul(input, call.Weights[weight], call.Weights[bias], output, call.Rows);
    }
}

/// <summary>A block with its norm and residual: hidden += block(norm(hidden)), or hidden += norm(block(hidden)).</summary>
internal sealed class Sublayer
{
    private readonly NormPlacement _placement;
    private readonly float _epsilon;
    private readonly WeightSlot _norm; // [1, hidden]
    private readonly Block _block;
    private readonly TensorSlot _normed; // [rows, hidden]: what the block reads, or what it returns

    /// <param name="model">The model that it is a part of.</param>
    /// <param name="placement">Of the norm.</param>
    /// <param name="name">Of the norm, in the engine.</param>
    /// <param name="source">Of the norm, in a checkpoint.</param>
    /// <param name="weights">The plan that the norm is added to.</param>
    /// <param name="workspace">The plan that its tensor is added to.</param>
    /// <param name="block">Creates the block; called after the norm is declared, because weights lie in memory in that order.</param>
    public Sublayer(
        ModelSpec model, NormPlacement placement, string name, string source, LoadPlan weights, WorkspacePlan workspace, Func<Block> block)
    {
        _placement = placement;
        _epsilon = model.RmsNormEpsilon;
        _norm = weights.Vector(name, (source, model.HiddenSize));
        // A block's input is rounded as matrices are stored; what it returns is not.
        _normed = workspace.Tensor("normed", model.HiddenSize, rounded: placement == NormPlacement.BeforeBlock);
        _block = block();
    }

    public void Forward(in BlockCall call)
    {
        Backend backend = call.Workspace.Backend;
        Tensor normed = call.Workspace[_normed];
        if (_placement == NormPlacement.BeforeBlock)
        {
            backend.RmsNorm(call.Hidden, call.Weights[_norm], _epsilon, normed, call.Rows);
            _block.Forward(call, normed, call.Hidden, add: true);
        }
        else
        {
            _block.Forward(call, call.Hidden, normed, add: false);
            backend.RmsNormAdd(normed, call.Weights[_norm], _epsilon, call.Hidden, call.Rows);
        }
    }
}
