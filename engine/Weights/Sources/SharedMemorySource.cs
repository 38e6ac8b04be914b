using Rollout.Native;

namespace Rollout.Engine;

/// <summary>
/// A part of a payload in mapped memory that another process has written and cannot shrink: read without a copy, by all cores.
/// </summary>
/// <remarks>
/// Each piece is hashed, then stored. A sender that overwrites a window before it is told that the window was read violates the protocol.
/// The digest detects that, except for changes in the few microseconds between hashing and storing.
/// </remarks>
public sealed class SharedMemorySource(SealedMemory memory, long memoryOffset, long payloadOffset, long bytes)
    : PayloadSource(payloadOffset, bytes, owner: null)
{
    internal override Task ReadAsync(PayloadCursor cursor, CancellationToken cancellation)
        => cursor.TakeOnAllCoresAsync(PayloadOffset + Bytes, (part, end) => Read(part, end, cancellation));

    private void Read(PayloadCursor part, long end, CancellationToken cancellation)
    {
        while (part.Position < end)
        {
            cancellation.ThrowIfCancellationRequested();
            part.Take(memory.Span(memoryOffset - PayloadOffset + part.Position, part.PieceBytes(end)));
        }
    }
}
