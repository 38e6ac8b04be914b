using Rollout.Engine;
using Rollout.V1;

namespace Rollout.Server.Weights;

/// <summary>One way for a payload to come. Lives as long as its update; told one message at a time.</summary>
internal interface ITransport : IDisposable
{
    /// <summary>Brings the part of the payload that the message carries or points at into the update, to its last byte.</summary>
    /// <exception cref="UpdateFailedException">It is not there, is cut off, or does not follow what came before.</exception>
    Task ReceiveAsync(UpdateRequest message, WeightUpdate update, CancellationToken cancellation);
}
