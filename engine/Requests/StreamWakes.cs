using System.Diagnostics;

namespace Rollout.Engine;

/// <summary>
/// Wakes the readers of streams after steps. Waking a reader and sending and reading its reply cost tens of microseconds of CPU time, for
/// one token or for ten, which can exceed a short step. So the interval between two rounds grows with the cost of a round, and a reader
/// gets the tokens of several steps at once. After steps longer than the interval readers are woken every time. Owned by the loop.
/// </summary>
internal sealed class StreamWakes(int maxSequences)
{
    // Measured by the frames mode of perf/load, server and client together.
    private static readonly long s_ticksPerGroup = Stopwatch.Frequency / 50_000;
    private static readonly long s_ticksPerSample = Stopwatch.Frequency / 500_000;

    private readonly List<Group> _pending = new(maxSequences);
    private int _samples; // samples that got a token in this step
    private long _next;

    /// <summary>Records that a sample of a streaming group got a token.</summary>
    public void Add(Group group)
    {
        _samples++;
        if (group.IsWakePending) return;
        group.IsWakePending = true;
        _pending.Add(group);
    }

    /// <summary>Called after each step: wakes the readers if the interval is over.</summary>
    /// <param name="now">By <see cref="Stopwatch"/>.</param>
    public void EndStep(long now)
    {
        int samples = _samples;
        _samples = 0;
        if (_pending.Count == 0 || now < _next) return;
        _next = now + (_pending.Count * s_ticksPerGroup) + (samples * s_ticksPerSample);
        RaiseAll();
    }

    /// <summary>Wakes all pending readers at once, because no step may follow soon.</summary>
    public void RaiseAll()
    {
        foreach (Group group in _pending)
        {
            group.IsWakePending = false;
            group.Raise();
        }

        _pending.Clear();
    }
}
