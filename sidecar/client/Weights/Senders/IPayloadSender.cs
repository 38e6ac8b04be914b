namespace Rollout.Client;

/// <summary>One way to send a payload to the sidecar.</summary>
internal interface IPayloadSender
{
    /// <summary>Copies the payload out of the trainer and tells the sidecar where it is; completes when all is written and sent.</summary>
    /// <param name="call">The update, whose manifest has been accepted.</param>
    /// <param name="payload">Its bytes.</param>
    /// <param name="ready">What the sidecar chose; in place, it runs no step from the first message on.</param>
    Task SendAsync(UpdateCall call, PayloadWriter payload, V1.Ready ready, CancellationToken cancellationToken);
}
