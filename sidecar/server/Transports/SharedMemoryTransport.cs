using Rollout.Engine;
using Rollout.Native;
using Rollout.V1;

namespace Rollout.Server.Transports;

/// <summary>
/// Windows of the segment that was lent, read where they stand; or of a file in /dev/shm, which the client could cut short at any moment and
/// which therefore is copied. Smaller than the payload, either is a ring.
/// </summary>
internal sealed class SharedMemoryTransport(SealedMemory? segment) : ITransport
{
    private SharedMemoryFile? _file;

    public async Task ReceiveAsync(UpdateRequest message, WeightUpdate update, CancellationToken cancellation)
    {
        SharedMemory window = message.SharedMemory;
        long left = update.Manifest.PayloadBytes - update.ReceivedBytes;
        if (window.PayloadOffset > long.MaxValue || window.Bytes > long.MaxValue)
            throw new UpdateFailedException(UpdateFailure.Protocol, $"a window of {window.Bytes} bytes at {window.PayloadOffset} is past any payload");
        long bytes = window.Bytes == 0 ? left : (long)window.Bytes;

        // Uses every core and blocks meanwhile: not on the thread that serves the connection.
        Action read = window.Path == segment?.Path ? ReadSegment(window, bytes, update, cancellation) : ReadFile(window, bytes, update, cancellation);
        await Task.Run(read, CancellationToken.None);
    }

    private Action ReadSegment(SharedMemory window, long bytes, WeightUpdate update, CancellationToken cancellation)
    {
        if (window.Offset > (ulong)segment!.Bytes || (ulong)bytes > (ulong)segment.Bytes - window.Offset)
            throw new UpdateFailedException(UpdateFailure.Source, $"the segment has {segment.Bytes} bytes, too few for {bytes} at offset {window.Offset}");
        return () => update.ReadFrom(segment, (long)window.Offset, (long)window.PayloadOffset, bytes, cancellation);
    }

    private Action ReadFile(SharedMemory window, long bytes, WeightUpdate update, CancellationToken cancellation)
    {
        if (_file?.Path != window.Path)
        {
            _file?.Dispose();
            _file = SharedMemoryFile.Open(window.Path);
        }

        _file.ThrowUnlessHolding(window.Offset, bytes);
        return () => update.ReadFrom(_file.Handle, (long)window.Offset, (long)window.PayloadOffset, bytes, cancellation);
    }

    public void Dispose() => _file?.Dispose();
}
