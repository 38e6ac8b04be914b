using System.Buffers;
using System.Runtime.InteropServices;
using Google.Protobuf;

namespace Rollout.Server.Weights;

/// <summary>
/// The bytes of one chunk, in pooled memory that is never cleared. It can be recognised behind a <see cref="ByteString"/>. A buffer that
/// is not disposed is garbage collected.
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
    /// The buffer behind a chunk's data; null where <see cref="ChunkMarshaller"/> left the message to the generated parser. The data must
    /// not be read once the buffer is disposed.
    /// </summary>
    public static ChunkBuffer? Behind(ByteString data)
        => MemoryMarshal.TryGetMemoryManager(data.Memory, out ChunkBuffer? buffer) ? buffer : null;

    public override Span<byte> GetSpan()
    {
        ObjectDisposedException.ThrowIf(_array is null, this);
        return _array.AsSpan(0, _length);
    }

    public override MemoryHandle Pin(int elementIndex = 0) => throw new NotSupportedException("The memory is not pinned.");

    public override void Unpin()
    {
    }

    protected override void Dispose(bool disposing)
    {
        if (Interlocked.Exchange(ref _array, null) is { } array) ArrayPool<byte>.Shared.Return(array);
    }
}
