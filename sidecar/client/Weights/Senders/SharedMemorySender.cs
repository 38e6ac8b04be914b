namespace Rollout.Client;

/// <summary>
/// Through a file of /dev/shm, window by window, so that the sidecar reads one while the next is written. A file smaller than the payload
/// is a ring: a window is written over one that the sidecar has read.
/// </summary>
/// <param name="file">Kept from push to push.</param>
/// <param name="parallelism">Tensors written at once.</param>
internal sealed class SharedMemorySender(PayloadFile file, int parallelism) : IPayloadSender
{
    private const long SmallestWindow = 64 << 20; // one more message is then worth nothing
    private const long LargestWindow = 1 << 30;

    public async Task SendAsync(UpdateCall call, PayloadWriter payload, V1.UpdateMode mode, CancellationToken cancellationToken)
    {
        long bytes = payload.Bytes;
        bool ring = file.Capacity < bytes;
        long window = WindowBytes(bytes, file.Capacity);
        // While the sidecar stands still nothing should be left to do but read.
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
            var written = new V1.SharedMemory
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
