using Grpc.Core;
using Rollout.Engine;
using Rollout.V1;

namespace Rollout.Server.Weights;

/// <summary>
/// One Weights.Update call that brings a part of an update which another call has begun:
/// <code>
///   Join                 -> Ready
///   the part's payload   -> Progress*
///   nothing more         -> the last reply of the update
/// </code>
/// Whatever goes wrong here ends the update for all.
/// </summary>
internal sealed class JoinedPart(OpenUpdates updates, PartStream stream)
{
    /// <summary>Brings the part to its end. Errors defined by the protocol are replies, not exceptions.</summary>
    public async Task RunAsync(JoinUpdate join, CancellationToken client)
    {
        OpenUpdate open;
        try
        {
            PartStream.RefuseUnknownFields(stream.Current);
            open = updates.Find(join.UpdateId.Span);
            open.Join(join.Part);
        }
        catch (UpdateFailedException e)
        {
            // Of the update itself nothing has changed.
            await stream.LastReplyAsync(new UpdateReply { Failed = new UpdateFailed { Reason = e.Message } });
            return;
        }

        Exception? unexpected = null;
        using (CancellationTokenSource linked = CancellationTokenSource.CreateLinkedTokenSource(client, open.Over))
        {
            try
            {
                await BringAsync(open, join, linked.Token);
            }
            catch (Exception) when (open.Over.IsCancellationRequested)
            {
                // It has ended, and the last reply says why.
            }
            catch (Exception e)
            {
                (UpdateFailure why, string reason) = e switch
                {
                    UpdateFailedException failed => (failed.Failure, failed.Message),
                    IOException => (UpdateFailure.Source, e.Message),
                    _ when client.IsCancellationRequested => (UpdateFailure.Sender, "the stream broke"),
                    RpcException { StatusCode: StatusCode.Cancelled } => (UpdateFailure.Sender, "the stream broke"),
                    RpcException rpc => (UpdateFailure.Protocol, rpc.Status.Detail),
                    _ => (UpdateFailure.Engine, e.Message),
                };
                if (e is not (UpdateFailedException or IOException)) unexpected = e;
                open.Break(why, $"part {join.Part}: {reason}");
            }
            finally
            {
                int opened = stream.HandlesOpened;
                stream.Dispose();
                open.Leave(opened);
            }
        }

        UpdateReply end = await open.End;
        if (client.IsCancellationRequested) throw PartStream.ClientGone();
        if (unexpected is not null) throw unexpected;
        await stream.LastReplyAsync(end);
    }

    private async Task BringAsync(OpenUpdate open, JoinUpdate join, CancellationToken cancellation)
    {
        UpdatePart part = open.Update.Parts[(int)join.Part];
        await stream.ReadyAsync(open.Update, (int)join.Part, join.SegmentBytes, open.Id, cancellation);
        while (await stream.MoveNextAsync(cancellation))
        {
            UpdateRequest request = stream.Current;
            if (request.StepCase == UpdateRequest.StepOneofCase.Abort)
                throw new UpdateFailedException(UpdateFailure.Sender, PartStream.ReasonOf(request.Abort));
            if (!PartStream.IsPayload(request))
                throw PartStream.Failed($"expected a payload message or abort, got {PartStream.Name(request)}");
            await stream.ReceiveAsync(request, open.Update, part, cancellation);
            open.HasRead();
        }

        if (!part.IsComplete) throw new UpdateFailedException(UpdateFailure.Sender, "the client closed its side before all had come");
        await open.End.WaitAsync(cancellation);
    }
}
