using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>What has to have happened before a real step runs, so that no step pays for it.</summary>
public sealed partial class RolloutEngine
{
    /// <summary>One token through the model: whatever a backend takes at its first step, memory above all, it takes now and not when a trainer has the rest.</summary>
    private void RunOneToken()
    {
        StepLayout step = _next.Layout;
        (step.SequenceCount, step.RowStart[1], step.OutputCount, step.QueryCount) = (1, 1, 1, 1);
        step.Queries[0] = new SampleQuery { Target = -1, Temperature = 1, TopP = 1, Position = 1 };
        _transformer.Forward(step, _weights.Current, _kv); // into a block that nobody has
        _transformer.Sample(step, _weights.Current);
        Backend.FinishStep(step);
    }

    /// <summary>Goes through the backend's rehearsals with a set of weights that is about to serve, unless they have been gone through.</summary>
    private void Rehearse(WeightSet weights)
    {
        if (weights.IsRehearsed || _asleep.HasFlag(MemoryTags.KvCache)) return; // waking comes here again
        foreach (StepLayout step in Backend.Rehearsals(_plans[0].Layout)) Rehearse(step, weights);
        weights.IsRehearsed = true;
    }

    /// <summary>As above, one rehearsal between two steps, so that decoding goes on meanwhile. What is left undone a commit makes up for.</summary>
    internal async Task RehearseAsync(WeightSet weights)
    {
        if (weights.IsRehearsed) return;
        StepLayout[] steps = [.. Backend.Rehearsals(_plans[0].Layout)];
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
        _transformer.Forward(step, weights, _kv);
        _transformer.Sample(step, weights);
    }
}
