using System.Runtime.InteropServices;
using Rollout.Kernels;
using Rollout.Kernels.Cuda;

namespace Rollout.Engine;

/// <summary>
/// One tensor of a payload, or a slice of one, being written to its place in a weight set: hashed as sent, stored in the device's layout.
/// </summary>
internal sealed class IncomingTensor
{
    /// <summary>Of a tensor sent whole, about what one core takes: large tensors are cut for all cores.</summary>
    private const long MostRangeBytes = 4 << 20;

    private readonly ManifestTensor _tensor;
    private readonly Backend _backend;
    private readonly WeightSet _destination;
    private readonly uint[]? _indices; // of the values that follow; null: all elements, in order
    private readonly byte[] _pieces;   // digests
    private readonly long _firstElement; // of the tensor's: where a slice begins

    public IncomingTensor(ManifestTensor tensor, LoadEntry entry, Backend backend, WeightSet set)
    {
        _tensor = tensor;
        _backend = backend;
        _destination = set;
        Entry = entry;
        Bytes = tensor.Bytes;
        _firstElement = tensor.FirstRow * tensor.RowElements;
        _pieces = new byte[TensorDigest.Pieces(Bytes) * TensorDigest.Length];
        if (tensor.SparseCount is { } count) _indices = new uint[count];
        Ranges = Cut();
    }

    public string Name => _tensor.Name;

    public long FirstRow => _tensor.FirstRow;

    public LoadEntry Entry { get; }

    /// <summary>Where in the payload it begins.</summary>
    public long Start => _tensor.Offset;

    public long Bytes { get; }

    public int ElementBytes => _tensor.Type.Size();

    /// <summary>Whether some of its elements are sent, and not all.</summary>
    public bool IsSparse => _indices is not null;

    /// <summary>Bytes of the indices that come first; 0 where all elements are sent.</summary>
    public long IndexBytes => (_indices?.Length ?? 0L) * sizeof(uint);

    /// <summary>What the device stores at once: a row of a matrix, or a single element.</summary>
    public int UnitBytes => _indices is null ? (int)Entry.RowElements * ElementBytes : ElementBytes;

    /// <summary>What the device stores fastest at once.</summary>
    public long FastBytes => _indices is null && Entry.RowElements > 1 ? _backend.WriteRows * (long)UnitBytes : 1;

    /// <summary>Its bytes in ascending order, in parts that may be taken in any order and at the same time: at least one.</summary>
    public IReadOnlyList<IncomingRange> Ranges { get; }

    public long Taken => Ranges.Sum(range => range.Taken);

    /// <summary>Bytes that the device took itself.</summary>
    public long TakenOnDevice => Ranges.Sum(range => range.TakenOnDevice);

    /// <summary>Stopwatch ticks spent on hashing and storing, summed over cores.</summary>
    public long ApplyTicks => Ranges.Sum(range => range.ApplyTicks);

    /// <summary><see cref="TensorDigest"/> of the bytes sent. Valid once all bytes have been taken.</summary>
    public byte[] Digest() => TensorDigest.OfPieces(_pieces);

    /// <summary>
    /// The tensor once served. Of one sent in part, only which pieces of the whole one change; of one sent in slices, that all do.
    /// </summary>
    public ServedTensor Served(byte[] digest)
    {
        DescribedWeight description = new(_tensor.Name, _tensor.Type, _tensor.Shape, _tensor.IsWhole ? digest : []);
        if (_indices is not null) return new ServedTensor(description, null, ChangedPieces());
        return _tensor.IsWhole ? new ServedTensor(description, _pieces, []) : ServedTensor.NotHashed(description);
    }

    // ---- For its ranges.

    /// <summary>Elements that are in device memory, from <paramref name="element"/> of those sent on, and where they go.</summary>
    public DeviceTensor OnDevice(DeviceBytes memory, long offset, long element, long bytes)
        => new(memory, offset, bytes, _tensor.Type, Entry.Places(_destination, _firstElement + element, bytes / ElementBytes));

    /// <summary>Records the digests of pieces, the first beginning at a byte of the tensor.</summary>
    public void TakeDigests(long position, ReadOnlySpan<byte> digests)
        => digests.CopyTo(_pieces.AsSpan((int)(position / TensorDigest.PieceBytes) * TensorDigest.Length));

    /// <summary>Hashes the bytes from one on, where a piece begins.</summary>
    public PieceHasher Hasher(long position) => new(_pieces, Bytes, position);

    /// <summary>Takes bytes of the indices, the first being the tensor's byte <paramref name="position"/>.</summary>
    public void TakeIndices(long position, ReadOnlySpan<byte> bytes)
        => bytes.CopyTo(MemoryMarshal.AsBytes(_indices.AsSpan())[(int)position..]);

    /// <exception cref="UpdateFailedException">The indices do not ascend or leave the tensor.</exception>
    public void CheckIndices()
    {
        for (int i = 0; i < _indices!.Length; i++)
        {
            if (_indices[i] >= Entry.Elements)
                throw Wrong($"index {i} is {_indices[i]}, the tensor has {Entry.Elements} elements");
            if (i > 0 && _indices[i] <= _indices[i - 1])
                throw Wrong($"index {i} is {_indices[i]} after {_indices[i - 1]}, they must ascend");
        }
    }

    /// <summary>Stores whole units, the first element being <paramref name="element"/> of those sent.</summary>
    public void Store(long element, ReadOnlySpan<byte> values)
    {
        if (_indices is null)
        {
            Entry.Write(_backend, _destination, _firstElement + element, values, _tensor.Type);
            return;
        }

        ReadOnlySpan<uint> indices = _indices.AsSpan((int)element, values.Length / ElementBytes);
        Entry.WriteElements(_backend, _destination, indices, values, _tensor.Type);
    }

    /// <summary>Ranges begin where a piece of the digest begins and the device stores fastest.</summary>
    private IncomingRange[] Cut()
    {
        if (_indices is not null || Bytes <= MostRangeBytes) return [new IncomingRange(this, 0, Bytes)];
        // A piece's length is a power of two: the least common multiple lacks the factors of two that both have.
        long step = FastBytes / Math.Min(FastBytes & -FastBytes, TensorDigest.PieceBytes) * TensorDigest.PieceBytes;
        step *= Math.Max(1, MostRangeBytes / step);
        IncomingRange[] ranges = new IncomingRange[(Bytes + step - 1) / step];
        for (int i = 0; i < ranges.Length; i++) ranges[i] = new IncomingRange(this, i * step, Math.Min(step, Bytes - i * step));
        return ranges;
    }

    /// <summary>
    /// Pieces of the whole tensor that elements are sent of. The end of each is searched in growing steps: no index of most is read, and
    /// those that are lie near each other.
    /// </summary>
    private int[] ChangedPieces()
    {
        int most = TensorDigest.PieceBytes / ElementBytes;
        List<int> pieces = [];
        ReadOnlySpan<uint> left = _indices;
        while (!left.IsEmpty)
        {
            int piece = (int)(left[0] / (uint)most);
            pieces.Add(piece);
            long end = (piece + 1L) * most, reach = 1;
            while (reach < left.Length && left[(int)reach] < end) reach *= 2;
            ReadOnlySpan<uint> near = left[..(int)Math.Min(reach, left.Length)];
            int at = end > uint.MaxValue ? near.Length : near.BinarySearch((uint)end);
            left = left[(at < 0 ? ~at : at)..];
        }

        return [.. pieces];
    }

    private UpdateFailedException Wrong(string what) => new(UpdateFailure.Protocol, $"sparse tensor '{Name}': {what}");
}
