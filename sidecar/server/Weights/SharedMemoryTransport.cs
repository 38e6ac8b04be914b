using Rollout.Engine;
using Rollout.Native;
using Rollout.V1;

namespace Rollout.Server.Weights;

/// <summary>
/// Windows of the segment that was lent, read without a copy; or of a file in /dev/shm, which is copied because the client could truncate
/// it at any time. Memory smaller than the payload is used as a ring.
/// </summary>
internal sealed class SharedMemoryTransport(SealedMemory? segment) : ITransport
{
    private SharedMemoryFile? _file;

    public ValueTask<PayloadSource> SourceOfAsync(UpdateRequest message, UpdatePart part, CancellationToken cancellation)
        => new(SourceOf(message, part));

    private PayloadSource SourceOf(UpdateRequest message, UpdatePart part)
    {
        SharedMemory window = message.SharedMemory;
        long left = part.PayloadBytes - part.ReceivedBytes;
        if (window.PayloadOffset > long.MaxValue || window.Bytes > long.MaxValue)
        {
            throw new UpdateFailedException(
                UpdateFailure.Protocol, $"a window of {window.Bytes} bytes at {window.PayloadOffset} is past any payload");
        }

        long bytes = window.Bytes == 0 ? left : (long)window.Bytes;
        return window.Path == segment?.Path ? InSegment(segment, window, bytes) : InFile(window, bytes);
    }

    private static SharedMemorySource InSegment(SealedMemory segment, SharedMemory window, long bytes)
    {
        if (window.Offset > (ulong)segment.Bytes || (ulong)bytes > (ulong)segment.Bytes - window.Offset)
        {
            throw new UpdateFailedException(
                UpdateFailure.Source, $"the segment has {segment.Bytes} bytes, too few for {bytes} at offset {window.Offset}");
        }

        return new SharedMemorySource(segment, (long)window.Offset, (long)window.PayloadOffset, bytes);
    }

    private FileSource InFile(SharedMemory window, long bytes)
    {
        if (_file?.Path != window.Path)
        {
            _file?.Dispose();
            _file = SharedMemoryFile.Open(window.Path);
        }

        _file.ThrowUnlessHolding(window.Offset, bytes);
        // Without an owner: the file stays open for the next window.
        return new FileSource(_file.Handle, (long)window.Offset, (long)window.PayloadOffset, bytes);
    }

    public void Dispose() => _file?.Dispose();
}
