using Rollout.Engine;
using Rollout.V1;

namespace Rollout.Server.Weights;

/// <summary>One way for a payload to come. Lives as long as its update; told one message at a time.</summary>
internal interface ITransport : IDisposable
{
    /// <summary>The part of the payload that the message carries or points at. The caller disposes it before the next message.</summary>
    /// <exception cref="UpdateFailedException">It is not there, is cut off, or is past any payload.</exception>
    PayloadSource SourceOf(UpdateRequest message, WeightUpdate update);
}
