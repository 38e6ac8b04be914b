using System.Diagnostics;
using Google.Protobuf;
using Grpc.Core;

namespace Rollout.Client;

/// <summary>One push, from preflight to commit.</summary>
internal sealed class WeightPush(
    RolloutClient client,
    PayloadLayout layout,
    IReadOnlyList<TensorSource> tensors,
    PushOptions options,
    IPayloadSender sender)
{
    private static readonly TimeSpan s_resolvePoll = TimeSpan.FromMilliseconds(100);

    private readonly Stopwatch _clock = Stopwatch.StartNew();
    private double _lapsed;
    private readonly PayloadWriter _payload = new(layout, tensors, options.VerifyDigest);
    private bool _inPlace;
    private bool _commitSent;
    private SentBy _sent;

    public required ulong BaseVersion { get; init; }

    public required ulong NewVersion { get; init; }

    public required DateTime Deadline { get; init; }

    public required TimeSpan ResolveWithin { get; init; }

    /// <summary>Bytes of the sidecar's shared memory to request; 0 where none is used.</summary>
    public required long SegmentBytes { get; init; }

    public async Task<PushResult> RunAsync(CancellationToken cancellationToken)
    {
        UpdateCall call = new(client.Weights, new CallOptions(deadline: Deadline));
        await using (call)
        {
            try
            {
                return await RunAsync(call, cancellationToken);
            }
            catch (RpcException e) when (!_commitSent)
            {
                cancellationToken.ThrowIfCancellationRequested();
                // Only the sidecar knows whether bytes had been written in place.
                throw Broken(e, _inPlace ? UpdateOutcome.Unknown : UpdateOutcome.NotCommitted);
            }
            catch (Exception e) when (!_commitSent && e is not RolloutException)
            {
                await call.TryAbortAsync(e is OperationCanceledException ? "cancelled by the trainer" : e.Message);
                throw;
            }
        }
    }

    private async Task<PushResult> RunAsync(UpdateCall call, CancellationToken cancellationToken)
    {
        // :: Step 1: the sidecar accepts the manifest, before a byte is sent.
        await call.SendAsync(new V1.UpdateRequest { Begin = Begin() }, cancellationToken);
        V1.UpdateReply agreed = await UntilAsync(call, reply => reply.StepCase == V1.UpdateReply.StepOneofCase.Ready, cancellationToken);
        _inPlace = agreed.Ready.Mode == V1.UpdateMode.InPlace;
        PushTimings timings = new() { Preflight = Lap() };

        // :: Step 2: the bytes leave the trainer. If the sidecar ends the update meanwhile, this ends at once.
        using (CancellationTokenSource stop = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken, call.Ended))
        {
            try
            {
                _sent = await sender.SendAsync(call, _payload, agreed.Ready, stop.Token);
            }
            catch (OperationCanceledException) when (call.Ended.IsCancellationRequested)
            {
                await call.ThrowReasonAsync();
            }
        }

        timings = timings with { Write = Lap() };

        // :: Step 3: wait until the sidecar has read them. That keeps the commit, during which an answer may be lost, short.
        await call.ReceivedAsync(layout.PayloadBytes, cancellationToken);
        timings = timings with { Transfer = Lap() };

        // :: Step 4: commit. From here on only the deadline ends the wait.
        cancellationToken.ThrowIfCancellationRequested();
        byte[] digest = _sent.Hashed ? _payload.Digest() : [];
        _commitSent = true;
        V1.Committed committed;
        try
        {
            V1.Commit commit = new() { Digest = UnsafeByteOperations.UnsafeWrap(digest) };
            await call.SendAsync(new V1.UpdateRequest { Commit = commit });
            V1.UpdateReply reply = await UntilAsync(call, reply => reply.StepCase == V1.UpdateReply.StepOneofCase.Committed, default);
            committed = reply.Committed;
        }
        catch (RpcException e)
        {
            return await ResolveAsync(e, digest, timings);
        }

        V1.UpdateCounts counts = committed.Counts ?? new V1.UpdateCounts();

        // :: Step 5: check that the sidecar received what was sent.
        string received = WeightDigest.Show(committed.Digest.Span);
        ThrowIfDifferent(committed.Version, digest, received);
        return new PushResult
        {
            Version = committed.Version,
            Digest = received,
            Counts = new PushCounts(call.Sent, _sent.Buckets, (long)counts.HandlesOpened, (long)counts.Launches,
                (long)counts.DeviceAllocations, (long)counts.GraphsCaptured, (long)counts.DeviceBytes, (long)counts.HostBytes),
            PayloadBytes = layout.PayloadBytes,
            Transport = _sent.Transport,
            TransportReason = _sent.Reason,
            Mode = _inPlace ? UpdateMode.InPlace : UpdateMode.Staged,
            Timings = timings with
            {
                Commit = Lap(),
                Total = _clock.Elapsed.TotalSeconds,
                ServerTransfer = committed.Timings?.TransferSeconds ?? 0,
                ServerSwap = committed.Timings?.SwapSeconds ?? 0,
                ServerStall = committed.Timings?.StallSeconds ?? 0,
            },
        };
    }

    private V1.BeginUpdate Begin()
    {
        V1.BeginUpdate begin = new()
        {
            PayloadBytes = (ulong)layout.PayloadBytes,
            BaseVersion = BaseVersion,
            NewVersion = NewVersion,
            Policy = options.Policy switch
            {
                UpdatePolicy.Recompute => V1.UpdatePolicy.Recompute,
                UpdatePolicy.Keep => V1.UpdatePolicy.Keep,
                UpdatePolicy.Drain => V1.UpdatePolicy.Drain,
                UpdatePolicy.Abort => V1.UpdatePolicy.Abort,
                _ => throw new ArgumentException($"unknown policy {options.Policy}"),
            },
            Mode = options.Mode switch
            {
                UpdateMode.Auto => V1.UpdateMode.Unspecified,
                UpdateMode.Staged => V1.UpdateMode.Staged,
                UpdateMode.InPlace => V1.UpdateMode.InPlace,
                _ => throw new ArgumentException($"unknown mode {options.Mode}"),
            },
            Partial = options.Partial,
            SegmentBytes = (ulong)SegmentBytes,
            Owner = options.Owner,
            DeadlineMilliseconds = (uint)Math.Clamp((Deadline - DateTime.UtcNow).TotalMilliseconds, 1, uint.MaxValue),
        };
        begin.Manifest.AddRange(layout.Manifest);
        return begin;
    }

    private static async Task<V1.UpdateReply> UntilAsync(
        UpdateCall call, Func<V1.UpdateReply, bool> wanted, CancellationToken cancellationToken)
    {
        while (true)
        {
            V1.UpdateReply reply = await call.NextAsync(cancellationToken);
            if (wanted(reply))
                return reply;
        }
    }

    /// <summary>The connection broke after the commit was sent: only the sidecar knows whether it was carried out.</summary>
    private async Task<PushResult> ResolveAsync(RpcException cause, byte[] digest, PushTimings timings)
    {
        Stopwatch asking = Stopwatch.StartNew();
        while (asking.Elapsed < ResolveWithin)
        {
            try
            {
                SidecarStatus status = await client.StatusAsync(ResolveWithin - asking.Elapsed);
                if (status.Version == NewVersion)
                    return await ConfirmedAsync(cause, digest, timings, ResolveWithin - asking.Elapsed);
                if (status.Version != BaseVersion)
                    break; // Another trainer has pushed since, over ours or over the old one.
                if (status.State == EngineState.Poisoned)
                    throw Broken(cause, UpdateOutcome.Poisoned);
                if (!status.Updating)
                    throw Broken(cause, UpdateOutcome.NotCommitted);
            }
            catch (RolloutException e) when (e is RolloutUnavailableException or RolloutTimeoutException)
            {
                // It may be restarting, or only the connection is lost.
            }

            await Task.Delay(s_resolvePoll);
        }

        throw Broken(cause, UpdateOutcome.Unknown);
    }

    private async Task<PushResult> ConfirmedAsync(RpcException cause, byte[] digest, PushTimings timings, TimeSpan timeout)
    {
        // The same number may be another trainer's update; the digests distinguish them.
        WeightsDescription served = await client.DescribeWeightsAsync(timeout);
        if (served.Version != NewVersion)
            throw new RolloutUnavailableException($"version {NewVersion} has been replaced by {served.Version}");
        string received = CombinedDigest(served);
        if (digest.Length > 0 && received.Length > 0 && served.DigestAlgorithm != WeightDigest.Algorithm)
        {
            throw new WeightUpdateFailedException(
                $"version {NewVersion} is served, but whether it is this push is not known: the sidecar computes digests as "
                + $"'{served.DigestAlgorithm}', this client as '{WeightDigest.Algorithm}'", UpdateOutcome.Unknown, cause)
            {
                StatusCode = cause.StatusCode,
            };
        }

        if (received.Length > 0)
            ThrowIfDifferent(NewVersion, digest, received);
        return new PushResult
        {
            Version = NewVersion,
            Digest = received,
            PayloadBytes = layout.PayloadBytes,
            Transport = _sent.Transport,
            TransportReason = _sent.Reason,
            Mode = _inPlace ? UpdateMode.InPlace : UpdateMode.Staged,
            Timings = timings with { Commit = Lap(), Total = _clock.Elapsed.TotalSeconds },
            ConfirmedByStatus = true,
        };
    }

    /// <summary>
    /// Digest of our tensors as the sidecar serves them; "" where it does not know all of them, or where we sent single elements or
    /// slices: it describes whole tensors.
    /// </summary>
    private string CombinedDigest(WeightsDescription served)
    {
        if (layout.Manifest.Any(tensor => tensor.HasSparseCount || tensor.Rows > 0))
            return "";
        Dictionary<string, string> digests = served.Tensors.ToDictionary(tensor => tensor.Name, tensor => tensor.Digest);
        List<byte> all = new();
        foreach (V1.ManifestTensor tensor in layout.Manifest)
            all.AddRange(Convert.FromHexString(digests.GetValueOrDefault(tensor.Name, "")));
        return all.Count == layout.Manifest.Count * WeightDigest.Length ? WeightDigest.Show(WeightDigest.Combine([.. all])) : "";
    }

    private static void ThrowIfDifferent(ulong version, byte[] digest, string received)
    {
        string sent = WeightDigest.Show(digest);
        if (sent.Length > 0 && sent != received)
            throw new WeightDigestException(version, sent, received);
    }

    private WeightUpdateFailedException Broken(RpcException cause, UpdateOutcome outcome)
    {
        string what = cause.StatusCode == StatusCode.DeadlineExceeded
            ? $"it took longer than its timeout of {options.Timeout.TotalSeconds:0.###} s"
            : $"{cause.StatusCode}, {cause.Status.Detail}";
        string served = outcome switch
        {
            UpdateOutcome.NotCommitted => $"nothing has replaced version {BaseVersion}",
            UpdateOutcome.Poisoned => "the sidecar is poisoned until a full push ends well",
            _ when !_commitSent => "it was in place, and may have left the sidecar poisoned",
            _ => $"the sidecar did not say within {ResolveWithin.TotalSeconds:0.###} s whether version {NewVersion} is served",
        };
        return new WeightUpdateFailedException($"the update to version {NewVersion} broke off: {what}; {served}", outcome, cause)
        {
            StatusCode = cause.StatusCode,
        };
    }

    private double Lap()
    {
        double now = _clock.Elapsed.TotalSeconds;
        double lap = now - _lapsed;
        _lapsed = now;
        return lap;
    }
}
