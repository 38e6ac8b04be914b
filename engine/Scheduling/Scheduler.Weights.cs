namespace Rollout.Engine;

/// <summary>What new weights, or the loss of all keys and values, do to the sequences that have not ended.</summary>
public sealed partial class Scheduler
{
    /// <summary>New weights are in force from the next step on.</summary>
    internal void WeightsChanged(ulong version, UpdatePolicy policy)
    {
        Version = version;
        EndStale(policy);
        for (int i = _running.Count - 1; i >= 0; i--)
        {
            Sequence sequence = _running[i];
            if (Keeps(sequence, policy)) sequence.SingleVersionKv = false;
            else Preempt(i);
        }
    }

    /// <summary>Drops all keys and values: running sequences are preempted and recompute, and no prefix can be hit.</summary>
    internal void DropAllKv()
    {
        for (int i = _running.Count - 1; i >= 0; i--) Preempt(i);
        _blocks.ForgetCached();
    }

    /// <summary>Ends sequences whose oldest part is older than their request allows, before a step is spent on them.</summary>
    private void EndStale(UpdatePolicy policy)
    {
        // Collected first, because ending a sample changes both lists.
        List<Sequence> stale = [.. _running.Concat(_waiting).Where(sequence =>
            sequence.Group.Request.MaxStaleness is { } most && Version - OldestPart(sequence, policy) > (ulong)most)];
        foreach (Sequence sequence in stale)
        {
            End(sequence, FinishReason.Abort);
            WakeIfEnded(sequence.Group);
        }
    }

    /// <summary>Version of the oldest token of a sequence, or of the oldest keys and values it is going to keep.</summary>
    private ulong OldestPart(Sequence sequence, UpdatePolicy policy)
    {
        ulong oldest = sequence.Sampled > 0 ? sequence.Versions(0, 1)[0] : Version;
        return Keeps(sequence, policy) && sequence.Computed > 0 ? Math.Min(oldest, sequence.OldestKvVersion) : oldest;
    }

    /// <summary>Whether a sequence keeps its keys and values under new weights. A prompt is always scored under one version.</summary>
    private static bool Keeps(Sequence sequence, UpdatePolicy policy) => policy == UpdatePolicy.Keep && !sequence.IsScoring;
}
