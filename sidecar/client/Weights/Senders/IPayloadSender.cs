namespace Rollout.Client;

/// <summary>How a payload was sent.</summary>
/// <param name="Transport">Never <see cref="PushTransport.Auto"/>.</param>
/// <param name="Reason">Why, in a sentence.</param>
/// <param name="Hashed">Whether all bytes passed through the <see cref="PayloadWriter"/>, which then has their digest.</param>
internal readonly record struct SentBy(PushTransport Transport, string Reason, bool Hashed = true);

/// <summary>One way to send a payload to the sidecar.</summary>
internal interface IPayloadSender
{
    /// <summary>Copies the payload out of the trainer and tells the sidecar where it is; completes when all is written and sent.</summary>
    /// <param name="call">The update, whose manifest has been accepted.</param>
    /// <param name="payload">Its bytes.</param>
    /// <param name="ready">What the sidecar chose; in place, it runs no step from the first message on.</param>
    Task<SentBy> SendAsync(UpdateCall call, PayloadWriter payload, V1.Ready ready, CancellationToken cancellationToken);
}

/// <summary>
/// Sends tensors that are in the memory of a GPU, where the sidecar can reach that. Kept by a publisher from push to push.
/// </summary>
internal interface IDeviceSender : IDisposable
{
    /// <summary>Null where the sidecar can read the tensors on the device; else why it cannot, in a sentence.</summary>
    string? WhyNot(V1.Ready ready);

    /// <summary>Tells the sidecar where the payload is; the sidecar's progress says when it has been read.</summary>
    Task<SentBy> SendAsync(UpdateCall call, PayloadLayout layout, V1.Ready ready, CancellationToken cancellationToken);
}

/// <summary>On the device where the sidecar can reach it there, else through the host; without a host sender, not at all.</summary>
internal sealed class DeviceFirstSender(IDeviceSender device, PayloadLayout layout, IPayloadSender? host) : IPayloadSender
{
    public async Task<SentBy> SendAsync(UpdateCall call, PayloadWriter payload, V1.Ready ready, CancellationToken cancellationToken)
    {
        if (device.WhyNot(ready) is not { } why)
            return await device.SendAsync(call, layout, ready, cancellationToken);
        if (host is null)
            throw new InvalidOperationException($"CUDA IPC was asked for, and cannot be used: {why}");
        return await host.SendAsync(call, payload, ready, cancellationToken) with { Reason = why };
    }
}
