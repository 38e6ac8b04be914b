using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace Rollout.Kernels.Cuda;

/// <summary>
/// The kernel of apply.cu and its table: which pieces of which tensors to read (see <see cref="TensorDigest"/>), and where their elements
/// go. Memory grows to the largest table and is kept.
/// </summary>
/// <param name="device">Where the tensors and the weights are.</param>
/// <param name="kernels">Of that device.</param>
internal sealed unsafe class CudaApply(CudaDevice device, CudaKernels kernels) : IDisposable
{
    private const int Threads = 256;
    private const long LeastBytes = 64 << 10;

    private readonly List<Piece> _pieces = [];
    private readonly List<Store> _stores = [];
    private PinnedBuffer? _pinned; // the table on its way to the device, and then the digests on their way back
    private DeviceBuffer? _table, _digests;

    public long Launches { get; private set; }

    public long Bytes { get; private set; }

    /// <summary>As in apply.cu.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct Piece
    {
        public nuint Source;
        public uint Bytes;
        public DType Type;
        public uint FirstStore, Stores;
    }

    /// <summary>As in apply.cu.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct Store
    {
        public nuint Destination;
        public uint First, End;
        public uint IsVector;
        public uint Padding;
    }

    /// <summary>Elements [First, First + Count) of a tensor, and the address of the first one's place.</summary>
    internal readonly record struct Range(long First, long Count, nuint Destination, bool IsVector, int StoredBytes);

    /// <summary>Adds a tensor to the next <see cref="Run"/>.</summary>
    public void Add(nuint source, long bytes, DType type, ReadOnlySpan<Range> ranges)
    {
        int first = 0;
        for (long at = 0; at < bytes; at += TensorDigest.PieceBytes)
        {
            uint length = (uint)Math.Min(TensorDigest.PieceBytes, bytes - at);
            long element = at / type.Size(), end = element + (length / type.Size());
            uint firstStore = (uint)_stores.Count;
            for (int r = first; r < ranges.Length && ranges[r].First < end; r++)
            {
                Range range = ranges[r];
                long from = Math.Max(range.First, element), to = Math.Min(range.First + range.Count, end);
                if (to <= from)
                {
                    first = r + 1; // it ends before this piece
                    continue;
                }

                _stores.Add(new Store
                {
                    Destination = range.Destination + (nuint)((from - range.First) * range.StoredBytes),
                    First = (uint)(from - element),
                    End = (uint)(to - element),
                    IsVector = range.IsVector ? 1u : 0u,
                });
            }

            _pieces.Add(new Piece
            {
                Source = source + (nuint)at,
                Bytes = length,
                Type = type,
                FirstStore = firstStore,
                Stores = (uint)_stores.Count - firstStore,
            });
        }

        Bytes += bytes;
    }

    /// <summary>
    /// Reads and stores what was added, and returns the digests of its pieces. The caller holds <see cref="CudaDevice.Copies"/>, from the
    /// first <see cref="Add"/> on.
    /// </summary>
    public byte[] Run()
    {
        if (_pieces.Count == 0)
            return [];
        ReadOnlySpan<byte> pieces = MemoryMarshal.AsBytes(CollectionsMarshal.AsSpan(_pieces));
        ReadOnlySpan<byte> stores = MemoryMarshal.AsBytes(CollectionsMarshal.AsSpan(_stores));
        long table = pieces.Length + (long)stores.Length, digests = (long)_pieces.Count * TensorDigest.Length;
        Reserve(ref _table, table);
        Reserve(ref _digests, digests);
        if (_pinned is null || _pinned.Bytes < Math.Max(table, digests))
        {
            _pinned?.Dispose();
            _pinned = null;
            _pinned = device.AllocatePinned(Room(Math.Max(table, digests)));
        }

        pieces.CopyTo(new Span<byte>(_pinned.Pointer, pieces.Length));
        stores.CopyTo(new Span<byte>(_pinned.Pointer + pieces.Length, stores.Length));
        nint stream = device.Beside.Value;
        Driver.cuMemcpyHtoDAsync_v2(_table.Pointer, _pinned.Pointer, (nuint)table, stream).ThrowIfFailed(table);
        kernels.Launch(kernels.Apply, device.Beside, new Grid(_pieces.Count), Threads, 0,
            _table.Pointer, _table.Pointer + (nuint)pieces.Length, _digests.Pointer);
        Launches++;
        Driver.cuMemcpyDtoHAsync_v2(_pinned.Pointer, _digests.Pointer, (nuint)digests, stream).ThrowIfFailed(digests);
        device.Beside.Synchronize();
        return new ReadOnlySpan<byte>(_pinned.Pointer, (int)digests).ToArray();
    }

    /// <summary>Drops what was added.</summary>
    public void Clear()
    {
        _pieces.Clear();
        _stores.Clear();
    }

    public void Dispose()
    {
        _pinned?.Dispose();
        _table?.Dispose();
        _digests?.Dispose();
    }

    private void Reserve([System.Diagnostics.CodeAnalysis.NotNull] ref DeviceBuffer? buffer, long bytes)
    {
        if (buffer is not null && buffer.Bytes >= bytes)
            return;
        buffer?.Dispose();
        buffer = null;
        buffer = device.Allocate(Room(bytes));
    }

    private static long Room(long bytes) => (long)System.Numerics.BitOperations.RoundUpToPowerOf2((ulong)Math.Max(bytes, LeastBytes));
}
