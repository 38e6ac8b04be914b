using System.Buffers;
using Microsoft.Win32.SafeHandles;

namespace Rollout.Engine;

/// <summary>
/// A part of a payload in a file, on a disk or in /dev/shm, read by all cores. Read and not mapped, so that a file truncated meanwhile is
/// an error and not a SIGBUS.
/// </summary>
public sealed class FileSource(SafeFileHandle file, long fileOffset, long payloadOffset, long bytes, IDisposable? owner = null)
    : PayloadSource(payloadOffset, bytes, owner)
{
    internal override Task ReadAsync(PayloadCursor cursor, CancellationToken cancellation)
        => cursor.TakeOnAllCoresAsync(PayloadOffset + Bytes, (part, end) => Read(part, end, cancellation));

    private void Read(PayloadCursor part, long end, CancellationToken cancellation)
    {
        byte[] buffer = ArrayPool<byte>.Shared.Rent(PayloadCursor.MostPieceBytes);
        try
        {
            while (part.Position < end)
            {
                cancellation.ThrowIfCancellationRequested();
                Span<byte> piece = buffer.AsSpan(0, part.PieceBytes(end));
                int read = RandomAccess.Read(file, piece, fileOffset - PayloadOffset + part.Position);
                if (read == 0)
                    throw new UpdateFailedException(UpdateFailure.Source, $"the file ends inside tensor '{part.Range!.Tensor.Name}'");
                part.Take(piece[..read]);
            }
        }
        finally
        {
            ArrayPool<byte>.Shared.Return(buffer);
        }
    }
}
