using Google.Protobuf;
using Grpc.Core;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.Kernels.Cuda;
using Rollout.Native;
using Rollout.V1;

namespace Rollout.Server.Weights;

/// <summary>Buckets that a rank on another device broadcasts to this server's device.</summary>
internal sealed class NcclTransport(Backend backend, OpenRanks open) : ITransport
{
    private const int DeviceUuidBytes = 16;
    private const uint MostRanks = 4096;
    private const long MostBucketBytes = 1 << 30; // two of them are kept on the device

    public async ValueTask<PayloadSource> SourceOfAsync(UpdateRequest message, UpdatePart part, CancellationToken cancellation)
    {
        Nccl nccl = message.Nccl;
        CheckFields(nccl);
        CudaPeers peers = backend.Peers ?? throw new RpcException(new Status(StatusCode.Unimplemented,
            $"nccl needs a CUDA device, and this server runs on {backend.Name}: send chunk, shared_memory or file"));
        if (nccl.DeviceUuid.Span.SequenceEqual(peers.DeviceUuid.Span))
            throw Wrong("cannot have two ranks on one device, and the sender is on this server's: send cuda_ipc");

        // Before the update is opened: in place, steps go on while ranks join.
        CudaRanks ranks = await Task.Run(() => Join(peers, nccl, cancellation), CancellationToken.None);
        Bucket[] buckets = [.. nccl.Buckets.Select(bucket => new Bucket((long)bucket.PayloadOffset, (long)bucket.Bytes))];
        long first = Math.Min(buckets[0].PayloadOffset, part.ReceivedBytes), end = buckets[^1].PayloadOffset + buckets[^1].Bytes;
        return new NcclSource(peers, ranks, (int)nccl.Root, buckets, first, end - first);
    }

    public void Dispose()
    {
    }

    private CudaRanks Join(CudaPeers peers, Nccl nccl, CancellationToken cancellation)
    {
        try
        {
            return open.Join(peers, nccl.UniqueId, (int)nccl.WorldSize, (int)nccl.Rank, cancellation);
        }
        catch (Exception e) when (e is CudaException or TimeoutException)
        {
            throw new UpdateFailedException(UpdateFailure.Source, $"nccl: {e.Message}");
        }
    }

    /// <summary>What is wrong whatever device there is.</summary>
    private static void CheckFields(Nccl nccl)
    {
        CheckLength("unique_id", nccl.UniqueId, CudaRanks.IdBytes);
        CheckLength("device_uuid", nccl.DeviceUuid, DeviceUuidBytes);
        if (nccl.WorldSize is < 2 or > MostRanks) throw Wrong($"world_size must be between 2 and {MostRanks}, it is {nccl.WorldSize}");
        if (nccl.Rank >= nccl.WorldSize) throw Wrong($"rank {nccl.Rank} is not one of {nccl.WorldSize}");
        if (nccl.Root >= nccl.WorldSize) throw Wrong($"root {nccl.Root} is not one of {nccl.WorldSize}");
        if (nccl.Root == nccl.Rank) throw Wrong($"root and rank are both {nccl.Rank}: this server receives");
        if (nccl.Buckets.Count == 0) throw Wrong("it names no buckets");
        ulong next = 0;
        for (int i = 0; i < nccl.Buckets.Count; i++)
        {
            NcclBucket bucket = nccl.Buckets[i];
            if (bucket.Bytes is 0 or > MostBucketBytes)
                throw Wrong($"buckets[{i}] has {bucket.Bytes} bytes, it must have 1 to {MostBucketBytes}");
            if (bucket.PayloadOffset < next || bucket.PayloadOffset > long.MaxValue - MostBucketBytes)
                throw Wrong($"buckets[{i}] begins at payload byte {bucket.PayloadOffset}, the one before it ends at {next}");
            next = bucket.PayloadOffset + bucket.Bytes;
        }
    }

    private static void CheckLength(string field, ByteString value, int bytes)
    {
        if (value.Length != bytes) throw Wrong($"{field} has {value.Length} bytes, it must have {bytes}");
    }

    private static UpdateFailedException Wrong(string what) => new(UpdateFailure.Protocol, $"nccl {what}");
}
