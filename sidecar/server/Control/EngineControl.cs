using Rollout.Engine;
using Rollout.Server.Hosting;
using Rollout.Server.Weights;

namespace Rollout.Server.Control;

/// <summary>Pause, resume, sleep and wake-up in the engine's terms, with validation and logging.</summary>
internal sealed class EngineControl(EngineHost host, SharedSegment segment, ILogger<EngineControl> logger)
{
    private const int MaxOwner = 256;

    /// <summary>Returns once the pause is in force.</summary>
    /// <param name="mode">What happens to groups in flight.</param>
    /// <param name="owner">Shown in the status while paused.</param>
    /// <param name="lease">The pause expires after it.</param>
    /// <param name="alsoWrong">Problems that the caller has found already; listed with the others.</param>
    /// <param name="cancellation">Cancelled when the client disconnects.</param>
    /// <exception cref="InvalidRequestException">Lists everything wrong with the request, by the names of these parameters.</exception>
    public async Task<PauseResult> PauseAsync(
        PauseMode mode, string owner, TimeSpan lease, ProblemList alsoWrong, CancellationToken cancellation)
    {
        ProblemList problems = new(alsoWrong);
        if (lease == TimeSpan.Zero) problems.Add(new Problem(nameof(lease), "must be given: the pause ends by itself after it"));
        if (owner.Length > MaxOwner) problems.Add(new Problem(nameof(owner), $"at most {MaxOwner} characters, has {owner.Length}"));
        if (problems.Count > 0) throw new InvalidRequestException(problems);

        PauseResult result = await host.Engine.PauseAsync(mode, owner, lease, cancellation);
        Log.Paused(logger, mode.ToString(), owner, (uint)lease.TotalMilliseconds, result.AbortedSamples);
        return result;
    }

    /// <summary>Ends a pause, if there is one.</summary>
    public async Task<EngineState> ResumeAsync()
    {
        EngineState state = await host.Engine.ResumeAsync();
        Log.Resumed(logger);
        return state;
    }

    /// <summary>
    /// Frees the memory of these tags. Returns what each tag that was awake has freed, and the engine's state afterwards.
    /// </summary>
    /// <inheritdoc cref="RolloutEngine.SleepAsync"/>
    public async Task<(IReadOnlyList<FreedMemory> Freed, EngineStatus Status)> SleepAsync(MemoryTags tags, bool keepWeights)
    {
        IReadOnlyList<FreedMemory> freed = await host.Engine.SleepAsync(tags, keepWeights);
        EngineStatus status = host.Engine.Status;
        if (status.Asleep.HasFlag(MemoryTags.Weights)) segment.Discard();
        foreach (FreedMemory one in freed) Log.Slept(logger, one.Tag.ToString(), one.FreedBytes, one.AllocatedBytes, one.HostBytes);
        return (freed, status);
    }

    /// <summary>Allocates the memory of these tags again. Returns the tags that still sleep.</summary>
    public async Task<MemoryTags> WakeUpAsync(MemoryTags tags)
    {
        MemoryTags asleep = await host.Engine.WakeUpAsync(tags);
        Log.WokenUp(logger, asleep.ToString());
        return asleep;
    }
}
