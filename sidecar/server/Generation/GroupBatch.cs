using System.Threading.Channels;
using Rollout.Engine;

namespace Rollout.Server.Generation;

/// <summary>
/// Many groups on one call: each has its own reader of the engine, and all share one writer to the client.
/// <code>
///   requests -> Start -> group 1 --ReadAsync, Convert--\
///                        group 2 --ReadAsync, Convert---> bounded channel -> one writer -> client
///                        ...     --Refusal-------------/
/// </code>
/// A slow client fills the channel and the readers wait; the engine does not, because a reader that wakes late takes all that has come
/// since. When the client goes, every group of the call is ended.
/// </summary>
/// <typeparam name="TRequest">A group as the surface's clients ask for it.</typeparam>
/// <typeparam name="TReply">A reply as they get it.</typeparam>
internal abstract class GroupBatch<TRequest, TReply>
    where TReply : class
{
    private const int ReplyBacklog = 64;

    private readonly Channel<TReply> _replies = Channel.CreateBounded<TReply>(
        new BoundedChannelOptions(ReplyBacklog) { SingleReader = true });

    // Groups under way, and one for the reader of requests: at zero nothing can be written any more.
    private int _open = 1;
    private Exception? _failure;

    /// <summary>Returns when the requests and every group have ended.</summary>
    /// <param name="requests">Read while replies are written.</param>
    /// <param name="stopping">Takes no more requests; groups in flight go on.</param>
    /// <param name="cancellation">The client has gone.</param>
    public async Task RunAsync(IAsyncEnumerable<TRequest> requests, CancellationToken stopping, CancellationToken cancellation)
    {
        using CancellationTokenSource ending = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
        using CancellationTokenSource reading = CancellationTokenSource.CreateLinkedTokenSource(ending.Token, stopping);
        Task accepting = AcceptAsync(requests, reading.Token, ending);
        try
        {
            await foreach (TReply reply in _replies.Reader.ReadAllAsync(CancellationToken.None))
            {
                if (ending.IsCancellationRequested) continue; // the groups are being ended; let them go
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

    /// <summary>Called by the groups' readers, so by several at once.</summary>
    protected abstract TReply Convert(GroupStream group, in GroupReply reply);

    /// <summary>What to answer where <see cref="Start"/> threw; null where that is not the client's to know, and the call fails.</summary>
    protected abstract TReply? Refusal(TRequest request, Exception exception);

    /// <summary>Called by one writer.</summary>
    /// <param name="reply">The next reply.</param>
    /// <param name="moreReady">Another one follows at once.</param>
    /// <param name="cancellation">The client has gone.</param>
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
