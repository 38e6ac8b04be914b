using System.Threading.Channels;
using Grpc.Core;
using Rollout.V1;

namespace Rollout.Server.Grpc;

/// <summary>
/// Many groups on one call: each has its own reader of the engine, and all share one writer to the client.
/// <code>
///   requests -> Start -> group 1 --ReadAsync--\
///                        group 2 --ReadAsync---> bounded channel -> one writer -> client
///                        ...     --refused----/
/// </code>
/// A slow client fills the channel and the readers wait; the engine does not, because a reader that wakes late takes all that has come
/// since. When the client goes, every group of the call is ended.
/// </summary>
internal sealed class BatchCall(Func<GenerateRequest, GroupCall> start, IServerStreamWriter<GenerateReply> responses, ILogger logger)
{
    private const int ReplyBacklog = 64;

    /// <summary>Replies written before they are sent, where more stand ready: sending costs more than writing does.</summary>
    private const int RepliesASend = 16;

    private static readonly WriteOptions s_send = new();
    private static readonly WriteOptions s_moreFollow = new(WriteFlags.BufferHint);

    private readonly Channel<GenerateReply> _replies = Channel.CreateBounded<GenerateReply>(
        new BoundedChannelOptions(ReplyBacklog) { SingleReader = true });

    // Groups under way, and one for the reader of requests: at zero nothing can be written any more.
    private int _open = 1;
    private Exception? _failure;

    public async Task RunAsync(IAsyncStreamReader<GenerateRequest> requests, CancellationToken stopping, CancellationToken cancellation)
    {
        using CancellationTokenSource ending = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
        using CancellationTokenSource reading = CancellationTokenSource.CreateLinkedTokenSource(ending.Token, stopping);
        Task accepting = AcceptAsync(requests, reading.Token, ending);
        try
        {
            int unsent = 0;
            await foreach (GenerateReply reply in _replies.Reader.ReadAllAsync(CancellationToken.None))
            {
                if (ending.IsCancellationRequested) continue; // the groups are being ended; let them go
                try
                {
                    bool wait = ++unsent < RepliesASend && _replies.Reader.Count > 0;
                    if (!wait) unsent = 0;
                    responses.WriteOptions = wait ? s_moreFollow : s_send;
                    await responses.WriteAsync(reply, cancellation);
                }
                catch (Exception e)
                {
                    Fail(e, ending);
                }
            }
        }
        finally
        {
            await accepting;
        }

        cancellation.ThrowIfCancellationRequested();
        if (_failure is not null) throw _failure;
    }

    private async Task AcceptAsync(IAsyncStreamReader<GenerateRequest> requests, CancellationToken reading, CancellationTokenSource ending)
    {
        try
        {
            while (await requests.MoveNext(reading))
            {
                GenerateRequest request = requests.Current;
                GroupCall call;
                try
                {
                    call = start(request);
                }
                catch (Exception e) when (Errors.ToStatus(e) is { } status)
                {
                    Log.Refused(logger, $"group '{request.RequestId}'", status.StatusCode.ToString(), status.Detail);
                    await WriteAsync(Refusal(request, status), ending.Token);
                    continue;
                }

                Interlocked.Increment(ref _open);
                _ = ReadGroupAsync(call, ending);
            }
        }
        catch (OperationCanceledException) when (reading.IsCancellationRequested)
        {
            // The client has gone, or the server is stopping: groups in flight end on their own.
        }
        catch (Exception e)
        {
            Fail(e, ending);
        }
        finally
        {
            Release();
        }
    }

    private async Task ReadGroupAsync(GroupCall call, CancellationTokenSource ending)
    {
        // Submitting a group must not wait for the first reply of the one before.
        await Task.CompletedTask.ConfigureAwait(ConfigureAwaitOptions.ForceYielding);
        try
        {
            await using (call)
            {
                await foreach (GenerateReply reply in call.ReadAsync(ending.Token)) await WriteAsync(reply, ending.Token);
                call.ThrowIfFaulted();
            }
        }
        catch (OperationCanceledException) when (ending.IsCancellationRequested)
        {
        }
        catch (Engine.EngineFaultedException e)
        {
            // Every group of the call ends this way; let all of them deliver what they have, then say why.
            Interlocked.CompareExchange(ref _failure, e, null);
        }
        catch (Exception e)
        {
            Fail(e, ending);
        }
        finally
        {
            Release();
        }
    }

    private ValueTask WriteAsync(GenerateReply reply, CancellationToken cancellation) => _replies.Writer.WriteAsync(reply, cancellation);

    private void Fail(Exception failure, CancellationTokenSource ending)
    {
        Interlocked.CompareExchange(ref _failure, failure, null);
        ending.Cancel();
    }

    private void Release()
    {
        if (Interlocked.Decrement(ref _open) == 0) _replies.Writer.Complete();
    }

    private static GenerateReply Refusal(GenerateRequest request, Status status) => new()
    {
        RequestId = request.RequestId,
        Refused = new Refusal { Code = (int)status.StatusCode, Message = status.Detail },
    };
}
