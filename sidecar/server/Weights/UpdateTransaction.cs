using Google.Protobuf;
using Grpc.Core;
using Rollout.Engine;
using Rollout.Native;
using Rollout.Server.Grpc;
using Rollout.V1;

namespace Rollout.Server.Weights;

/// <summary>
/// One Weights.Update call, step by step as in weights.proto:
/// <code>
///   :: 1  Begin                    -> Ready | Rejected, and the call is over
///   :: 2  parts of the payload     -> Progress*
///   :: 3  Commit                   -> Committed
///   anything else, at any step: Failed or Aborted; the old weights stay, or, in place, the engine is poisoned
/// </code>
/// One deadline covers all of it, including waiting for the client. Disposing it ends the engine's update.
/// </summary>
internal sealed class UpdateTransaction(RolloutEngine engine, OpenUpdates updates, PartStream stream, ILogger logger) : IAsyncDisposable
{
    /// <summary>How long a client may take from opening the stream to begin.</summary>
    private static readonly TimeSpan s_beginWithin = TimeSpan.FromSeconds(30);

    private const uint DefaultDeadline = 600_000;

    private readonly CancellationTokenSource _over = new(); // for all streams of the update
    private WeightUpdate? _update;
    private OpenUpdate? _open; // where it has several parts
    private string _owner = "";
    private bool _committed;

    /// <summary>Runs the transaction to its end. Errors defined by the protocol are replies, not exceptions.</summary>
    /// <returns>The first message, where it joins another stream's update; then nothing has happened.</returns>
    public async Task<JoinUpdate?> RunAsync(CancellationToken client, CancellationToken stopping)
    {
        using CancellationTokenSource deadline = new(s_beginWithin);
        using CancellationTokenSource linked
            = CancellationTokenSource.CreateLinkedTokenSource(client, stopping, deadline.Token, _over.Token);
        string late = $"no begin within {s_beginWithin.TotalSeconds:0} s";
        try
        {
            // :: 1
            if (!await stream.MoveNextAsync(linked.Token)) throw PartStream.Failed("the client closed its side before begin");
            if (stream.Current.StepCase == UpdateRequest.StepOneofCase.Join) return stream.Current.Join;
            if (stream.Current.StepCase != UpdateRequest.StepOneofCase.Begin)
                throw PartStream.Failed($"the first message must be begin, not {PartStream.Name(stream.Current)}");
            BeginUpdate begin = stream.Current.Begin;
            uint milliseconds = begin.DeadlineMilliseconds == 0 ? DefaultDeadline : begin.DeadlineMilliseconds;
            deadline.CancelAfter(TimeSpan.FromMilliseconds(Math.Min(milliseconds, uint.MaxValue - 1)));
            late = $"the deadline of {milliseconds} ms for the whole update passed";
            _owner = begin.Owner;
            (UpdateManifest manifest, ProblemList problems) = ManifestConverter.Convert(begin);
            _update = engine.BeginUpdate(manifest, problems);
            V1.UpdateMode mode = ManifestConverter.ToWire(_update.Mode);
            Log.UpdateBegun(logger, begin.BaseVersion, begin.NewVersion, _owner, begin.Manifest.Count, begin.PayloadBytes,
                mode.ToString(), milliseconds);
            if (_update.Parts.Count > 1)
            {
                _open = new OpenUpdate(_update, _over);
                updates.Add(_open);
            }

            await stream.ReadyAsync(_update, part: 0, begin.SegmentBytes, _open?.Id, linked.Token);

            // :: 2 and 3
            while (await NextAsync(linked.Token))
            {
            }
        }
        catch (Exception) when (_committed)
        {
            throw; // the reply was not delivered: the update has ended all the same, and the log has its end
        }
        catch (UpdateRejectedException e)
        {
            Log.UpdateRejected(logger, _owner, e.Message);
            Rejected rejected = new();
            foreach (Engine.Problem problem in FieldNames.Update.Rename(e.Problems))
                rejected.Problems.Add(new V1.Problem { Field = problem.Field, Message = problem.Message });
            await EndAsync(new UpdateReply { Rejected = rejected });
        }
        catch (UpdateFailedException e) when (e.Failure != UpdateFailure.Deadline) // a withdrawn commit; the reason is reported below
        {
            await FailAsync(e.Failure, e.Message);
        }
        catch (Exception e) when (client.IsCancellationRequested || e is RpcException { StatusCode: StatusCode.Cancelled })
        {
            bool poisoned = await EndAsync(UpdateFailure.Sender);
            Log.UpdateAborted(logger, _owner, Outcome(poisoned), "the stream broke");
            _open?.EndWith(Aborted("the stream that began the update broke", poisoned));
            throw PartStream.ClientGone();
        }
        catch (IOException e)
        {
            await FailAsync(UpdateFailure.Source, e.Message);
        }
        catch (Exception) when (linked.IsCancellationRequested)
        {
            if (_open?.Broken is { Failure: UpdateFailure.Sender } gone) await AbortAsync(gone.Failure, gone.Message);
            else if (_open?.Broken is { } broken) await FailAsync(broken.Failure, broken.Message);
            else if (deadline.IsCancellationRequested) await AbortAsync(UpdateFailure.Deadline, late);
            else await AbortAsync(UpdateFailure.Engine, "the server is stopping");
        }

        return null;
    }

