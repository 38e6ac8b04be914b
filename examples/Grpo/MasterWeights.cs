using TorchSharp;
using TorchSharp.Modules;
using static TorchSharp.torch;

namespace Rollout.Examples.Grpo;

/// <summary>
/// The optimizer's own fp32 copy of the weights. The policy always holds these rounded to bf16, so that what the trainer computes with
/// and what it pushes are the same numbers; updates too small to show in bf16 still add up here.
/// </summary>
public sealed class MasterWeights : IDisposable
{
    private readonly Parameter[] _rounded;
    private readonly Parameter[] _masters;
    private readonly AdamW _optimizer;

    public MasterWeights(Policy policy)
    {
        _rounded = [.. policy.parameters()];
        _masters = [.. _rounded.Select(p => new Parameter(p.detach().clone()))];
        _optimizer = optim.AdamW(_masters, beta1: 0.9, beta2: 0.99, weight_decay: 0);
        Round();
    }

    /// <summary>One optimizer step from the gradients the policy holds now; they are cleared.</summary>
    /// <returns>The gradients' norm before it was clipped to 1.</returns>
    public double Step(double learningRate)
    {
        double norm = nn.utils.clip_grad_norm_(_rounded, 1);
        foreach (optim.ILearningRateController? group in _optimizer.ParamGroups)
            group.LearningRate = learningRate;
        using (DisposeScope scope = NewDisposeScope())
        {
            foreach ((Parameter rounded, Parameter master) in _rounded.Zip(_masters))
                master.grad = rounded.grad;
            using (no_grad())
                _optimizer.step();
            foreach ((Parameter rounded, Parameter master) in _rounded.Zip(_masters))
                (rounded.grad, master.grad) = (null, null);
        }

        Round();
        return norm;
    }

    public void Dispose()
    {
        _optimizer.Dispose();
        foreach (Parameter master in _masters)
            master.Dispose();
    }

    private void Round()
    {
        using DisposeScope scope = NewDisposeScope();
        using IDisposable _ = no_grad();
        foreach ((Parameter rounded, Parameter master) in _rounded.Zip(_masters))
            rounded.copy_(master.to(bfloat16));
    }
}
