using Google.Protobuf;
using Rollout.Native;

namespace Rollout.Client;

/// <summary>
/// Sends tensors from a GPU's memory. A sidecar on the same GPU is told where they are (CUDA IPC) and reads them there: allocations are
/// named once each, however many tensors they hold, and memory that cannot be named, because it is mapped to reserved addresses (PyTorch's
/// expandable segments), is packed into two buckets in turn. To a sidecar on another GPU such buckets are broadcast (NCCL).
/// </summary>
internal sealed class CudaSender : IDeviceSender
{
    private const int Root = 0, Sidecar = 1, Ranks = 2;

    private const long MostBucketBytes = 256 << 20;

    private static readonly TimeSpan s_joinWithin = TimeSpan.FromSeconds(60);

    private TensorMemory? _memory;
    private TensorRanks? _ranks;
    private byte[] _id = []; // of their group
    private DeviceBucket?[] _buckets = [null, null];
    private IReadOnlyList<DeviceTensor> _tensors = [];
    private nint _stream;
    private string? _problem;

    /// <summary>For tests.</summary>
    internal long MaxBucketBytes { get; init; } = MostBucketBytes;

    /// <summary>For tests: called before a bucket is broadcast.</summary>
    internal Action<int>? BeforeBroadcast { get; init; }

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

    public (PushTransport? Transport, string Reason) Choose(V1.Ready ready)
    {
        if (ready.DeviceUuid.IsEmpty)
            return (null, "the sidecar runs on a CPU");
        if (_problem is not null)
            return (null, _problem);
        if (ready.DeviceUuid.Span.SequenceEqual(_memory!.DeviceUuid.Span))
            return (PushTransport.CudaIpc, "trainer and sidecar use the same GPU");
        string where = $"the tensors are on {Name(_memory.DeviceUuid.Span)}, the sidecar is on {Name(ready.DeviceUuid.Span)}";
        return TensorRanks.WhyNone is { } none ? (null, $"{where}, and {none}") : (PushTransport.Nccl, where);

        static string Name(ReadOnlySpan<byte> uuid) => $"GPU-{new Guid(uuid, bigEndian: true)}"; // as nvidia-smi writes it
    }

    public async Task<SentBy> SendAsync(UpdateCall call, PayloadLayout layout, V1.Ready ready, CancellationToken cancellationToken)
    {
        (PushTransport? transport, string reason) = Choose(ready);
        int buckets = 1;
        if (transport == PushTransport.Nccl)
        {
            buckets = await BroadcastAsync(call, layout, ready, cancellationToken);
        }
        else if (_tensors.All(tensor => tensor.Shape.Contains(0) || _memory!.CanShare(tensor.Address)))
        {
            await call.SendAsync(new V1.UpdateRequest { CudaIpc = InPlace(layout) }, cancellationToken);
        }
        else
        {
            reason += "; the tensors' memory cannot be shared and was copied there";
            buckets = await SendBucketsAsync(call, layout, cancellationToken);
        }

        return new SentBy(transport!.Value, reason, Hashed: false, buckets);
    }

    public void Disconnect()
    {
        _ranks?.Dispose();
        _ranks = null;
    }

    public void Dispose()
    {
        Disconnect();
        foreach (DeviceBucket? bucket in _buckets)
            bucket?.Dispose();
        _buckets = [null, null];
        _memory?.Dispose();
        _memory = null;
    }

