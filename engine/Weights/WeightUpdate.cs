using System.Diagnostics;
using System.IO.Hashing;
using Rollout.Kernels;
using Rollout.Kernels.Cuda;

namespace Rollout.Engine;

/// <summary>
/// One transaction: the tensors of a manifest are written to a weight set, and a commit between two steps puts it in service.
/// <code>
///   BeginUpdate -> Open -> ReadFrom* -> Commit      staged: bytes go to the spare set, the commit swaps the two
///       |           |          |                    in place: Open stops the loop, bytes go to the set in service
///       +-----------+----------+--> End, Dispose    staged, or in place before a byte: the old weights stay
///                                                   in place after a byte: poisoned
/// </code>
/// Used by one thread at a time, except that all may open it, and each read a part of its own. It may end when none is being read.
/// </summary>
public sealed class WeightUpdate : IDisposable
{
    private readonly RolloutEngine _engine;
    private readonly ActiveUpdate _active;
    private readonly IncomingTensor[] _incoming;
    private readonly SemaphoreSlim _opening = new(1);
    private readonly double _preflightSeconds;
    private readonly CudaCounts _before;
    private readonly long _ready = Stopwatch.GetTimestamp();
    private volatile bool _open;
    private Task _rehearsed = Task.CompletedTask;
    private UpdateFailure? _failed;
    private volatile string _reason = "";
    private volatile bool _stopped; // during a read
    private volatile bool _ended;

    /// <param name="engine">Runs the update's actions between two steps.</param>
    /// <param name="update">The update, which has begun.</param>
    /// <param name="plan">Where each tensor goes.</param>
    /// <param name="preflightSeconds">Duration of the preflight.</param>
    /// <param name="before">What the device had done before it.</param>
    internal WeightUpdate(RolloutEngine engine, ActiveUpdate update, LoadPlan plan, double preflightSeconds, CudaCounts before)
    {
        _before = before;
        _engine = engine;
        _active = update;
        _preflightSeconds = preflightSeconds;
        _incoming = [.. Manifest.Tensors.Select(
            tensor => new IncomingTensor(tensor, plan[tensor.Name], engine.Backend, update.Destination))];
        Parts = [.. Enumerable.Range(0, 1 + Manifest.JoinedPayloadBytes.Count).Select(
            part => new UpdatePart(this, part, [.. _incoming.Where((_, i) => Manifest.Tensors[i].Part == part)]))];
    }

    public UpdateManifest Manifest => _active.Manifest;

    /// <summary>Staged or in place.</summary>
    public UpdateMode Mode => _active.Mode;

    /// <summary>Memory of the spare set; 0 in place.</summary>
    public long StagingBytes => Mode == UpdateMode.Staged ? _active.Destination.Bytes : 0;

    /// <summary>At least one.</summary>
    public IReadOnlyList<UpdatePart> Parts { get; }

    /// <summary>The set that its bytes are written to.</summary>
    internal WeightSet Destination => _active.Destination;

    /// <summary>Whether the weights in service may contain bytes of it: ending without a commit then poisons the engine.</summary>
    public bool HasTouchedServedWeights => _active.HasTouchedServedWeights;

    /// <summary>
    /// Prepares the destination. In place: completes when no step runs any more, under DRAIN after every group that began has ended.
    /// Staged: copies what a partial update does not send into the spare set. May be called again.
    /// </summary>
    /// <exception cref="UpdateFailedException">Steps did not stop before <paramref name="cancellation"/>; nothing has happened.</exception>
    public async Task OpenAsync(CancellationToken cancellation = default)
    {
        ThrowIfOver();
        if (_open) return;
        await _opening.WaitAsync(cancellation).ConfigureAwait(false);
        try
        {
            ThrowIfOver();
            if (_open) return;
            if (Mode == UpdateMode.InPlace)
            {
                await _engine.StopStepsAsync(_active, cancellation).ConfigureAwait(false);
            }
            else
            {
                await Task.Run(() => _engine.PrepareStaging(_active), CancellationToken.None).ConfigureAwait(false);
                _rehearsed = _engine.RehearseAsync(_active.Destination); // while bytes are received
            }

            _open = true;
        }
        finally
        {
            _opening.Release();
        }
    }

