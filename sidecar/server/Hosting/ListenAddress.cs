using System.Globalization;
using System.Net;

namespace Rollout.Server.Hosting;

/// <summary>Parses HOST:PORT.</summary>
internal static class ListenAddress
{
    /// <summary>Null, with an error message, when the address is invalid.</summary>
    public static IPEndPoint? Parse(string text, out string? error)
    {
        error = null;
        int colon = text.LastIndexOf(':');
        if (colon < 0)
        {
            error = $"'{text}' has no port: write HOST:PORT, as in 127.0.0.1:50051";
            return null;
        }

        string host = text[..colon];
        if (!int.TryParse(text[(colon + 1)..], NumberStyles.None, CultureInfo.InvariantCulture, out int port) || port > IPEndPoint.MaxPort)
        {
            error = $"'{text[(colon + 1)..]}' is not a port: 0 (any free one) to {IPEndPoint.MaxPort}";
            return null;
        }

        IPAddress? address = host switch
        {
            "localhost" => IPAddress.Loopback,
            "*" => IPAddress.Any,
            _ when host.StartsWith('[') && host.EndsWith(']') => IPAddress.TryParse(host[1..^1], out IPAddress? six) ? six : null,
            _ when host.Contains(':') => null,
            _ => IPAddress.TryParse(host, out IPAddress? four) && four.ToString() == host ? four : null,
        };
        if (address is not null) return new IPEndPoint(address, port);
        error = $"'{host}' is not a host to listen on: give an IP address ([::1] in brackets), localhost, or * for all interfaces";
        return null;
    }
}
