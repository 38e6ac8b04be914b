using System.Net;
using System.Net.Sockets;

namespace Rollout.V1;

/// <summary>How HTTP reaches a sidecar, over a Unix socket or TCP: for <see cref="SocketsHttpHandler.ConnectCallback"/>.</summary>
public static class SidecarSocket
{
    /// <param name="endPoint">A <see cref="UnixDomainSocketEndPoint"/>, or a TCP one.</param>
    /// <param name="cancellation">Gives up.</param>
    /// <exception cref="SocketException">Nobody listens there.</exception>
    public static async ValueTask<NetworkStream> ConnectAsync(EndPoint endPoint, CancellationToken cancellation)
    {
        Socket socket = endPoint is UnixDomainSocketEndPoint
            ? new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified)
            : new Socket(SocketType.Stream, ProtocolType.Tcp) { NoDelay = true };
        try
        {
            await socket.ConnectAsync(endPoint, cancellation);
            return new NetworkStream(socket, ownsSocket: true);
        }
        catch
        {
            socket.Dispose();
            throw;
        }
    }
}