    public async ValueTask DisposeAsync()
    {
        bool poisoned = await EndAsync(UpdateFailure.Sender);
        _open?.EndWith(Aborted("the stream that began the update ended", poisoned)); // unless it has got another
        _over.Dispose();
    }

    /// <summary>Handles the client's next message. False when it was the last.</summary>
    private async Task<bool> NextAsync(CancellationToken cancellation)
    {
        if (!await stream.MoveNextAsync(cancellation))
        {
            await AbortAsync(UpdateFailure.Sender, "the client closed its side before commit");
            return false;
        }

        UpdateRequest request = stream.Current;
        if (PartStream.IsPayload(request))
        {
            await stream.ReceiveAsync(request, _update!, _update!.Parts[0], cancellation);
            return true;
        }

        switch (request.StepCase)
        {
            case UpdateRequest.StepOneofCase.Commit:
                PartStream.RefuseUnknownFields(request);
                await CommitAsync(request.Commit.Digest, cancellation);
                return false;

            case UpdateRequest.StepOneofCase.Abort:
                await AbortAsync(UpdateFailure.Sender, PartStream.ReasonOf(request.Abort));
                return false;

            default:
                throw PartStream.Failed($"expected a payload message, commit or abort, got {PartStream.Name(request)}");
        }
    }

    private async Task CommitAsync(ByteString digest, CancellationToken cancellation)
    {
        if (digest.Length is not (0 or 16)) throw PartStream.Failed($"a digest has 16 bytes, this one has {digest.Length}");
        if (_open is not null) await _open.AllReadAsync(cancellation);
        // The deadline withdraws a commit that has not been carried out, for example while draining. The reply says what happened.
        CommitResult result = await _update!.CommitAsync(digest.Memory, cancellation);
        _committed = true;
        UpdateTimings timings = new()
        {
            PreflightSeconds = result.PreflightSeconds,
            ApplySeconds = result.ApplySeconds,
            TransferSeconds = result.TransferSeconds,
            SwapSeconds = result.SwapSeconds,
            StallSeconds = result.StallSeconds,
        };
        if (_open is not null) await _open.StopAsync();
        int handles = stream.HandlesOpened + (_open?.HandlesOpened ?? 0);
        Log.UpdateCommitted(logger, result.Version, result.TransferSeconds, result.SwapSeconds, result.StallSeconds);
        V1.UpdateCounts counts = new()
        {
            HandlesOpened = (ulong)handles,
            Launches = (ulong)result.Counts.Launches,
            DeviceAllocations = (ulong)result.Counts.DeviceAllocations,
            GraphsCaptured = (ulong)result.Counts.GraphsCaptured,
            DeviceBytes = (ulong)result.Counts.DeviceBytes,
            HostBytes = (ulong)result.Counts.HostBytes,
        };
        Committed committed = new()
        {
            Version = result.Version,
            Digest = ByteString.CopyFrom(result.Digest),
            Timings = timings,
            Counts = counts,
        };
        await EndAsync(new UpdateReply { Committed = committed });
    }

    private async Task AbortAsync(UpdateFailure why, string reason)
    {
        bool poisoned = await EndAsync(why);
        Log.UpdateAborted(logger, _owner, Outcome(poisoned), reason);
        await EndAsync(Aborted(reason, poisoned));
    }

    private async Task FailAsync(UpdateFailure why, string reason)
    {
        bool poisoned = await EndAsync(why);
        Log.UpdateFailed(logger, _owner, Outcome(poisoned), reason);
        await EndAsync(new UpdateReply { Failed = new UpdateFailed { Reason = reason, Poisoned = poisoned } });
    }

    /// <summary>
    /// Ends the update, if it has not committed, when no stream reads any more. Returns whether that has poisoned the engine.
    /// </summary>
    private async Task<bool> EndAsync(UpdateFailure why)
    {
        // Before the update ends: the next one may need what the streams have borrowed.
        if (_open is not null)
        {
            updates.Remove(_open);
            await _open.StopAsync();
        }

        stream.Dispose();
        _update?.End(why);
        return _update?.HasTouchedServedWeights ?? false;
    }

    /// <summary>
    /// Sends the last reply. The update has ended before the client can see it, so that the client may begin the next one.
    /// </summary>
    private async Task EndAsync(UpdateReply reply)
    {
        await EndAsync(UpdateFailure.Sender);
        _open?.EndWith(reply);
        await stream.LastReplyAsync(reply);
    }

    private static UpdateReply Aborted(string reason, bool poisoned)
        => new() { Aborted = new Aborted { Reason = reason, Poisoned = poisoned } };

    private static string Outcome(bool poisoned) => poisoned ? "the engine is poisoned until a full update" : "the old weights stay";
}
