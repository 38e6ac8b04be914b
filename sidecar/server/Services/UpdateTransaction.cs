using Google.Protobuf;
using Grpc.Core;
using Microsoft.Win32.SafeHandles;
using Rollout.Engine;
using Rollout.V1;

namespace Rollout.Server.Services;

/// <summary>
/// One Weights.Update call, step by step as weights.proto has it:
/// <code>
///   :: 1  Begin            -> Ready | Rejected, and the call is over
///   :: 2  Chunk* | Shared  -> Progress*
///   :: 3  Commit           -> Committed
///   anything else, at any step: Failed or Aborted, the staging is dropped, the old weights stay
/// </code>
/// One deadline covers all of it, waiting for the client included. Disposing gives the engine's update seat back.
/// </summary>
internal sealed class UpdateTransaction(
    RolloutEngine engine, IAsyncStreamReader<UpdateRequest> requests, IServerStreamWriter<UpdateReply> replies, ILogger logger)
    : IDisposable
{
    /// <summary>How long a client that has opened the stream may take to begin.</summary>
    private static readonly TimeSpan s_beginWithin = TimeSpan.FromSeconds(30);

    private static readonly TimeSpan s_lastReplyWithin = TimeSpan.FromSeconds(5);

    private const uint DefaultDeadline = 600_000;

    /// <summary>Progress is reported about this often, so that replies stay few however small the chunks are.</summary>
    private const long ProgressBytes = 16 << 20;

    private WeightUpdate? _update;
    private UpdateManifest? _manifest;
    private string _owner = "";
    private long _reported;

    /// <summary>Runs the transaction to its end. Errors that are the protocol's own are replies, not exceptions.</summary>
    public async Task RunAsync(CancellationToken client, CancellationToken stopping)
    {
        using CancellationTokenSource deadline = new(s_beginWithin);
        using CancellationTokenSource linked = CancellationTokenSource.CreateLinkedTokenSource(client, stopping, deadline.Token);
        string late = $"no begin within {s_beginWithin.TotalSeconds:0} s";
        try
        {
            // :: 1
            if (!await requests.MoveNext(linked.Token)) throw new UpdateFailedException("the client closed its side before begin");
            if (requests.Current.StepCase != UpdateRequest.StepOneofCase.Begin)
                throw new UpdateFailedException($"the first message must be begin, not {Name(requests.Current)}");
            BeginUpdate begin = requests.Current.Begin;
            uint milliseconds = begin.DeadlineMilliseconds == 0 ? DefaultDeadline : begin.DeadlineMilliseconds;
            deadline.CancelAfter(TimeSpan.FromMilliseconds(Math.Min(milliseconds, uint.MaxValue - 1)));
            late = $"the deadline of {milliseconds} ms for the whole update passed";
            _owner = begin.Owner;
            _manifest = ManifestConverter.Convert(begin);
            _update = engine.BeginUpdate(_manifest);
            Log.UpdateBegun(logger, begin.BaseVersion, begin.NewVersion, _owner, begin.Manifest.Count, begin.PayloadBytes, milliseconds);
            await ReplyAsync(new UpdateReply { Ready = new Ready { StagingBytes = (ulong)_update.StagingBytes } }, linked.Token);

            // :: 2 and 3
            while (await NextAsync(linked.Token))
            {
            }
        }
        catch (UpdateRejectedException e)
        {
            Log.UpdateRejected(logger, _owner, e.Message);
            Rejected rejected = new();
            foreach (Engine.Problem problem in e.Problems)
                rejected.Problems.Add(new V1.Problem { Field = problem.Field, Message = problem.Message });
            await EndAsync(new UpdateReply { Rejected = rejected });
        }
        catch (UpdateFailedException e)
        {
            Log.UpdateFailed(logger, _owner, e.Message);
            await EndAsync(new UpdateReply { Failed = new UpdateFailed { Reason = e.Message } });
        }
        catch (Exception e) when (client.IsCancellationRequested || e is IOException)
        {
            Log.UpdateAborted(logger, _owner, "the stream broke");
            throw;
        }
        catch (Exception) when (linked.IsCancellationRequested)
        {
            await AbortAsync(deadline.IsCancellationRequested ? late : "the server is stopping");
        }
    }

    public void Dispose() => _update?.Dispose();

    /// <summary>Takes the client's next step. False when it was the last.</summary>
    private async Task<bool> NextAsync(CancellationToken cancellation)
    {
        WeightUpdate update = _update!;
        if (!await requests.MoveNext(cancellation))
        {
            await AbortAsync("the client closed its side before commit");
            return false;
        }

        UpdateRequest request = requests.Current;
        switch (request.StepCase)
        {
            case UpdateRequest.StepOneofCase.Chunk:
                if (request.Chunk.Offset > long.MaxValue)
                    throw new UpdateFailedException($"chunk offset {request.Chunk.Offset} is past any payload");
                update.Write((long)request.Chunk.Offset, request.Chunk.Data.Span);
                await ReportAsync(cancellation);
                return true;

            case UpdateRequest.StepOneofCase.SharedMemory:
                await ReadAsync(request.SharedMemory, cancellation);
                await ReportAsync(cancellation);
                return true;

            case UpdateRequest.StepOneofCase.Commit:
                await CommitAsync(request.Commit.Digest, cancellation);
                return false;

            case UpdateRequest.StepOneofCase.Abort:
                await AbortAsync(request.Abort.Reason.Length > 0 ? request.Abort.Reason : "the client said so");
                return false;

            default:
                throw new UpdateFailedException($"expected chunk, shared_memory, commit or abort, got {Name(request)}");
        }
    }

    private async Task ReadAsync(SharedMemory source, CancellationToken cancellation)
    {
        using SafeFileHandle file = SharedMemoryFile.Open(source.Path, source.Offset, _manifest!.PayloadBytes);

        // Uses every core and blocks meanwhile: not on the thread that serves the connection.
        await Task.Run(() => _update!.ReadFrom(file, (long)source.Offset, cancellation), CancellationToken.None);
    }

    private async Task CommitAsync(ByteString digest, CancellationToken cancellation)
    {
        if (digest.Length is not (0 or 16)) throw new UpdateFailedException($"a digest has 16 bytes, this one has {digest.Length}");
        // The deadline takes a commit back whose moment has not come, as while draining; what the client is told is what happened.
        CommitResult result = await _update!.CommitAsync(digest.Memory, cancellation);
        UpdateTimings timings = new()
        {
            TransferSeconds = result.TransferSeconds,
            SwapSeconds = result.SwapSeconds,
            StallSeconds = result.StallSeconds,
        };
        Log.UpdateCommitted(logger, result.Version, result.TransferSeconds, result.SwapSeconds, result.StallSeconds);
        Committed committed = new() { Version = result.Version, Digest = ByteString.CopyFrom(result.Digest), Timings = timings };
        await EndAsync(new UpdateReply { Committed = committed });
    }

    private async Task ReportAsync(CancellationToken cancellation)
    {
        long received = _update!.ReceivedBytes;
        if (received < _reported + ProgressBytes && received < _manifest!.PayloadBytes) return;
        _reported = received;
        await ReplyAsync(new UpdateReply { Progress = new Progress { PayloadBytes = (ulong)received } }, cancellation);
    }

    private Task AbortAsync(string reason)
    {
        Log.UpdateAborted(logger, _owner, reason);
        return EndAsync(new UpdateReply { Aborted = new Aborted { Reason = reason } });
    }

    /// <summary>The last reply. The seat is free before the client can see it, so that its next update finds it so.</summary>
    private async Task EndAsync(UpdateReply reply)
    {
        Dispose();
        try
        {
            await replies.WriteAsync(reply, CancellationToken.None).WaitAsync(s_lastReplyWithin);
        }
        catch (Exception e) when (e is TimeoutException or InvalidOperationException)
        {
            // The client has stopped reading; the status is all that may still reach it.
            throw new RpcException(new Status(StatusCode.Aborted, reply.ToString()));
        }
    }

    // The wait is cancelled, not the write: a cancelled write resets the stream, and the client would never learn why.
    private Task ReplyAsync(UpdateReply reply, CancellationToken cancellation)
        => replies.WriteAsync(reply, CancellationToken.None).WaitAsync(cancellation);

    private static string Name(UpdateRequest request)
        => request.StepCase == UpdateRequest.StepOneofCase.None ? "a message this server does not know"
            : request.StepCase.ToString().ToLowerInvariant();
}
