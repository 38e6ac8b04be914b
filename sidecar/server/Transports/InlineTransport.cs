using Rollout.Engine;
using Rollout.V1;

namespace Rollout.Server.Transports;

/// <summary>Chunks in the stream itself: stored straight from the message they came in.</summary>
internal sealed class InlineTransport : ITransport
{
    public Task ReceiveAsync(UpdateRequest message, WeightUpdate update, CancellationToken cancellation)
    {
        if (message.Chunk.Offset > long.MaxValue)
            throw new UpdateFailedException(UpdateFailure.Protocol, $"chunk offset {message.Chunk.Offset} is past any payload");
        update.Write((long)message.Chunk.Offset, message.Chunk.Data.Span);
        return Task.CompletedTask;
    }

    public void Dispose()
    {
    }
}
