namespace Rollout.Client;

public sealed partial class RolloutClient
{
    /// <summary>Log-probabilities of given tokens under the current weights: for a teacher, a reference policy or evaluation.</summary>
    /// <param name="input">Token ids (<c>int[]</c>) or text (<c>string</c>).</param>
    /// <param name="top">Alternatives to report at every position.</param>
    /// <param name="cacheSalt">Requests with different salts never share cached keys and values.</param>
    /// <exception cref="RolloutRequestException">The input cannot be scored; lists everything wrong with it.</exception>
    public async Task<ScoreResult> ScoreAsync(
        Prompt input, int top = 0, string cacheSalt = "", TimeSpan? timeout = null, CancellationToken cancellationToken = default)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(top);
        V1.ScoreRequest request = new() { RequestId = Guid.NewGuid().ToString("n"), Top = (uint)top, CacheSalt = cacheSalt };
        if (input.Ids is { } ids)
            request.Ids = ids.ToTokenIds();
        else
            request.Text = input.Text;
        V1.ScoreReply reply = await CallAsync(
            options => _rollout.ScoreAsync(request, options), timeout ?? DefaultWorkTimeout, cancellationToken);
        return new ScoreResult(reply.Ids.ToInts(), reply.Logprobs.ToFloats(), TopLogProbs.From(reply.Top), reply.Version);
    }

    /// <summary>Ends groups early. Their callers get the partial tokens with <see cref="FinishReason.Abort"/>.</summary>
    public Task<AbortResult> AbortAsync(
        IEnumerable<string> requestIds, TimeSpan? timeout = null, CancellationToken cancellationToken = default)
    {
        V1.AbortRequest request = new() { Ids = new V1.RequestIds() };
        request.Ids.Ids.AddRange(requestIds);
        return AbortAsync(request, timeout, cancellationToken);
    }

    /// <summary>Ends every group in flight, of all callers.</summary>
    public Task<AbortResult> AbortAllAsync(TimeSpan? timeout = null, CancellationToken cancellationToken = default) =>
        AbortAsync(new V1.AbortRequest { All = true }, timeout, cancellationToken);

    /// <summary>What the sidecar is doing. Answers at once, also during an update.</summary>
    public async Task<SidecarStatus> StatusAsync(TimeSpan? timeout = null, CancellationToken cancellationToken = default)
    {
        V1.StatusReply reply = await CallAsync(
            options => _control.StatusAsync(new V1.StatusRequest(), options), timeout ?? DefaultControlTimeout, cancellationToken);
        return SidecarStatus.From(reply);
    }

    /// <summary>Returns once no step runs any more.</summary>
    /// <param name="owner">Shown in the status while paused.</param>
    /// <param name="lease">The pause expires after this, so that a dead owner does not block the sidecar; pausing again renews it.</param>
    /// <param name="timeout">Null: the lease, at least <see cref="DefaultControlTimeout"/>.</param>
    public async Task<PauseResult> PauseAsync(
        PauseMode mode, string owner, TimeSpan lease, TimeSpan? timeout = null, CancellationToken cancellationToken = default)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(lease, TimeSpan.FromMilliseconds(1));
        ArgumentOutOfRangeException.ThrowIfGreaterThan(lease.TotalMilliseconds, uint.MaxValue, nameof(lease));
        V1.PauseRequest request = new()
        {
            Mode = mode switch
            {
                PauseMode.Abort => V1.PauseMode.Abort,
                PauseMode.Wait => V1.PauseMode.Wait,
                PauseMode.Keep => V1.PauseMode.Keep,
                _ => throw new ArgumentOutOfRangeException(nameof(mode), mode, null),
            },
            Owner = owner,
            LeaseMilliseconds = (uint)lease.TotalMilliseconds,
        };
        TimeSpan wait = timeout ?? (lease > DefaultControlTimeout ? lease : DefaultControlTimeout);
        V1.PauseReply reply = await CallAsync(options => _control.PauseAsync(request, options), wait, cancellationToken);
        return new PauseResult(SidecarStatus.From(reply.State), (int)reply.AbortedSamples);
    }

    /// <summary>Ends a pause. Does nothing where there is none.</summary>
    public async Task<EngineState> ResumeAsync(TimeSpan? timeout = null, CancellationToken cancellationToken = default)
    {
        V1.ResumeReply reply = await CallAsync(
            options => _control.ResumeAsync(new V1.ResumeRequest(), options), timeout ?? DefaultControlTimeout, cancellationToken);
        return SidecarStatus.From(reply.State);
    }

    /// <summary>
    /// Makes the sidecar give memory back, for a trainer on the same machine, and returns when it is free. No sample may be in flight; the
    /// KV cache alone may also sleep while paused.
    /// </summary>
    /// <param name="tags">Memory that sleeps already is not affected.</param>
    /// <param name="keepWeights">
    /// Copy the weights to the host's memory first; waking copies them back, so that no push is needed. On a GPU only.
    /// </param>
    /// <param name="timeout">Default: 30 seconds.</param>
    /// <param name="cancellationToken">Gives up waiting; the sidecar may sleep all the same.</param>
    /// <exception cref="RolloutStateException">Samples are in flight, or a weight update is in progress.</exception>
    /// <exception cref="RolloutBusyException">The host does not have enough memory to keep the weights; they stay awake.</exception>
    public async Task<SleepResult> SleepAsync(MemoryTags tags = MemoryTags.All, bool keepWeights = false, TimeSpan? timeout = null,
        CancellationToken cancellationToken = default)
    {
        ThrowIfNone(tags);
        V1.SleepRequest request = new() { Tags = { tags.ToProto() }, KeepWeights = keepWeights };
        V1.SleepReply reply = await CallAsync(
            options => _control.SleepAsync(request, options), timeout ?? DefaultControlTimeout, cancellationToken);
        return new SleepResult(
            SidecarStatus.From(reply.State),
            [.. reply.Freed.Select(freed => new FreedMemory(
                MemoryTagsExtensions.From(freed.Tag), (long)freed.AllocatedBytes, (long)freed.FreedBytes, (long)freed.FreeBytesBefore,
                (long)freed.FreeBytesAfter, (long)freed.HostBytes))],
            MemoryTagsExtensions.From(reply.Asleep));
    }

    /// <summary>Allocates memory that sleeps. After weights have slept that were not kept, a full push is needed before sampling.</summary>
    /// <returns>The tags that still sleep.</returns>
    public async Task<MemoryTags> WakeUpAsync(
        MemoryTags tags = MemoryTags.All, TimeSpan? timeout = null, CancellationToken cancellationToken = default)
    {
        ThrowIfNone(tags);
        V1.WakeUpRequest request = new() { Tags = { tags.ToProto() } };
        V1.WakeUpReply reply = await CallAsync(
            options => _control.WakeUpAsync(request, options), timeout ?? DefaultControlTimeout, cancellationToken);
        return MemoryTagsExtensions.From(reply.Asleep);
    }

    /// <summary>Names, shapes, types and digests of the weights being served, as an update would send them.</summary>
    public async Task<WeightsDescription> DescribeWeightsAsync(TimeSpan? timeout = null, CancellationToken cancellationToken = default)
    {
        V1.DescribeReply reply = await CallAsync(
            options => Weights.DescribeAsync(new V1.DescribeRequest(), options), timeout ?? DefaultControlTimeout, cancellationToken);
        return WeightsDescription.From(reply);
    }

    // On the wire, no tag means all tags.
    private static void ThrowIfNone(MemoryTags tags)
    {
        if (tags is MemoryTags.None or > MemoryTags.All)
            throw new ArgumentOutOfRangeException(nameof(tags), tags, null);
    }

    private async Task<AbortResult> AbortAsync(V1.AbortRequest request, TimeSpan? timeout, CancellationToken cancellationToken)
    {
        V1.AbortReply reply = await CallAsync(
            options => _rollout.AbortAsync(request, options), timeout ?? DefaultControlTimeout, cancellationToken);
        return new AbortResult((int)reply.Groups, (int)reply.Samples, [.. reply.Unknown]);
    }
}
