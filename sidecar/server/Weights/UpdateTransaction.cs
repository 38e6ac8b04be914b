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
internal sealed class UpdateTransaction(
    RolloutEngine engine, SharedSegment shared, OpenMemory memory, IAsyncStreamReader<UpdateRequest> requests,
    IServerStreamWriter<UpdateReply> replies, ILogger logger)
    : IDisposable
{
    /// <summary>How long a client may take from opening the stream to begin.</summary>
    private static readonly TimeSpan s_beginWithin = TimeSpan.FromSeconds(30);

    private static readonly TimeSpan s_lastReplyWithin = TimeSpan.FromSeconds(5);

    private const uint DefaultDeadline = 600_000;

    /// <summary>Progress is reported about this often, so that small chunks do not cause many replies.</summary>
    private const long ProgressBytes = 16 << 20;

    private readonly Dictionary<UpdateRequest.StepOneofCase, ITransport> _transports = [];
    private WeightUpdate? _update;
    private SealedMemory? _segment;
    private string _owner = "";
    private long _reported;
    private bool _committed;

    /// <summary>Runs the transaction to its end. Errors defined by the protocol are replies, not exceptions.</summary>
    public async Task RunAsync(CancellationToken client, CancellationToken stopping)
    {
        using CancellationTokenSource deadline = new(s_beginWithin);
        using CancellationTokenSource linked = CancellationTokenSource.CreateLinkedTokenSource(client, stopping, deadline.Token);
        string late = $"no begin within {s_beginWithin.TotalSeconds:0} s";
        try
        {
            // :: 1
            if (!await MoveNextAsync(linked.Token)) throw Failed("the client closed its side before begin");
            if (requests.Current.StepCase != UpdateRequest.StepOneofCase.Begin)
                throw Failed($"the first message must be begin, not {Name(requests.Current)}");
            BeginUpdate begin = requests.Current.Begin;
            uint milliseconds = begin.DeadlineMilliseconds == 0 ? DefaultDeadline : begin.DeadlineMilliseconds;
            deadline.CancelAfter(TimeSpan.FromMilliseconds(Math.Min(milliseconds, uint.MaxValue - 1)));
            late = $"the deadline of {milliseconds} ms for the whole update passed";
            _owner = begin.Owner;
            (UpdateManifest manifest, ProblemList problems) = ManifestConverter.Convert(begin);
            _update = engine.BeginUpdate(manifest, problems);
            V1.UpdateMode mode = ManifestConverter.ToWire(_update.Mode);
            Log.UpdateBegun(logger, begin.BaseVersion, begin.NewVersion, _owner, begin.Manifest.Count, begin.PayloadBytes,
                mode.ToString(), milliseconds);
            _segment = shared.Lend(begin.SegmentBytes, () => engine.Backend.AvailableBytes);
            Ready ready = new() { StagingBytes = (ulong)_update.StagingBytes, Mode = mode, Segment = ToWire(_segment) };
            if (engine.Backend.Peers is { } peers)
            {
                ready.DeviceUuid = ByteString.CopyFrom(peers.DeviceUuid.Span);
                ready.NcclUniqueId = memory.Ranks.Id;
            }

            await ReplyAsync(new UpdateReply { Ready = ready }, linked.Token);

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
            bool poisoned = End(e.Failure);
            Log.UpdateFailed(logger, _owner, Outcome(poisoned), e.Message);
            await EndAsync(new UpdateReply { Failed = new UpdateFailed { Reason = e.Message, Poisoned = poisoned } });
        }
        catch (Exception e) when (client.IsCancellationRequested || e is RpcException { StatusCode: StatusCode.Cancelled })
        {
            bool poisoned = End(UpdateFailure.Sender);
            Log.UpdateAborted(logger, _owner, Outcome(poisoned), "the stream broke");
            throw ClientGone();
        }
        catch (IOException e)
        {
            bool poisoned = End(UpdateFailure.Source);
            Log.UpdateFailed(logger, _owner, Outcome(poisoned), e.Message);
            await EndAsync(new UpdateReply { Failed = new UpdateFailed { Reason = e.Message, Poisoned = poisoned } });
        }
        catch (Exception) when (linked.IsCancellationRequested)
        {
            if (deadline.IsCancellationRequested) await AbortAsync(UpdateFailure.Deadline, late);
            else await AbortAsync(UpdateFailure.Engine, "the server is stopping");
        }
    }

    public void Dispose()
    {
        End(UpdateFailure.Sender);
        foreach (ITransport transport in _transports.Values) transport.Dispose();
        _transports.Clear();
    }

    /// <summary>Whether an exception means a broken stream. There are several, some of them before the call is cancelled.</summary>
    private async Task<bool> MoveNextAsync(CancellationToken cancellation)
    {
        try
        {
            return await requests.MoveNext(cancellation);
        }
        catch (IOException)
        {
            throw ClientGone();
        }
    }

    /// <summary>Handles the client's next message. False when it was the last.</summary>
    private async Task<bool> NextAsync(CancellationToken cancellation)
    {
        if (!await MoveNextAsync(cancellation))
        {
            await AbortAsync(UpdateFailure.Sender, "the client closed its side before commit");
            return false;
        }

        UpdateRequest request = requests.Current;
        switch (request.StepCase)
        {
            case UpdateRequest.StepOneofCase.Chunk or UpdateRequest.StepOneofCase.SharedMemory or UpdateRequest.StepOneofCase.File
                or UpdateRequest.StepOneofCase.CudaIpc or UpdateRequest.StepOneofCase.Nccl:
                await ReceiveAsync(request, cancellation);
                return true;

            case UpdateRequest.StepOneofCase.Commit:
                RefuseUnknownFields(request);
                await CommitAsync(request.Commit.Digest, cancellation);
                return false;

            case UpdateRequest.StepOneofCase.Abort:
                await AbortAsync(UpdateFailure.Sender, request.Abort.Reason.Length > 0 ? request.Abort.Reason : "the client said so");
                return false;

            default:
                throw Failed($"expected a payload message, commit or abort, got {Name(request)}");
        }
    }

    private async Task ReceiveAsync(UpdateRequest request, CancellationToken cancellation)
    {
        bool chunk = request.StepCase == UpdateRequest.StepOneofCase.Chunk;
        if (!chunk || ChunkBuffer.Behind(request.Chunk.Data) is null) RefuseUnknownFields(request);
        if (!_transports.TryGetValue(request.StepCase, out ITransport? transport))
            _transports.Add(request.StepCase, transport = Transport(request.StepCase));
        using (PayloadSource source = await transport.SourceOfAsync(request, _update!, cancellation))
        {
            await _update!.OpenAsync(cancellation);
            await _update.ReadFromAsync(source, cancellation);
        }

        // After a window its memory may be overwritten, so it gets a reply; small chunks do not get one each.
        long received = _update.ReceivedBytes;
        if (chunk && received < _reported + ProgressBytes && received < _update.Manifest.PayloadBytes) return;
        _reported = received;
        await ReplyAsync(new UpdateReply { Progress = new Progress { PayloadBytes = (ulong)received } }, cancellation);
    }

    private ITransport Transport(UpdateRequest.StepOneofCase step) => step switch
    {
        UpdateRequest.StepOneofCase.Chunk => new InlineTransport(),
        UpdateRequest.StepOneofCase.SharedMemory => new SharedMemoryTransport(_segment),
        UpdateRequest.StepOneofCase.File => new SafetensorsTransport(),
        UpdateRequest.StepOneofCase.CudaIpc => new CudaIpcTransport(engine.Backend, memory),
        _ => new NcclTransport(engine.Backend, memory.Ranks),
    };

    private async Task CommitAsync(ByteString digest, CancellationToken cancellation)
    {
        if (digest.Length is not (0 or 16)) throw Failed($"a digest has 16 bytes, this one has {digest.Length}");
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
        Log.UpdateCommitted(logger, result.Version, result.TransferSeconds, result.SwapSeconds, result.StallSeconds);
        V1.UpdateCounts counts = new()
        {
            HandlesOpened = (ulong)_transports.Values.OfType<CudaIpcTransport>().Sum(transport => transport.Opened),
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

    private Task AbortAsync(UpdateFailure why, string reason)
    {
        bool poisoned = End(why);
        Log.UpdateAborted(logger, _owner, Outcome(poisoned), reason);
        return EndAsync(new UpdateReply { Aborted = new Aborted { Reason = reason, Poisoned = poisoned } });
    }

    /// <summary>Ends the update, if it has not committed. Returns whether that has poisoned the engine.</summary>
    private bool End(UpdateFailure why)
    {
        // Before the update ends: the next one may need the segment.
        if (_segment is not null) shared.GiveBack();
        _segment = null;
        _update?.End(why);
        return _update?.HasTouchedServedWeights ?? false;
    }

    private static Segment? ToWire(SealedMemory? memory)
        => memory is null ? null : new Segment { Path = memory.Path, Name = memory.Name, Bytes = (ulong)memory.Bytes };

    private static string Outcome(bool poisoned) => poisoned ? "the engine is poisoned until a full update" : "the old weights stay";

    private static RpcException ClientGone() => new(new Status(StatusCode.Cancelled, "the client has disconnected"));

    private static UpdateFailedException Failed(string reason) => new(UpdateFailure.Protocol, reason);

    private static void RefuseUnknownFields(UpdateRequest request)
    {
        ProblemList unknown = UnknownFields.Of(request);
        if (unknown.Count > 0) throw Failed(unknown.ToString());
    }

    /// <summary>
    /// Sends the last reply. The update has ended before the client can see it, so that the client may begin the next one.
    /// </summary>
    private async Task EndAsync(UpdateReply reply)
    {
        Dispose();
        try
        {
            await replies.WriteAsync(reply, CancellationToken.None).WaitAsync(s_lastReplyWithin);
        }
        catch (Exception e) when (e is TimeoutException or InvalidOperationException)
        {
            // The client has stopped reading; only the status may still reach it.
            throw new RpcException(new Status(StatusCode.Aborted, reply.ToString()));
        }
    }

    // The wait is cancelled, not the write: a cancelled write resets the stream, and the client would not get the reason.
    private Task ReplyAsync(UpdateReply reply, CancellationToken cancellation)
        => replies.WriteAsync(reply, CancellationToken.None).WaitAsync(cancellation);

    private static string Name(UpdateRequest request)
        => request.StepCase == UpdateRequest.StepOneofCase.None ? "a message this server does not know"
            : request.StepCase.ToString().ToLowerInvariant();
}
