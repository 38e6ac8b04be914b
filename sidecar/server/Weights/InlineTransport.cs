using Rollout.Engine;
using Rollout.V1;

namespace Rollout.Server.Weights;

/// <summary>Chunks in the stream itself, stored directly from the message, whose memory is then reused for the next one.</summary>
internal sealed class InlineTransport : ITransport
{
    public ValueTask<PayloadSource> SourceOfAsync(UpdateRequest message, UpdatePart part, CancellationToken cancellation)
        => new(SourceOf(message, part));

    private static PayloadSource SourceOf(UpdateRequest message, UpdatePart part)
    {
        Chunk chunk = message.Chunk;
        if (chunk.Offset > long.MaxValue)
            throw new UpdateFailedException(UpdateFailure.Protocol, $"chunk offset {chunk.Offset} is past any payload");
        return new MemorySource(chunk.Data.Memory, (long)chunk.Offset, owner: ChunkBuffer.Behind(chunk.Data));
    }

    public void Dispose()
    {
    }
}
