using Rollout.Engine;
using Rollout.V1;

namespace Rollout.Server.Transports;

/// <summary>Windows of a file in /dev/shm, which stays open from window to window. Smaller than the payload, it is a ring.</summary>
internal sealed class SharedMemoryTransport : ITransport
{
    private SharedMemoryFile? _file;

    public async Task ReceiveAsync(UpdateRequest message, WeightUpdate update, CancellationToken cancellation)
    {
        SharedMemory window = message.SharedMemory;
        if (_file?.Path != window.Path)
        {
            _file?.Dispose();
            _file = SharedMemoryFile.Open(window.Path);
        }

        long left = update.Manifest.PayloadBytes - update.ReceivedBytes;
        if (window.PayloadOffset > long.MaxValue || window.Bytes > long.MaxValue)
            throw new UpdateFailedException(UpdateFailure.Protocol, $"a window of {window.Bytes} bytes at {window.PayloadOffset} is past any payload");
        long bytes = window.Bytes == 0 ? left : (long)window.Bytes;
        _file.ThrowUnlessHolding(window.Offset, bytes);

        // Uses every core and blocks meanwhile: not on the thread that serves the connection.
        await Task.Run(() => update.ReadFrom(_file.Handle, (long)window.Offset, (long)window.PayloadOffset, bytes, cancellation),
            CancellationToken.None);
    }

    public void Dispose() => _file?.Dispose();
}
