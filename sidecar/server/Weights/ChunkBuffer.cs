using System.Buffers;
using System.Runtime.InteropServices;
using Google.Protobuf;

namespace Rollout.Server.Weights;

/// <summary>
/// The bytes of one chunk in memory that is used over and over, never cleared. Behind a <see cref="ByteString"/> it is told from memory
/// of any other kind; forgotten instead of disposed it falls to the garbage collector.
/// </summary>
internal sealed class ChunkBuffer : MemoryManager<byte>
{
    private readonly int _length;
    private byte[]? _array;

    public ChunkBuffer(in ReadOnlySequence<byte> bytes)
    {
        _length = checked((int)bytes.Length);
        _array = ArrayPool<byte>.Shared.Rent(_length);
        bytes.CopyTo(_array);
    }

    /// <summary>
    /// The buffer behind a chunk's data, as there is where the message had no fields but offset and data; else null. Nothing may look at
    /// the data once it is disposed.
    /// </summary>
    public static ChunkBuffer? Behind(ByteString data)
        => MemoryMarshal.TryGetMemoryManager(data.Memory, out ChunkBuffer? buffer) ? buffer : null;

    public override Span<byte> GetSpan()
    {
        ObjectDisposedException.ThrowIf(_array is null, this);
        return _array.AsSpan(0, _length);
    }

    public override MemoryHandle Pin(int elementIndex = 0) => throw new NotSupportedException("Nobody needs its address.");

    public override void Unpin()
    {
    }

    protected override void Dispose(bool disposing)
    {
        if (Interlocked.Exchange(ref _array, null) is { } array) ArrayPool<byte>.Shared.Return(array);
    }
}
