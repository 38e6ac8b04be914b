using System.Threading.Channels;
using Rollout.Engine;

namespace Rollout.Server.Generation;

/// <summary>
/// Many groups on one call: each has its own task that reads from the engine, and all share one writer to the client.
/// <code>
///   requests -> Start -> group 1 --ReadAsync, Convert--\
///                        group 2 --ReadAsync, Convert---> bounded channel -> one writer -> client
///                        ...     --Refusal-------------/
/// </code>
/// A slow client fills the channel and the readers wait. The engine does not, because a reader that wakes late gets all tokens sampled
/// since. When the client disconnects, every group of the call is ended.
/// </summary>
/// <typeparam name="TRequest">The surface's request for a group.</typeparam>
/// <typeparam name="TReply">The surface's reply.</typeparam>
internal abstract class GroupBatch<TRequest, TReply>
    where TReply : class
{
    private const int ReplyBacklog = 64;

    private readonly Channel<TReply> _replies = Channel.CreateBounded<TReply>(
        new BoundedChannelOptions(ReplyBacklog) { SingleReader = true });

    // Groups in flight, plus one for the reader of requests: at zero nothing can be written any more.
    private int _open = 1;
    private Exception? _failure;

    /// <summary>Returns when the requests and every group have ended.</summary>
    /// <param name="requests">Read while replies are written.</param>
    /// <param name="stopping">When cancelled, no more requests are read; groups in flight continue.</param>
    /// <param name="cancellation">Cancelled when the client disconnects.</param>
    public async Task RunAsync(IAsyncEnumerable<TRequest> requests, CancellationToken stopping, CancellationToken cancellation)
    {
        using CancellationTokenSource ending = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
        using CancellationTokenSource reading = CancellationTokenSource.CreateLinkedTokenSource(ending.Token, stopping);
        Task accepting = AcceptAsync(requests, reading.Token, ending);
        try
        {
            await foreach (TReply reply in _replies.Reader.ReadAllAsync(CancellationToken.None))
            {
                if (ending.IsCancellationRequested) continue; // the groups are being ended
                try
                {
                    await WriteAsync(reply, moreReady: _replies.Reader.Count > 0, cancellation);
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

    protected abstract GroupStream Start(TRequest request);

    /// <summary>Called by the groups' readers, several at once.</summary>
    protected abstract TReply Convert(GroupStream group, in GroupReply reply);

    /// <summary>The reply for an exception of <see cref="Start"/>; null for an internal error, which fails the call.</summary>
    protected abstract TReply? Refusal(TRequest request, Exception exception);

    /// <summary>Called by one writer.</summary>
    /// <param name="reply">The next reply.</param>
    /// <param name="moreReady">Whether another reply follows at once.</param>
    /// <param name="cancellation">Cancelled when the client disconnects.</param>
    protected abstract Task WriteAsync(TReply reply, bool moreReady, CancellationToken cancellation);

    private async Task AcceptAsync(IAsyncEnumerable<TRequest> requests, CancellationToken reading, CancellationTokenSource ending)
    {
        try
        {
            await foreach (TRequest request in requests.WithCancellation(reading))
            {
                GroupStream group;
                try
                {
                    group = Start(request);
                }
                catch (Exception e)
                {
                    if (Refusal(request, e) is not { } refusal) throw;
                    await QueueAsync(refusal, ending.Token);
                    continue;
                }

                Interlocked.Increment(ref _open);
                _ = ReadGroupAsync(group, ending);
            }
        }
        catch (OperationCanceledException) when (reading.IsCancellationRequested)
        {
            // The client has disconnected, or the server is stopping: groups in flight end by themselves.
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

    private async Task ReadGroupAsync(GroupStream group, CancellationTokenSource ending)
    {
        // Submitting a group must not wait for the first reply of the one before.
        await Task.CompletedTask.ConfigureAwait(ConfigureAwaitOptions.ForceYielding);
        try
        {
            await using (group)
            {
                await foreach (GroupReply reply in group.ReadAsync(ending.Token)) await QueueAsync(Convert(group, reply), ending.Token);
            }
        }
        catch (OperationCanceledException) when (ending.IsCancellationRequested)
        {
        }
        catch (EngineFaultedException e)
        {
            // Every group of the call ends with this error; all of them return their tokens first, then the call fails.
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

    private ValueTask QueueAsync(TReply reply, CancellationToken cancellation) => _replies.Writer.WriteAsync(reply, cancellation);

    private void Fail(Exception failure, CancellationTokenSource ending)
    {
        Interlocked.CompareExchange(ref _failure, failure, null);
        ending.Cancel();
    }

    private void Release()
    {
        if (Interlocked.Decrement(ref _open) == 0) _replies.Writer.Complete();
    }
}
