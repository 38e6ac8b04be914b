using Rollout.V1;

namespace Rollout.Client;

/// <summary>
/// Through shared memory, window by window, so that the sidecar reads one while the next is written. Memory smaller than the payload is
/// used as a ring: a window overwrites one that the sidecar has read. The memory is the sidecar's own, which it reads without a copy, or,
/// where that cannot be reached, a file in /dev/shm.
/// </summary>
/// <param name="most">Most bytes of the sidecar's memory to use; it may be larger because of another push.</param>
/// <param name="ownFile">Creates the file, or returns the one of the push before.</param>
/// <param name="parallelism">Tensors written at once.</param>
internal sealed class SharedMemorySender(long most, Func<PayloadFile> ownFile, int parallelism) : IPayloadSender
{
    private const long SmallestWindow = 64 << 20; // from here on another message costs nothing noticeable
    private const long LargestWindow = 1 << 30;

    public async Task<SentBy> SendAsync(UpdateCall call, PayloadWriter payload, V1.Ready ready, CancellationToken cancellationToken)
    {
        using PayloadFile? lent = ready.Segment is null ? null : PayloadFile.TryOpen(ready.Segment, most);
        await SendAsync(call, payload, lent ?? ownFile(), ready.Mode, cancellationToken);
        return new SentBy(PushTransport.SharedMemory, "the tensors are in this machine's memory");
    }

    private async Task SendAsync(
        UpdateCall call, PayloadWriter payload, PayloadFile file, V1.UpdateMode mode, CancellationToken cancellationToken)
    {
        long bytes = payload.Bytes;
        bool ring = file.Capacity < bytes;
        long window = WindowBytes(bytes, file.Capacity);
        // While no step runs, the sidecar should only have to read.
        if (mode == V1.UpdateMode.InPlace && !ring)
            window = Math.Max(1, bytes);
        long places = Math.Max(1, file.Capacity / window);
        for (long k = 0; k * window < bytes; k++)
        {
            long from = k * window;
            long to = Math.Min(from + window, bytes);
            long at = ring ? k % places * window : from;
            if (ring && k >= places)
                await call.ReceivedAsync((k - places + 1) * window, cancellationToken);
            await payload.WriteToAsync(file, from, to, at, parallelism, cancellationToken);
            SharedMemory written = new()
            {
                Path = file.Path,
                Offset = (ulong)at,
                PayloadOffset = (ulong)from,
                Bytes = (ulong)(to - from),
            };
            await call.SendAsync(new V1.UpdateRequest { SharedMemory = written }, cancellationToken);
        }
    }

    /// <summary>An eighth of the payload, within limits; in a ring at most half of the file.</summary>
    internal static long WindowBytes(long payload, long capacity)
    {
        long window = Math.Clamp(payload / 8, SmallestWindow, LargestWindow);
        return capacity < payload ? Math.Min(window, Math.Max(1, capacity / 2)) : window;
    }
}
