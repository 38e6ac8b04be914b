using System.Net;
using System.Net.Sockets;

namespace Rollout.Client;

/// <summary>Where a sidecar listens: a Unix socket or a host and port.</summary>
internal sealed class RolloutAddress
{
    // sockaddr_un holds 108 bytes with the terminating zero.
    private const int MaxSocketPathBytes = 107;

    private RolloutAddress(string text, Uri uri, EndPoint endPoint)
    {
        Text = text;
        Uri = uri;
        EndPoint = endPoint;
    }

    /// <summary>The address as the caller wrote it, for messages.</summary>
    public string Text { get; }

    /// <summary>The address for HTTP; for a Unix socket only the Host header.</summary>
    public Uri Uri { get; }

    public EndPoint EndPoint { get; }

    /// <exception cref="ArgumentException">It is none of <c>unix:/path</c>, <c>unix:///path</c> and <c>http://host:port</c>.</exception>
    public static RolloutAddress Parse(string address)
    {
        ArgumentException.ThrowIfNullOrWhiteSpace(address);
        if (address.StartsWith("unix:", StringComparison.OrdinalIgnoreCase))
            return new RolloutAddress(address, new Uri("http://localhost"), new UnixDomainSocketEndPoint(SocketPath(address)));

        if (!Uri.TryCreate(address, UriKind.Absolute, out Uri? uri) || uri.Scheme != Uri.UriSchemeHttp || uri.Host.Length == 0)
            throw Bad(address, "expected unix:/path/to/socket or http://host:port");
        if (uri.PathAndQuery != "/" || uri.UserInfo.Length > 0)
            throw Bad(address, "expected nothing but host and port after http://");
        return new RolloutAddress(address, uri, new DnsEndPoint(uri.DnsSafeHost, uri.Port));
    }

    private static string SocketPath(string address)
    {
        string path = address["unix:".Length..];
        if (path.StartsWith("//", StringComparison.Ordinal))
            path = path[2..];
        if (!path.StartsWith('/'))
            throw Bad(address, "the path of a Unix socket must be absolute");
        if (System.Text.Encoding.UTF8.GetByteCount(path) > MaxSocketPathBytes)
            throw Bad(address, $"the path of a Unix socket may be at most {MaxSocketPathBytes} bytes long");
        return path;
    }

    private static ArgumentException Bad(string address, string why) => new($"address '{address}': {why}", nameof(address));
}
