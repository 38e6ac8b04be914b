using Rollout.Engine;
using Rollout.V1;

namespace Rollout.Server.Weights;

/// <summary>One way to receive a payload. Created for one update, and called with one message at a time.</summary>
internal interface ITransport : IDisposable
{
    /// <summary>The part of the payload that the message contains or refers to. The caller disposes it before the next message.</summary>
    /// <exception cref="UpdateFailedException">It does not exist, is truncated, or is past any payload.</exception>
    ValueTask<PayloadSource> SourceOfAsync(UpdateRequest message, UpdatePart part, CancellationToken cancellation);
}
