using Google.Protobuf;
using Grpc.Core;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.Kernels.Cuda;
using Rollout.Native;
using Rollout.V1;

namespace Rollout.Server.Weights;

/// <summary>Ranges of another process's memory on this server's device, read where they are.</summary>
internal sealed class CudaIpcTransport(Backend backend, OpenMemory memory) : ITransport
{
    private const int DeviceUuidBytes = 16;

    /// <summary>Allocations opened for this update: those of earlier ones are still open.</summary>
    public int Opened { get; private set; }

    public ValueTask<PayloadSource> SourceOfAsync(UpdateRequest message, UpdatePart part, CancellationToken cancellation)
        => new(SourceOf(message, part));

    private PayloadSource SourceOf(UpdateRequest message, UpdatePart part)
    {
        CudaIpc ipc = message.CudaIpc;
        CheckFields(ipc);
        CudaPeers peers = backend.Peers ?? throw new RpcException(new Status(StatusCode.Unimplemented,
            $"cuda_ipc needs a CUDA device, and this server runs on {backend.Name}: send chunk, shared_memory or file"));
        DeviceBytes[] allocations = [.. ipc.Allocations.Select((allocation, i) => Open(peers, allocation, i))];
        DevicePart[] parts = new DevicePart[ipc.Ranges.Count];
        for (int i = 0; i < parts.Length; i++)
        {
            CudaRange range = ipc.Ranges[i];
            DeviceBytes allocation = allocations[range.Allocation];
            if (range.Offset > (ulong)allocation.Bytes || range.Bytes > (ulong)allocation.Bytes - range.Offset)
            {
                throw Wrong($"ranges[{i}] has {range.Bytes} bytes at offset {range.Offset} of allocation {range.Allocation}, "
                    + $"which has {allocation.Bytes}");
            }

            parts[i] = new DevicePart(allocation, (long)range.Offset, (long)range.PayloadOffset, (long)range.Bytes);
        }

        // A gap before the first range is passed over, where it is one between tensors.
        long first = Math.Min(parts[0].PayloadOffset, part.ReceivedBytes), end = parts[^1].PayloadOffset + parts[^1].Bytes;
        return new DeviceSource(peers, parts, ipc.ReadyEvent.Memory, first, end - first);
    }

    public void Dispose()
    {
    }

    private DeviceBytes Open(CudaPeers peers, CudaAllocation allocation, int i)
    {
        if (!allocation.DeviceUuid.Span.SequenceEqual(peers.DeviceUuid.Span))
        {
            throw new UpdateFailedException(UpdateFailure.Source,
                $"cuda_ipc allocations[{i}] is on device {Name(allocation.DeviceUuid.Span)}, and this server runs on "
                + $"{Name(peers.DeviceUuid.Span)}, {backend.Name}: send shared_memory, or place both on one device");
        }

        try
        {
            DeviceBytes bytes = memory.Open(peers, allocation.Handle, out bool opened);
            if (opened) Opened++;
            return bytes;
        }
        catch (CudaException e)
        {
            throw new UpdateFailedException(UpdateFailure.Source, $"cuda_ipc allocations[{i}] cannot be opened, as it is when its memory "
                + $"has been freed, its process has ended, or it is not of cuMemAlloc or cudaMalloc: {e.Message}");
        }
    }

    /// <summary>What is wrong whatever device there is.</summary>
    private static void CheckFields(CudaIpc ipc)
    {
        for (int i = 0; i < ipc.Allocations.Count; i++)
        {
            CudaAllocation allocation = ipc.Allocations[i];
            if (allocation.Kind != CudaHandleKind.Legacy) throw Wrong($"allocations[{i}]: kind must be LEGACY, it is {allocation.Kind}");
            CheckLength($"allocations[{i}]: handle", allocation.Handle, CudaPeers.HandleBytes);
            CheckLength($"allocations[{i}]: device_uuid", allocation.DeviceUuid, DeviceUuidBytes);
        }

        if (!ipc.ReadyEvent.IsEmpty) CheckLength("ready_event", ipc.ReadyEvent, CudaPeers.HandleBytes);
        if (ipc.Ranges.Count == 0) throw Wrong("it names no ranges");
        ulong next = 0;
        for (int i = 0; i < ipc.Ranges.Count; i++)
        {
            CudaRange range = ipc.Ranges[i];
            if (range.Allocation >= ipc.Allocations.Count)
                throw Wrong($"ranges[{i}] is in allocation {range.Allocation} of {ipc.Allocations.Count}");
            if (range.Bytes == 0) throw Wrong($"ranges[{i}] has 0 bytes");
            if (range.PayloadOffset > long.MaxValue || range.Bytes > long.MaxValue - range.PayloadOffset)
                throw Wrong($"ranges[{i}], {range.Bytes} bytes at {range.PayloadOffset}, is past any payload");
            if (range.PayloadOffset < next)
                throw Wrong($"ranges[{i}] begins at payload byte {range.PayloadOffset}, the one before it ends at {next}");
            next = range.PayloadOffset + range.Bytes;
        }
    }

    private static void CheckLength(string field, ByteString value, int bytes)
    {
        if (value.Length != bytes) throw Wrong($"{field} has {value.Length} bytes, it must have {bytes}");
    }

    /// <summary>As nvidia-smi writes it.</summary>
    private static string Name(ReadOnlySpan<byte> uuid) => $"GPU-{new Guid(uuid, bigEndian: true)}";

    private static UpdateFailedException Wrong(string what) => new(UpdateFailure.Protocol, $"cuda_ipc {what}");
}
