using System.Security.Cryptography;
using Rollout.Engine;
using Rollout.V1;

namespace Rollout.Server.Weights;

/// <summary>
/// An update that several streams bring: the one that began it, and those that have joined. The one that began it ends the update, when no
/// other reads any more; each gets the same last reply.
/// </summary>
/// <param name="update">The engine's.</param>
/// <param name="over">Of the stream that began it: cancelled when the update is over for all.</param>
internal sealed class OpenUpdate(WeightUpdate update, CancellationTokenSource over)
{
    private const int IdBytes = 16;

    private readonly Lock _lock = new();
    private readonly TaskCompletionSource<UpdateReply> _end = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly TaskCompletionSource _complete = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly TaskCompletionSource _left = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly HashSet<int> _joined = [];
    private int _reading;
    private int _handlesOpened;
    private UpdateFailedException? _broken;

    public byte[] Id { get; } = RandomNumberGenerator.GetBytes(IdBytes);

    public WeightUpdate Update => update;

    /// <summary>Cancelled when it is over for all streams: nothing may be read any more.</summary>
    public CancellationToken Over { get; } = over.Token;

    /// <summary>Why a stream that joined has ended it, or null.</summary>
    public UpdateFailedException? Broken
    {
        get
        {
            lock (_lock) return _broken;
        }
    }

    /// <summary>The last reply of all streams.</summary>
    public Task<UpdateReply> End => _end.Task;

    /// <summary>By streams that have left.</summary>
    public int HandlesOpened => Volatile.Read(ref _handlesOpened);

    /// <summary>A stream is going to read a part. Each succeeds once.</summary>
    /// <exception cref="UpdateFailedException">There is no such part, it has joined already, or the update is over.</exception>
    public void Join(uint part)
    {
        lock (_lock)
        {
            if (part == 0 || part >= update.Parts.Count)
                throw PartStream.Failed($"part {part} cannot join: the update has parts 1 to {update.Parts.Count - 1}");
            if (Over.IsCancellationRequested) throw PartStream.Failed("the update is over");
            if (!_joined.Add((int)part)) throw PartStream.Failed($"part {part} has joined already");
            _reading++;
        }
    }

    /// <summary>A stream that joined has read more, perhaps the last that was missing.</summary>
    public void HasRead()
    {
        if (update.Parts.Skip(1).All(part => part.IsComplete)) _complete.TrySetResult();
    }

    /// <summary>Completes when every part but the first has been read.</summary>
    public Task AllReadAsync(CancellationToken cancellation)
    {
        HasRead(); // there may be nothing to read
        return _complete.Task.WaitAsync(cancellation);
    }

    /// <summary>Ends the update for this reason, unless it is over.</summary>
    public void Break(UpdateFailure why, string reason)
    {
        lock (_lock)
        {
            if (Over.IsCancellationRequested) return;
            _broken = new UpdateFailedException(why, reason);
        }

        over.Cancel(); // it is disposed only once all have left
    }

    /// <summary>A stream that joined reads no more.</summary>
    public void Leave(int handlesOpened)
    {
        lock (_lock)
        {
            _handlesOpened += handlesOpened;
            _reading--;
            if (_reading == 0 && Over.IsCancellationRequested) _left.TrySetResult();
        }
    }

    /// <summary>Completes when no stream that joined reads any more.</summary>
    public Task StopAsync()
    {
        over.Cancel();
        lock (_lock)
        {
            if (_reading == 0) _left.TrySetResult();
        }

        return _left.Task;
    }

    public void EndWith(UpdateReply reply) => _end.TrySetResult(reply);
}

/// <summary>The update that streams may join, if there is one: the engine admits one update at a time.</summary>
internal sealed class OpenUpdates
{
    private volatile OpenUpdate? _open;

    public void Add(OpenUpdate update) => _open = update;

    public void Remove(OpenUpdate update) => Interlocked.CompareExchange(ref _open, null, update);

    /// <exception cref="UpdateFailedException">There is none of this id.</exception>
    public OpenUpdate Find(ReadOnlySpan<byte> id)
        => _open is { } open && id.SequenceEqual(open.Id) ? open : throw PartStream.Failed("no update of this id is open: it is over");
}
