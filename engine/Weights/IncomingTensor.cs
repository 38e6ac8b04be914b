using System.Buffers.Binary;
using System.Diagnostics;
using System.IO.Hashing;
using System.Runtime.InteropServices;
using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>One tensor of a payload being written to its place in a weight set: hashed as sent, stored in the device's layout.</summary>
internal sealed class IncomingTensor
{
    private readonly ManifestTensor _tensor;
    private readonly Backend _backend;
    private readonly WeightSet _destination;
    private readonly int _elementSize;
    private readonly uint[]? _indices; // of the values that follow; null: all elements, in order
    private readonly long _indexBytes;
    private XxHash128? _hash; // only while the tensor is partly received, because there may be many tensors
    private UInt128 _digest;
    private readonly int _unitBytes; // what the device stores at once: a row of a matrix, or a single element
    private byte[]? _split;          // a unit whose bytes came in several pieces
    private int _splitLength;

    public IncomingTensor(ManifestTensor tensor, LoadEntry entry, Backend backend, WeightSet set)
    {
        _tensor = tensor;
        _backend = backend;
        _destination = set;
        _elementSize = tensor.Type.Size();
        Entry = entry;
        Bytes = tensor.Bytes;
        _unitBytes = tensor.SparseCount is null ? (int)entry.RowElements * _elementSize : _elementSize;
        if (tensor.SparseCount is not { } count) return;
        _indices = new uint[count];
        _indexBytes = count * sizeof(uint);
    }

    public string Name => _tensor.Name;

    public LoadEntry Entry { get; }

    /// <summary>Where in the payload it begins.</summary>
    public long Start => _tensor.Offset;

    public long Bytes { get; }

    public long Taken { get; private set; }

    /// <summary>Stopwatch ticks spent on hashing and storing.</summary>
    public long ApplyTicks { get; private set; }

    /// <summary>XxHash128 of the bytes sent, in its canonical byte order. Valid once all bytes have been taken.</summary>
    public byte[] Digest()
    {
        byte[] digest = new byte[16];
        BinaryPrimitives.WriteUInt128BigEndian(digest, Bytes == 0 ? XxHash128.HashToUInt128([]) : _digest);
        return digest;
    }

    /// <summary>The description of the tensor once served. A tensor sent in part has no known digest.</summary>
    public DescribedWeight Describe(byte[] digest)
        => new(_tensor.Name, _tensor.Type, _tensor.Shape, _tensor.SparseCount is null ? digest : []);

    /// <summary>How many bytes to take at once, at most <paramref name="most"/>: whole units of what the device stores fastest.</summary>
    public int PieceBytes(int most)
    {
        long unit = _indices is null && Entry.RowElements > 1 ? _backend.WriteRows * Entry.RowElements * _elementSize : 1;
        return (int)Math.Min(Bytes - Taken, unit > most ? most : (Taken / unit * unit) + (most / unit * unit) - Taken);
    }

    /// <summary>Takes the tensor's next bytes, in any pieces.</summary>
    /// <exception cref="UpdateFailedException">The indices of a sparse tensor do not ascend or leave the tensor.</exception>
    public void Take(ReadOnlySpan<byte> bytes)
    {
        if (bytes.IsEmpty) return;
        long started = Stopwatch.GetTimestamp();
        Hash(bytes);
        if (Taken < _indexBytes)
        {
            ReadOnlySpan<byte> own = bytes[..(int)Math.Min(bytes.Length, _indexBytes - Taken)];
            own.CopyTo(MemoryMarshal.AsBytes(_indices.AsSpan())[(int)Taken..]);
            Taken += own.Length;
            bytes = bytes[own.Length..];
            if (Taken == _indexBytes) CheckIndices();
        }

        long element = (Taken - _indexBytes) / _elementSize;
        Taken += bytes.Length;
        if (!Entry.Tied) StoreWhole(element, bytes);
        ApplyTicks += Stopwatch.GetTimestamp() - started;
    }

    private void Hash(ReadOnlySpan<byte> bytes)
    {
        bool last = Taken + bytes.Length == Bytes;
        if (last && _hash is null)
        {
            _digest = XxHash128.HashToUInt128(bytes);
            return;
        }

        _hash ??= new XxHash128();
        _hash.Append(bytes);
        if (!last) return;
        _digest = _hash.GetCurrentHashAsUInt128();
        _hash = null;
    }

    /// <summary>Stores whole units and keeps what is left of a split one for the next call.</summary>
    private void StoreWhole(long element, ReadOnlySpan<byte> bytes)
    {
        element -= _splitLength / _elementSize;
        if (_splitLength > 0)
        {
            int rest = Math.Min(_unitBytes - _splitLength, bytes.Length);
            bytes[..rest].CopyTo(_split.AsSpan(_splitLength));
            _splitLength += rest;
            bytes = bytes[rest..];
            if (_splitLength < _unitBytes) return;
            Store(element, _split);
            element += _unitBytes / _elementSize;
            _splitLength = 0;
        }

        int whole = bytes.Length / _unitBytes * _unitBytes;
        if (whole > 0) Store(element, bytes[..whole]);
        _splitLength = bytes.Length - whole;
        if (_splitLength > 0) bytes[whole..].CopyTo(_split ??= new byte[_unitBytes]);
    }

    private void Store(long element, ReadOnlySpan<byte> values)
    {
        if (_indices is null)
        {
            Entry.Write(_backend, _destination, element, values, _tensor.Type);
            return;
        }

        ReadOnlySpan<uint> indices = _indices.AsSpan((int)element, values.Length / _elementSize);
        Entry.WriteElements(_backend, _destination, indices, values, _tensor.Type);
    }

    private void CheckIndices()
    {
        for (int i = 0; i < _indices!.Length; i++)
        {
            if (_indices[i] >= Entry.Elements)
                throw Wrong($"index {i} is {_indices[i]}, the tensor has {Entry.Elements} elements");
            if (i > 0 && _indices[i] <= _indices[i - 1])
                throw Wrong($"index {i} is {_indices[i]} after {_indices[i - 1]}, they must ascend");
        }
    }

    private UpdateFailedException Wrong(string what) => new(UpdateFailure.Protocol, $"sparse tensor '{Name}': {what}");
}
