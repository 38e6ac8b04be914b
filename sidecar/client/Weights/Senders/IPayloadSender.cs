namespace Rollout.Client;

/// <summary>One way for a payload to get to the sidecar.</summary>
internal interface IPayloadSender
{
    /// <summary>Takes the payload out of the trainer and tells the sidecar where it is; ends when all is written and sent.</summary>
    /// <param name="call">The update, agreed to.</param>
    /// <param name="payload">Its bytes.</param>
    /// <param name="ready">What the sidecar chose; in place, it stands still from the first message on.</param>
    Task SendAsync(UpdateCall call, PayloadWriter payload, V1.Ready ready, CancellationToken cancellationToken);
}
