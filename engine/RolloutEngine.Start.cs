using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>Work done before the first real step, so that no step pays for it.</summary>
public sealed partial class RolloutEngine
{
    /// <summary>
    /// Runs one token through the model, so that what a backend allocates at its first step is allocated now, and not after a trainer has
    /// allocated the rest of the memory.
    /// </summary>
    private void RunOneToken()
    {
        StepLayout step = _steps[0].Layout;
        (step.SequenceCount, step.RowStart[1], step.OutputCount, step.QueryCount) = (1, 1, 1, 1);
        step.Queries[0] = new SampleQuery { Target = -1, Temperature = 1, TopP = 1, Position = 1 };
        _transformer.Forward(step, _weights.Current, _kv, _workspace); // writes to a block that no sequence uses
        _transformer.Sample(step, _weights.Current, _workspace);
        Backend.FinishStep(step);
    }

    /// <summary>Runs the backend's rehearsals with a set of weights that is about to serve, unless they have run already.</summary>
    private void Rehearse(WeightSet weights)
    {
        if (weights.IsRehearsed || _asleep.HasFlag(MemoryTags.KvCache)) return; // called again on waking
        foreach (StepLayout step in Backend.Rehearsals(_steps[0].Layout)) Rehearse(step, weights);
        weights.IsRehearsed = true;
    }

    /// <summary>
    /// The same, with one rehearsal between two steps, so that decoding continues. A commit runs the rehearsals that were left out.
    /// </summary>
    internal async Task RehearseAsync(WeightSet weights)
    {
        if (weights.IsRehearsed) return;
        StepLayout[] steps = [.. Backend.Rehearsals(_steps[0].Layout)];
        for (int i = 0; i < steps.Length; i++)
        {
            bool last = i == steps.Length - 1;
            StepLayout step = steps[i];
            bool done = await OnLoop(() =>
            {
                if (_asleep != MemoryTags.None) return false;
                Rehearse(step, weights);
                weights.IsRehearsed |= last;
                return true;
            }).ConfigureAwait(false);
            if (!done) return;
        }
    }

    private void Rehearse(StepLayout step, WeightSet weights)
    {
        long before = Backend.HeldBytes;
        _transformer.Forward(step, weights, _kv, _workspace);
        _transformer.Sample(step, weights, _workspace);
        weights.RehearsedBytes += Math.Max(0, Backend.HeldBytes - before);
    }
}
