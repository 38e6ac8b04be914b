namespace Rollout.Client;

/// <summary>How a payload was sent.</summary>
/// <param name="Transport">Never <see cref="PushTransport.Auto"/>.</param>
/// <param name="Reason">Why, in a sentence.</param>
/// <param name="Hashed">Whether all bytes passed through the <see cref="PayloadWriter"/>, which then has their digest.</param>
/// <param name="Buckets">Parts that were read on the device one after the other.</param>
internal readonly record struct SentBy(PushTransport Transport, string Reason, bool Hashed = true, int Buckets = 0);

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
/// Sends tensors that are in the memory of a GPU, where the sidecar can be reached from there. Kept by a publisher from push to push.
/// </summary>
internal interface IDeviceSender : IDisposable
{
    /// <summary>CUDA IPC or NCCL, and why; null where only the host is left, and why.</summary>
    (PushTransport? Transport, string Reason) Choose(V1.Ready ready);

    /// <summary>Sends the payload as chosen; the sidecar's progress says when it has been read.</summary>
    Task<SentBy> SendAsync(UpdateCall call, PayloadLayout layout, V1.Ready ready, CancellationToken cancellationToken);

    /// <summary>A push has failed, at any point: connections between the devices may be broken, and are not kept.</summary>
    void Disconnect();
}

/// <summary>From the device where that can be done, else through the host, or not at all.</summary>
/// <param name="device">Of the tensors.</param>
/// <param name="layout">The payload.</param>
/// <param name="wanted">A transport, or Auto.</param>
/// <param name="host">Null: the tensors must not pass through the host.</param>
internal sealed class DeviceFirstSender(IDeviceSender device, PayloadLayout layout, PushTransport wanted, IPayloadSender? host)
    : IPayloadSender
{
    public async Task<SentBy> SendAsync(UpdateCall call, PayloadWriter payload, V1.Ready ready, CancellationToken cancellationToken)
    {
        (PushTransport? transport, string reason) = device.Choose(ready);
        if (transport is not null && (wanted == PushTransport.Auto || wanted == transport))
            return await device.SendAsync(call, layout, ready, cancellationToken);
        if (host is null || wanted != PushTransport.Auto)
        {
            string what = wanted == PushTransport.Auto ? "a GPU's transport" : $"{wanted}";
            throw new InvalidOperationException($"{what} cannot be used: {reason}");
        }

        return await host.SendAsync(call, payload, ready, cancellationToken) with { Reason = reason };
    }
}
