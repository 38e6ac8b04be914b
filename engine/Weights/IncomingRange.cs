using System.Diagnostics;
using Rollout.Kernels;
using Rollout.Kernels.Cuda;

namespace Rollout.Engine;

/// <summary>Bytes of one tensor of a payload that follow each other, taken by one thread at a time in ascending order.</summary>
/// <param name="tensor">The tensor.</param>
/// <param name="first">The first byte, of the tensor's.</param>
/// <param name="bytes">How many.</param>
internal sealed class IncomingRange(IncomingTensor tensor, long first, long bytes)
{
    private PieceHasher? _hasher; // once a byte has come
    private byte[]? _split;       // a unit whose bytes came in several pieces
    private int _splitLength;

    public IncomingTensor Tensor { get; } = tensor;

    /// <summary>Where in the payload it begins.</summary>
    public long Start => Tensor.Start + first;

    public long Bytes { get; } = bytes;

    public long Taken { get; private set; }

    /// <summary>Of them, those that the device took.</summary>
    public long TakenOnDevice { get; private set; }

    /// <summary>Whether bytes of it came through the host: then the others must too, since rows are stored whole.</summary>
    public bool IsOnHost => Taken > TakenOnDevice;

    /// <summary>Stopwatch ticks spent on hashing and storing.</summary>
    public long ApplyTicks { get; private set; }

    /// <summary>How many bytes to take at once, at most <paramref name="most"/>: whole units of what the device stores fastest.</summary>
    public int PieceBytes(int most)
    {
        long unit = Tensor.FastBytes;
        return (int)Math.Min(Bytes - Taken, unit > most ? most : (Taken / unit * unit) + (most / unit * unit) - Taken);
    }

    /// <summary>Takes the next bytes, in any pieces.</summary>
    /// <exception cref="UpdateFailedException">The indices of a sparse tensor do not ascend or leave the tensor.</exception>
    public void Take(ReadOnlySpan<byte> bytes)
    {
        if (bytes.IsEmpty) return;
        if (TakenOnDevice > 0)
        {
            throw new UpdateFailedException(
                UpdateFailure.Protocol, $"the first bytes of tensor '{Tensor.Name}' came in device memory: send it whole in one way");
        }

        long started = Stopwatch.GetTimestamp();
        _hasher ??= Tensor.Hasher(first);
        _hasher.Append(bytes);
        if (Taken < Tensor.IndexBytes)
        {
            ReadOnlySpan<byte> own = bytes[..(int)Math.Min(bytes.Length, Tensor.IndexBytes - Taken)];
            Tensor.TakeIndices(Taken, own);
            Taken += own.Length;
            bytes = bytes[own.Length..];
            if (Taken == Tensor.IndexBytes) Tensor.CheckIndices();
        }

        long element = (first + Taken - Tensor.IndexBytes) / Tensor.ElementBytes;
        Taken += bytes.Length;
        if (Taken == Bytes) _hasher = null;
        if (!Tensor.Entry.Tied) StoreWhole(element, bytes);
        ApplyTicks += Stopwatch.GetTimestamp() - started;
    }

    /// <summary>The tensor's bytes that are in device memory, the first being the range's byte <paramref name="position"/>.</summary>
    public DeviceTensor OnDevice(DeviceBytes memory, long offset, long position, long bytes)
        => Tensor.OnDevice(memory, offset, (first + position) / Tensor.ElementBytes, bytes);

    /// <summary>Records that the device has stored and hashed the next bytes.</summary>
    /// <param name="digests">Of their pieces.</param>
    /// <param name="bytes">Up to the end of a piece.</param>
    /// <param name="ticks">Spent on it.</param>
    public void TakeOnDevice(ReadOnlySpan<byte> digests, long bytes, long ticks)
    {
        Tensor.TakeDigests(first + Taken, digests);
        Taken += bytes;
        TakenOnDevice += bytes;
        ApplyTicks += ticks;
    }

    /// <summary>Stores whole units and keeps what is left of a split one for the next call.</summary>
    private void StoreWhole(long element, ReadOnlySpan<byte> bytes)
    {
        int unitBytes = Tensor.UnitBytes;
        element -= _splitLength / Tensor.ElementBytes;
        if (_splitLength > 0)
        {
            int rest = Math.Min(unitBytes - _splitLength, bytes.Length);
            bytes[..rest].CopyTo(_split.AsSpan(_splitLength));
            _splitLength += rest;
            bytes = bytes[rest..];
            if (_splitLength < unitBytes) return;
            Tensor.Store(element, _split);
            element += unitBytes / Tensor.ElementBytes;
            _splitLength = 0;
        }

        int whole = bytes.Length / unitBytes * unitBytes;
        if (whole > 0) Tensor.Store(element, bytes[..whole]);
        _splitLength = bytes.Length - whole;
        if (_splitLength > 0) bytes[whole..].CopyTo(_split ??= new byte[unitBytes]);
    }
}
