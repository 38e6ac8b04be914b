using Google.Protobuf;
using Rollout.V1;

namespace Rollout.Client;

/// <summary>In the stream itself: fills one piece while the one before it is being sent.</summary>
internal sealed class InlineSender : IPayloadSender
{
    public async Task<SentBy> SendAsync(UpdateCall call, PayloadWriter payload, V1.Ready ready, CancellationToken cancellationToken)
    {
        Task sending = Task.CompletedTask;
        try
        {
            foreach ((long offset, Memory<byte> bytes) in payload.Pieces())
            {
                await sending;
                cancellationToken.ThrowIfCancellationRequested();
                // gRPC has copied the bytes when the write completes, which is before the buffer is used again.
                Chunk chunk = new() { Offset = (ulong)offset, Data = UnsafeByteOperations.UnsafeWrap(bytes) };
                // On another thread, since gRPC serializes on the caller's.
                sending = Task.Run(() => call.SendAsync(new V1.UpdateRequest { Chunk = chunk }, cancellationToken), CancellationToken.None);
            }
        }
        finally
        {
            await sending;
        }

        return new SentBy(PushTransport.Inline, "the gRPC stream was asked for");
    }
}
