using System.Net.Sockets;
using Grpc.Core;
using Grpc.Net.Client;
using Rollout.Engine;
using Rollout.V1;

namespace Rollout.Server.Commands;

/// <summary>A server at unix:PATH or http://HOST:PORT.</summary>
internal sealed class RemoteRollouts : IRollouts
{
    private const string UnixPrefix = "unix:";

    private readonly GrpcChannel _channel;
    private readonly RolloutService.RolloutServiceClient _client;

    public RemoteRollouts(string address)
    {
        _channel = Open(address);
        _client = new RolloutService.RolloutServiceClient(_channel);
    }

    public Tokenizer? Tokenizer => null;

    /// <summary>Null when a channel can be opened to the address.</summary>
    public static string? FindProblem(string address)
    {
        if (address.StartsWith(UnixPrefix, StringComparison.Ordinal))
        {
            string path = address[UnixPrefix.Length..];
            if (path.Length == 0) return $"'{address}' names no socket: write unix:PATH";
            return File.Exists(path) ? null : $"there is no socket '{path}': is the server running?";
        }

        bool good = Uri.TryCreate(address, UriKind.Absolute, out Uri? uri) && uri.Scheme == Uri.UriSchemeHttp && uri.PathAndQuery == "/";
        return good ? null : $"'{address}' is not an address: write unix:PATH or http://HOST:PORT";
    }

    public static GrpcChannel Open(string address)
    {
        GrpcChannelOptions options = new() { MaxReceiveMessageSize = null, DisposeHttpClient = true };
        if (!address.StartsWith(UnixPrefix, StringComparison.Ordinal)) return GrpcChannel.ForAddress(address, options);

        UnixDomainSocketEndPoint endPoint = new(Path.GetFullPath(address[UnixPrefix.Length..]));
        options.HttpHandler = new SocketsHttpHandler
        {
            UseProxy = false,
            ConnectCallback = async (_, cancellation) => await SidecarSocket.ConnectAsync(endPoint, cancellation),
        };
        return GrpcChannel.ForAddress("http://localhost", options);
    }

    public IAsyncEnumerable<GenerateReply> GenerateAsync(GenerateRequest request, CancellationToken cancellation)
        => _client.Generate(request, cancellationToken: cancellation).ResponseStream.ReadAllAsync(cancellation);

    public async Task<ScoreReply> ScoreAsync(ScoreRequest request, CancellationToken cancellation)
        => await _client.ScoreAsync(request, cancellationToken: cancellation);

    public ValueTask DisposeAsync()
    {
        _channel.Dispose();
        return ValueTask.CompletedTask;
    }
}
