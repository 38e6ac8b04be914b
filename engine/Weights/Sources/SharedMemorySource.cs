using Rollout.Native;

namespace Rollout.Engine;

/// <summary>
/// A part of a payload in memory that another process has written and cannot take away: taken where it lies, by all cores.
/// </summary>
/// <remarks>
/// A piece is hashed, then stored. A sender that writes there before it is told that the window was read breaks the protocol, and the
/// digest finds it out, except for what it changes in the few microseconds between the two.
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
