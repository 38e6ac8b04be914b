using System.Diagnostics;

namespace Rollout.Engine;

/// <summary>
/// Wakes the readers of streams after steps. Waking a reader, its reply and reading that reply cost tens of microseconds of some core, for
/// one token as for ten; where steps are short that would be more than the step. So the time between two rounds of waking grows with what
/// a round costs, and a reader finds the tokens of several steps. Steps longer than that wake after every one. The loop owns it.
/// </summary>
internal sealed class StreamWakes(int maxSequences)
{
    // As perf/load's frames measures it, server and client together.
    private static readonly long s_ticksPerGroup = Stopwatch.Frequency / 50_000;
    private static readonly long s_ticksPerSample = Stopwatch.Frequency / 500_000;

    private readonly List<Group> _held = new(maxSequences);
    private int _samples; // that got a token in this step
    private long _next;

    /// <summary>A sample of a streaming group has a token more.</summary>
    public void Add(Group group)
    {
        _samples++;
        if (group.WakeHeld) return;
        group.WakeHeld = true;
        _held.Add(group);
    }

    /// <summary>A step has ended: wakes the readers if it is time.</summary>
    /// <param name="now">By <see cref="Stopwatch"/>.</param>
    public void EndStep(long now)
    {
        int samples = _samples;
        _samples = 0;
        if (_held.Count == 0 || now < _next) return;
        _next = now + (_held.Count * s_ticksPerGroup) + (samples * s_ticksPerSample);
        RaiseAll();
    }

    /// <summary>No step may follow soon: nothing waits for it.</summary>
    public void RaiseAll()
    {
        foreach (Group group in _held)
        {
            group.WakeHeld = false;
            group.Raise();
        }

        _held.Clear();
    }
}
