using Google.Protobuf;
using Rollout.Native;

namespace Rollout.Client.Torch;

/// <summary>
/// Tells a sidecar on the same GPU where tensors are (CUDA IPC). It reads them there; nothing is copied here. Allocations are named once
/// each, however many tensors they hold. Memory that cannot be named, because it is mapped to reserved addresses (PyTorch's expandable
/// segments), is packed into two buckets in turn.
/// </summary>
internal sealed class CudaSender : IDeviceSender
{
    /// <summary>Of a tensor whose bytes are split between buckets: the digest's pieces must not be cut.</summary>
    private const long SplitBytes = 131_072;

    private const long MostBucketBytes = 256 << 20;

    private TensorMemory? _memory;
    private DeviceBucket?[] _buckets = [null, null];
    private IReadOnlyList<DeviceTensor> _tensors = [];
    private nint _stream;
    private string? _problem;

    /// <summary>For tests.</summary>
    internal long MaxBucketBytes { get; init; } = MostBucketBytes;

    /// <summary>The tensors of the next push.</summary>
    /// <param name="tensors">At least one.</param>
    /// <param name="stream">The CUDA stream that has written them; 0: the legacy default stream.</param>
    public void Use(IReadOnlyList<DeviceTensor> tensors, nint stream)
    {
        (_tensors, _stream, _problem) = (tensors, stream, null);
        if (_memory is null || !_memory.Has(tensors[0].Address))
        {
            Dispose();
            _memory = TensorMemory.Of(tensors[0].Address);
        }

        if (tensors.FirstOrDefault(tensor => !_memory.Has(tensor.Address)) is { } other)
            _problem = $"'{other.Name}' is not on the GPU that has '{tensors[0].Name}'";
    }

    public string? WhyNot(V1.Ready ready)
    {
        if (ready.DeviceUuid.IsEmpty)
            return "the sidecar runs on a CPU";
        if (_problem is not null)
            return _problem;
        return ready.DeviceUuid.Span.SequenceEqual(_memory!.DeviceUuid.Span) ? null
            : $"the tensors are on GPU {Convert.ToHexStringLower(_memory.DeviceUuid.Span)}, the sidecar is on "
                + Convert.ToHexStringLower(ready.DeviceUuid.Span);
    }

    public async Task<SentBy> SendAsync(UpdateCall call, PayloadLayout layout, V1.Ready ready, CancellationToken cancellationToken)
    {
        if (_tensors.All(tensor => tensor.Shape.Contains(0) || _memory!.CanShare(tensor.Address)))
        {
            await call.SendAsync(new V1.UpdateRequest { CudaIpc = InPlace(layout) }, cancellationToken);
            return new SentBy(PushTransport.CudaIpc, "trainer and sidecar use the same GPU", Hashed: false);
        }

        await SendBucketsAsync(call, layout, cancellationToken);
        const string Reason = "trainer and sidecar use the same GPU; the tensors' memory cannot be shared and was copied there";
        return new SentBy(PushTransport.CudaIpc, Reason, Hashed: false);
    }

    public void Dispose()
    {
        foreach (DeviceBucket? bucket in _buckets)
            bucket?.Dispose();
        _buckets = [null, null];
        _memory?.Dispose();
        _memory = null;
    }

    private V1.CudaIpc InPlace(PayloadLayout layout)
    {
        // The trainer may have freed memory since the last push, and the same address may be another allocation.
        _memory!.ForgetHandles();
        V1.CudaIpc message = new() { ReadyEvent = UnsafeByteOperations.UnsafeWrap(_memory.RecordReady(_stream)) };
        Dictionary<nint, uint> indices = [];
        for (int i = 0; i < _tensors.Count; i++)
        {
            if (layout.Sizes[i] == 0)
                continue;
            (nint start, long _) = _memory.AllocationOf(_tensors[i].Address);
            if (!indices.TryGetValue(start, out uint index))
            {
                indices.Add(start, index = (uint)message.Allocations.Count);
                message.Allocations.Add(Allocation(start));
            }

            Add(message.Ranges, index, (ulong)(_tensors[i].Address - start), layout.Manifest[i].Offset, (ulong)layout.Sizes[i]);
        }

        return message;
    }

