namespace Rollout.Engine;

/// <summary>
/// What one sender brings of an update: a payload of its own, with the tensors and slices that the manifest gives to it. Parts may be read
/// at the same time, each by one thread.
/// </summary>
public sealed class UpdatePart
{
    private readonly WeightUpdate _update;
    private readonly IncomingTensor[] _incoming;
    private readonly PayloadCursor _cursor;

    internal UpdatePart(WeightUpdate update, int index, IncomingTensor[] incoming)
    {
        _update = update;
        _incoming = incoming;
        _cursor = new PayloadCursor([.. incoming.SelectMany(tensor => tensor.Ranges)], 0, 0);
        Tensors = [.. update.Manifest.Tensors.Where(tensor => tensor.Part == index)];
        PayloadBytes = update.Manifest.PayloadBytesOf(index);
    }

    /// <summary>In the order of the manifest and of the payload.</summary>
    public IReadOnlyList<ManifestTensor> Tensors { get; }

    public long PayloadBytes { get; }

    /// <summary>Payload bytes read so far.</summary>
    public long ReceivedBytes => _cursor.Position;

    /// <summary>Whether all bytes of its tensors have been read.</summary>
    public bool IsComplete => Array.TrueForAll(_incoming, tensor => tensor.Taken == tensor.Bytes);

    /// <summary>Reads some of the payload. It must follow what was read before without a gap.</summary>
    /// <exception cref="UpdateFailedException">
    /// It is out of order, past the payload's end, unreadable, or contradicts the manifest. The update cannot continue.
    /// </exception>
    public async Task ReadFromAsync(PayloadSource source, CancellationToken cancellation = default)
    {
        Check(source.PayloadOffset, source.Bytes);
        try
        {
            await source.PrepareAsync(_cursor, cancellation).ConfigureAwait(false);
            if (source.Bytes > 0) _update.Touching();
            await source.ReadAsync(_cursor, cancellation).ConfigureAwait(false);
        }
        catch (UpdateFailedException e)
        {
            throw _update.Fail(e.Failure, e.Message);
        }
        catch (IOException e)
        {
            throw _update.Fail(UpdateFailure.Source, e.Message);
        }
        catch
        {
            _update.Stopped();
            throw;
        }
    }

    private void Check(long payloadOffset, long length)
    {
        _update.ThrowUnlessOpen();
        if (payloadOffset != ReceivedBytes)
            throw _update.Fail(UpdateFailure.Protocol, $"expected payload byte {ReceivedBytes} next, got {payloadOffset}");
        if (length < 0 || length > PayloadBytes - payloadOffset)
        {
            UInt128 received = (UInt128)payloadOffset + (UInt128)length;
            throw _update.Fail(UpdateFailure.Protocol, $"{received} bytes received of a payload of {PayloadBytes}");
        }
    }
}