    /// <summary>Puts the new weights in service between two steps and applies the manifest's policy to the samples in flight.</summary>
    /// <param name="expectedDigest">The combined digest the sender computed (see weights.proto); empty: not compared.</param>
    /// <param name="cancellation">
    /// Withdraws the commit if the engine has not carried it out, for example while draining. The task ends with the result where the
    /// weights were swapped, and with an exception where they never will be.
    /// </param>
    /// <exception cref="UpdateFailedException">Bytes are missing, the digest differs, or the commit was withdrawn.</exception>
    public async Task<CommitResult> CommitAsync(ReadOnlyMemory<byte> expectedDigest, CancellationToken cancellation = default)
    {
        await OpenAsync(cancellation).ConfigureAwait(false); // for an update without bytes
        IncomingTensor? missing = _incoming.FirstOrDefault(tensor => tensor.Taken < tensor.Bytes);
        if (missing is not null)
            throw Fail(UpdateFailure.Protocol, $"only {missing.Taken} of {missing.Bytes} bytes of tensor '{missing.Name}' have arrived");

        byte[][] digests = [.. _incoming.Select(tensor => tensor.Digest())];
        CheckTied(digests);
        byte[] digest = Combine(digests);
        if (!expectedDigest.IsEmpty && !expectedDigest.Span.SequenceEqual(digest))
        {
            throw Fail(UpdateFailure.Digest, $"the digest of what arrived is {Convert.ToHexStringLower(digest)}, the sender's is "
                + Convert.ToHexStringLower(expectedDigest.Span));
        }

        double transfer = Stopwatch.GetElapsedTime(_ready).TotalSeconds;
        // If it was cancelled or failed, the commit fails in the same way and reports it.
        await _rehearsed.WaitAsync(cancellation).ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);
        long committing = Stopwatch.GetTimestamp();
        ServedTensor[] sent = [.. _incoming.Select((tensor, i) => tensor.Served(digests[i]))];
        double stall = await _engine.CommitAsync(_active, sent, cancellation).ConfigureAwait(false);
        _ended = true;
        CommitResult result = new()
        {
            Version = Manifest.NewVersion,
            Digest = digest,
            PreflightSeconds = _preflightSeconds,
            TransferSeconds = transfer,
            ApplySeconds = Stopwatch.GetElapsedTime(0, _incoming.Sum(tensor => tensor.ApplyTicks)).TotalSeconds,
            SwapSeconds = Stopwatch.GetElapsedTime(committing).TotalSeconds,
            StallSeconds = stall,
            Counts = Count(),
        };
        _engine.Metrics.Committed(result, Manifest.PayloadBytes + Manifest.JoinedPayloadBytes.Sum());
        return result;
    }

    private UpdateCounts Count()
    {
        CudaCounts now = _engine.Backend.Peers?.Counts ?? default;
        long device = _incoming.Sum(tensor => tensor.TakenOnDevice);
        return new UpdateCounts
        {
            Launches = now.Launches - _before.Launches,
            DeviceAllocations = now.Allocations - _before.Allocations,
            GraphsCaptured = now.Graphs - _before.Graphs,
            DeviceBytes = device,
            HostBytes = _incoming.Sum(tensor => tensor.Bytes) - device,
        };
    }

    /// <summary>The combined digest of weights.proto: XXH3-128 over the tensors' digests in manifest order.</summary>
    public static byte[] Combine(IEnumerable<byte[]> digests)
    {
        XxHash128 hash = new();
        foreach (byte[] digest in digests) hash.Append(digest);
        return hash.GetCurrentHash();
    }

    /// <summary>Ends the update for this reason, unless it has already ended or failed for another.</summary>
    public void End(UpdateFailure why)
    {
        if (_ended) return;
        _ended = true;
        _failed ??= why;
        _engine.EndUpdate(_active, _failed.Value);
    }

    /// <summary>Ends the update. Does nothing after a commit.</summary>
    public void Dispose() => End(UpdateFailure.Sender);

    // ---- Checks.

    internal void ThrowUnlessOpen()
    {
        ThrowIfOver();
        if (!_open) throw new InvalidOperationException($"{nameof(OpenAsync)} comes first.");
    }

    /// <summary>Bytes are going to be written.</summary>
    internal void Touching() => _active.HasTouchedServedWeights |= Mode == UpdateMode.InPlace;

    /// <summary>A read ended half-way.</summary>
    internal void Stopped() => _stopped = true;

    /// <summary>A head sent along with the embedding it is tied to has no weight of its own: its bytes must be equal.</summary>
    private void CheckTied(byte[][] digests)
    {
        for (int i = 0; i < _incoming.Length; i++)
        {
            if (_incoming[i].Entry.TiedTo is not { } name) continue;
            long first = _incoming[i].FirstRow; // the original came in the same slices
            int original = Array.FindIndex(_incoming, other => other.Name == name && other.FirstRow == first);
            if (digests[original].AsSpan().SequenceEqual(digests[i])) continue;
            string tied = $"the model ties '{_incoming[i].Name}' to '{_incoming[original].Name}'";
            throw Fail(UpdateFailure.Digest, $"{tied}, but their bytes differ");
        }
    }

    internal UpdateFailedException Fail(UpdateFailure failure, string reason)
    {
        (_failed, _reason) = (failure, reason);
        return new UpdateFailedException(failure, reason);
    }

    private void ThrowIfOver()
    {
        if (_ended) throw new UpdateFailedException(_failed ?? UpdateFailure.Protocol, "the update is over");
        if (_failed is { } failed) throw new UpdateFailedException(failed, $"the update has failed and cannot go on: {_reason}");
        if (_stopped) throw new UpdateFailedException(UpdateFailure.Sender, "the update was stopped half-way and cannot go on");
    }
}