    /// <summary>Adds a range, or extends the last one where both are parts of a flat buffer that is laid out as the payload.</summary>
    private static void Add(IList<V1.CudaRange> ranges, uint allocation, ulong offset, ulong payloadOffset, ulong bytes)
    {
        if (ranges.Count > 0 && ranges[^1] is { } last && last.Allocation == allocation
            && offset >= last.Offset && offset - last.Offset == payloadOffset - last.PayloadOffset)
        {
            last.Bytes = payloadOffset + bytes - last.PayloadOffset;
            return;
        }

        ranges.Add(new V1.CudaRange { Allocation = allocation, Offset = offset, PayloadOffset = payloadOffset, Bytes = bytes });
    }

    private async Task SendBucketsAsync(UpdateCall call, PayloadLayout layout, CancellationToken cancellationToken)
    {
        long capacity = Math.Min(MaxBucketBytes, layout.PayloadBytes + SplitBytes);
        long[] ends = [0, 0]; // what must have been received before a bucket may be filled again
        int turn = 0;
        foreach ((long from, long to) in Cuts(layout, capacity))
        {
            await call.ReceivedAsync(ends[turn], cancellationToken);
            DeviceBucket bucket = Bucket(turn, capacity);
            for (int i = 0; i < _tensors.Count; i++)
            {
                long start = (long)layout.Manifest[i].Offset, first = Math.Max(from, start), last = Math.Min(to, start + layout.Sizes[i]);
                if (last > first)
                    bucket.CopyFrom(first - from, _tensors[i].Address + (nint)(first - start), last - first, _stream);
            }

            (nint allocation, long _) = _memory!.AllocationOf(bucket.Pointer);
            V1.CudaRange range = new()
            {
                Offset = (ulong)(bucket.Pointer - allocation),
                PayloadOffset = (ulong)from,
                Bytes = (ulong)(to - from),
            };
            V1.CudaIpc message = new()
            {
                ReadyEvent = UnsafeByteOperations.UnsafeWrap(_memory.RecordReady(_stream)),
                Allocations = { Allocation(allocation) },
                Ranges = { range },
            };
            await call.SendAsync(new V1.UpdateRequest { CudaIpc = message }, cancellationToken);
            ends[turn] = to;
            turn ^= 1;
        }
    }

    /// <summary>Parts of the payload of at most so many bytes, cut between tensors or between pieces of one.</summary>
    /// <param name="layout">The payload.</param>
    /// <param name="capacity">At least <see cref="SplitBytes"/>.</param>
    internal static IEnumerable<(long From, long To)> Cuts(PayloadLayout layout, long capacity)
    {
        (long From, long To)? part = null;
        for (int i = 0; i < layout.Manifest.Count; i++)
        {
            long start = (long)layout.Manifest[i].Offset, size = layout.Sizes[i];
            for (long at = 0; at < size;)
            {
                long from = part?.From ?? start + at, room = from + capacity - (start + at);
                long take = size - at <= room ? size - at : room / SplitBytes * SplitBytes;
                if (take <= 0)
                {
                    yield return part!.Value;
                    part = null;
                    continue;
                }

                at += take;
                part = (from, start + at);
            }
        }

        if (part is { } last)
            yield return last;
    }

    private DeviceBucket Bucket(int turn, long bytes)
    {
        if (_buckets[turn] is { } old && old.Bytes >= bytes)
            return old;
        _buckets[turn]?.Dispose();
        _buckets[turn] = null;
        return _buckets[turn] = _memory!.Allocate(bytes);
    }

    private V1.CudaAllocation Allocation(nint start) => new()
    {
        Kind = V1.CudaHandleKind.Legacy,
        Handle = UnsafeByteOperations.UnsafeWrap(_memory!.HandleOf(start)),
        DeviceUuid = UnsafeByteOperations.UnsafeWrap(_memory.DeviceUuid),
    };
}
