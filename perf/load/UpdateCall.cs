using Grpc.Core;
using Rollout.V1;

namespace Rollout.Load;

/// <summary>
/// One Weights.Update call. Replies are read from the start, so that the server never waits for the client to read progress, and the reason
/// of a failed update is known.
/// </summary>
internal sealed class UpdateCall : IDisposable
{
    private readonly AsyncDuplexStreamingCall<UpdateRequest, UpdateReply> _call;
    private readonly TaskCompletionSource<Ready> _ready = new(TaskCreationOptions.RunContinuationsAsynchronously);

    private UpdateCall(AsyncDuplexStreamingCall<UpdateRequest, UpdateReply> call)
    {
        _call = call;
        Committed = ReadAsync();
    }

    /// <summary>What the server said it would do.</summary>
    public Ready Ready => _ready.Task.Result;

    /// <summary>Completes with the commit, or with an exception that says why it failed.</summary>
    public Task<Committed> Committed { get; }

    /// <summary>Opens the transaction and returns when the server is ready for the payload.</summary>
    public static async Task<UpdateCall> BeginAsync(
        WeightsService.WeightsServiceClient weights, BeginUpdate begin, CancellationToken cancellation)
    {
        UpdateCall update = new(weights.Update(cancellationToken: cancellation));
        try
        {
            await update.SendAsync(new UpdateRequest { Begin = begin });
            await Task.WhenAny(update._ready.Task, update.Committed);
            if (!update._ready.Task.IsCompleted) await update.Committed;
            return update;
        }
        catch
        {
            update.Dispose();
            throw;
        }
    }

    public async Task SendAsync(UpdateRequest request)
    {
        try
        {
            await _call.RequestStream.WriteAsync(request);
        }
        catch (Exception e) when (e is RpcException or InvalidOperationException)
        {
            await Committed; // the server's own message, if it sent one
            throw;
        }
    }

    /// <summary>Cancels the transaction before any payload byte, and waits until the server has released it.</summary>
    public async Task AbortAsync(string reason)
    {
        await SendAsync(new UpdateRequest { Abort = new AbortUpdate { Reason = reason } });
        await ((Task)Committed).ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);
    }

    public void Dispose() => _call.Dispose();

    private async Task<Committed> ReadAsync()
    {
        while (await _call.ResponseStream.MoveNext(CancellationToken.None))
        {
            UpdateReply reply = _call.ResponseStream.Current;
            switch (reply.StepCase)
            {
                case UpdateReply.StepOneofCase.Ready:
                    _ready.TrySetResult(reply.Ready);
                    break;
                case UpdateReply.StepOneofCase.Progress:
                    break;
                case UpdateReply.StepOneofCase.Committed:
                    return reply.Committed;
                default:
                    throw new InvalidOperationException($"the update did not commit: {reply}");
            }
        }

        throw new InvalidOperationException("the server ended the update without an answer");
    }
}
