using Rollout.Engine;
using Rollout.V1;

namespace Rollout.Server.Weights;

/// <summary>Chunks in the stream itself: stored straight from the message they came in, whose memory is then the next one's.</summary>
internal sealed class InlineTransport : ITransport
{
    public Task ReceiveAsync(UpdateRequest message, WeightUpdate update, CancellationToken cancellation)
    {
        Chunk chunk = message.Chunk;
        if (chunk.Offset > long.MaxValue)
            throw new UpdateFailedException(UpdateFailure.Protocol, $"chunk offset {chunk.Offset} is past any payload");
        update.Write((long)chunk.Offset, chunk.Data.Span);
        ChunkBuffer.Release(chunk.Data);
        return Task.CompletedTask;
    }

    public void Dispose()
    {
    }
}
