namespace Rollout.Engine;

/// <summary>A part of a payload in this process's memory, as received in a message: taken synchronously on the calling thread.</summary>
public sealed class MemorySource(ReadOnlyMemory<byte> memory, long payloadOffset, IDisposable? owner = null)
    : PayloadSource(payloadOffset, memory.Length, owner)
{
    internal override Task ReadAsync(PayloadCursor cursor, CancellationToken cancellation)
    {
        cursor.Take(memory.Span);
        return Task.CompletedTask;
    }
}
