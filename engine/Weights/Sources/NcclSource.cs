using Rollout.Kernels.Cuda;
using Rollout.Native;

namespace Rollout.Engine;

/// <summary>Bytes [PayloadOffset, PayloadOffset + Bytes) of a payload, which travel together.</summary>
public readonly record struct Bucket(long PayloadOffset, long Bytes);

/// <summary>
/// A part of a payload that another rank broadcasts to the backend's device: each bucket is read there as a <see cref="DeviceSource"/>,
/// while the next one arrives.
/// </summary>
/// <param name="peers">The backend's.</param>
/// <param name="ranks">Have joined.</param>
/// <param name="root">The rank that sends.</param>
/// <param name="buckets">Ascending; gaps between tensors need not be covered.</param>
/// <param name="payloadOffset">Of the part's first byte.</param>
/// <param name="bytes">Its length.</param>
public sealed class NcclSource(
    CudaPeers peers, CudaRanks ranks, int root, IReadOnlyList<Bucket> buckets, long payloadOffset, long bytes)
    : PayloadSource(payloadOffset, bytes, owner: null)
{
    internal override async Task ReadAsync(PayloadCursor cursor, CancellationToken cancellation)
    {
        try
        {
            long[] sizes = [.. buckets.Select(bucket => bucket.Bytes)];
            await ranks.ReceiveAsync(sizes, root, ReadBucketAsync, cancellation).ConfigureAwait(false);
        }
        catch (Exception e) when (e is CudaException or TimeoutException)
        {
            throw new UpdateFailedException(UpdateFailure.Source, $"nccl: {e.Message}");
        }
        catch (ObjectDisposedException)
        {
            throw new UpdateFailedException(UpdateFailure.Source, "nccl: the group of ranks was left before its bytes came");
        }
        catch (OutOfMemoryException e)
        {
            throw new UpdateFailedException(UpdateFailure.Source, $"nccl: no memory for two buckets: {e.Message}");
        }

        async Task ReadBucketAsync(int i, DeviceBytes memory)
        {
            Bucket bucket = buckets[i];
            long from = Math.Min(bucket.PayloadOffset, cursor.Position), end = bucket.PayloadOffset + bucket.Bytes;
            DevicePart part = new(memory, 0, bucket.PayloadOffset, bucket.Bytes);
            DeviceSource source = new(peers, [part], default, from, end - from);
            await source.PrepareAsync(cursor, cancellation).ConfigureAwait(false);
            await source.ReadAsync(cursor, cancellation).ConfigureAwait(false);
        }
    }
}
