using System.Threading.Channels;
using Grpc.Core;

namespace Rollout.Client;

/// <summary>
/// The stream of one update. Replies are also read while sending, so that the sidecar never waits for the client to read its progress, and
/// an update that the sidecar ends is noticed at once.
/// </summary>
internal sealed class UpdateCall : IAsyncDisposable
{
    private readonly AsyncDuplexStreamingCall<V1.UpdateRequest, V1.UpdateReply> _call;
    private readonly Channel<V1.UpdateReply> _replies = Channel.CreateUnbounded<V1.UpdateReply>();
    private readonly CancellationTokenSource _ended = new();
    private readonly Task _reading;
    private long _received;
    private int _sent;

    public UpdateCall(V1.WeightsService.WeightsServiceClient weights, CallOptions options)
    {
        _call = weights.Update(options);
        _reading = ReadAsync();
    }

    /// <summary>
    /// The sidecar has ended the update or the connection is lost: sending more is useless. <see cref="NextAsync"/> throws why.
    /// </summary>
    public CancellationToken Ended => _ended.Token;

    /// <summary>Messages sent so far.</summary>
    public int Sent => _sent;

    /// <exception cref="RpcException">The connection or the call failed.</exception>
    /// <exception cref="RolloutException">The sidecar ended the update; the message has its reason.</exception>
    public async Task SendAsync(V1.UpdateRequest request, CancellationToken cancellationToken = default)
    {
        try
        {
            _sent++;
            await _call.RequestStream.WriteAsync(request, cancellationToken);
        }
        catch (Exception e) when (e is RpcException or InvalidOperationException or IOException) // all are ends of the stream
        {
            await ThrowReasonAsync();
            throw;
        }
    }

    /// <summary>Throws what ended the call.</summary>
    public async Task ThrowReasonAsync()
    {
        while (true)
            await NextAsync();
    }

    /// <summary>The next reply that is not an error.</summary>
    /// <inheritdoc cref="SendAsync"/>
    public async Task<V1.UpdateReply> NextAsync(CancellationToken cancellationToken = default)
    {
        V1.UpdateReply reply;
        try
        {
            reply = await _replies.Reader.ReadAsync(cancellationToken);
        }
        catch (ChannelClosedException e) when (e.InnerException is RpcException cause)
        {
            throw new RpcException(cause.Status, cause.Trailers, cause.Message);
        }
        catch (ChannelClosedException e)
        {
            throw new RpcException(new Status(StatusCode.Unavailable, "the sidecar ended the update without an answer", e));
        }

        return reply.StepCase switch
        {
            V1.UpdateReply.StepOneofCase.Rejected => throw new WeightUpdateRejectedException(
                [.. reply.Rejected.Problems.Select(problem => new UpdateProblem(problem.Field, problem.Message))]),
            V1.UpdateReply.StepOneofCase.Failed => throw Failure("failed", reply.Failed.Poisoned, reply.Failed.Reason),
            V1.UpdateReply.StepOneofCase.Aborted => throw Failure("was aborted", reply.Aborted.Poisoned, reply.Aborted.Reason),
            _ => reply,
        };
    }

    /// <summary>Waits until the sidecar has read this much of the payload.</summary>
    /// <inheritdoc cref="SendAsync"/>
    public async Task ReceivedAsync(long bytes, CancellationToken cancellationToken = default)
    {
        while (_received < bytes)
        {
            if ((await NextAsync(cancellationToken)).Progress is { } progress)
                _received = (long)progress.PayloadBytes;
        }
    }

    /// <summary>
    /// Sends the sidecar the reason if it is still connected. Disposing would end the update too, but without a reason in its log.
    /// </summary>
    public async Task TryAbortAsync(string reason)
    {
        try
        {
            Task sent = _call.RequestStream.WriteAsync(new V1.UpdateRequest { Abort = new V1.AbortUpdate { Reason = reason } });
            await sent.WaitAsync(TimeSpan.FromSeconds(1));
            await _reading.WaitAsync(TimeSpan.FromSeconds(1));
        }
        catch (Exception e) when (e is RpcException or InvalidOperationException or IOException or TimeoutException)
        {
            // It has ended or hangs; it will see the stream break.
        }
    }

    public async ValueTask DisposeAsync()
    {
        _call.Dispose();
        await _reading;
        _ended.Dispose();
    }

    private static WeightUpdateFailedException Failure(string how, bool poisoned, string reason) => poisoned
        ? new($"the update {how}, and the sidecar is poisoned until a full push ends well: {reason}", UpdateOutcome.Poisoned)
        : new($"the update {how}, the old weights are still served: {reason}", UpdateOutcome.NotCommitted);

    private async Task ReadAsync()
    {
        Exception? error = null;
        try
        {
            while (await _call.ResponseStream.MoveNext(CancellationToken.None))
            {
                V1.UpdateReply reply = _call.ResponseStream.Current;
                _replies.Writer.TryWrite(reply);
                if (reply.StepCase is V1.UpdateReply.StepOneofCase.Rejected or V1.UpdateReply.StepOneofCase.Failed
                    or V1.UpdateReply.StepOneofCase.Aborted)
                {
                    await _ended.CancelAsync();
                }
            }
        }
        catch (Exception e)
        {
            error = e;
        }

        _replies.Writer.TryComplete(error);
        await _ended.CancelAsync();
    }
}