    private V1.CudaIpc InPlace(PayloadLayout layout)
    {
        V1.CudaIpc message = new() { ReadyEvent = UnsafeByteOperations.UnsafeWrap(_memory!.RecordReady(_stream)) };
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

    private async Task<int> SendBucketsAsync(UpdateCall call, PayloadLayout layout, CancellationToken cancellationToken)
    {
        long[] ends = [0, 0]; // what must have been received before a bucket may be filled again
        int sent = 0;
        foreach ((long from, long to) in Cuts(layout, Capacity(layout)))
        {
            int turn = sent++ % 2;
            await call.ReceivedAsync(ends[turn], cancellationToken);
            DeviceBucket bucket = Fill(turn, layout, from, to);
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
        }

        return sent;
    }

    /// <summary>A bucket is filled while the one before is on its way.</summary>
    private async Task<int> BroadcastAsync(UpdateCall call, PayloadLayout layout, V1.Ready ready, CancellationToken cancellationToken)
    {
        (long From, long To)[] cuts = [.. Cuts(layout, Capacity(layout))];
        if (cuts.Length == 0)
            return 0;
        bool joined = _ranks is not null && ready.NcclUniqueId.Span.SequenceEqual(_id);
        if (!joined)
        {
            Disconnect();
            _id = TensorRanks.NewId();
        }

        V1.Nccl message = new()
        {
            UniqueId = UnsafeByteOperations.UnsafeWrap(_id),
            Rank = Sidecar,
            Root = Root,
            WorldSize = Ranks,
            DeviceUuid = UnsafeByteOperations.UnsafeWrap(_memory!.DeviceUuid),
            Buckets = { cuts.Select(cut => new V1.NcclBucket { PayloadOffset = (ulong)cut.From, Bytes = (ulong)(cut.To - cut.From) }) },
        };
        await call.SendAsync(new V1.UpdateRequest { Nccl = message }, cancellationToken);
        try
        {
            if (!joined)
                await Task.Run(() => _ranks = _memory.Join(_id, Ranks, Root, s_joinWithin, cancellationToken), CancellationToken.None);
            for (int i = 0; i < cuts.Length; i++)
            {
                DeviceBucket bucket = Fill(i % 2, layout, cuts[i].From, cuts[i].To);
                await Task.Run(() => _ranks!.Wait(cancellationToken), CancellationToken.None); // for the bucket before
                BeforeBroadcast?.Invoke(i);
                _ranks!.Broadcast(bucket, cuts[i].To - cuts[i].From, Root, _stream);
            }

            await Task.Run(() => _ranks!.Wait(cancellationToken), CancellationToken.None);
            return cuts.Length;
        }
        catch
        {
            cancellationToken.ThrowIfCancellationRequested(); // the sidecar says why
            throw;
        }
    }

    private long Capacity(PayloadLayout layout) => Math.Min(MaxBucketBytes, layout.PayloadBytes + WeightDigest.PieceBytes);

    /// <summary>Queues copying payload bytes [from, to) into a bucket.</summary>
    private DeviceBucket Fill(int turn, PayloadLayout layout, long from, long to)
    {
        DeviceBucket bucket = Bucket(turn, Capacity(layout));
        for (int i = 0; i < _tensors.Count; i++)
        {
            long start = (long)layout.Manifest[i].Offset, first = Math.Max(from, start), last = Math.Min(to, start + layout.Sizes[i]);
            if (last > first)
                bucket.CopyFrom(first - from, _tensors[i].Address + (nint)(first - start), last - first, _stream);
        }

        return bucket;
    }

    /// <summary>Parts of the payload of at most so many bytes, cut between tensors or between pieces of a tensor's digest.</summary>
    /// <param name="layout">The payload.</param>
    /// <param name="capacity">At least <see cref="WeightDigest.PieceBytes"/>.</param>
    internal static IEnumerable<(long From, long To)> Cuts(PayloadLayout layout, long capacity)
    {
        (long From, long To)? part = null;
        for (int i = 0; i < layout.Manifest.Count; i++)
        {
            long start = (long)layout.Manifest[i].Offset, size = layout.Sizes[i];
            for (long at = 0; at < size;)
            {
                long from = part?.From ?? start + at, room = from + capacity - (start + at);
                long take = size - at <= room ? size - at : room / WeightDigest.PieceBytes * WeightDigest.PieceBytes;
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
