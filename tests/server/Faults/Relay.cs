using System.Net.Sockets;

namespace Rollout.Server.Tests;

/// <summary>
/// A proxy between client and server that forwards everything until it sees a given digest: in a commit to the server, or in the answer
/// from it. The bytes that contain the digest are not delivered.
/// </summary>
internal sealed class Relay : IDisposable
{
    private readonly Socket _listener = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
    private readonly TemporaryFolder _folder = new();
    private readonly string _server;
    private readonly byte[] _digest;
    private readonly bool _inAnswer;
    private readonly Func<Task> _found;
    private int _looking = 1;

    /// <param name="server">The server's socket.</param>
    /// <param name="digest">The digest to look for.</param>
    /// <param name="inAnswer">Whether to look in bytes from the server, else in those to it.</param>
    /// <param name="found">Awaited before the connection breaks.</param>
    public Relay(string server, byte[] digest, bool inAnswer, Func<Task> found)
    {
        _server = server;
        _digest = digest;
        _inAnswer = inAnswer;
        _found = found;
        _listener.Bind(new UnixDomainSocketEndPoint(_folder["r"]));
        _listener.Listen();
        _ = AcceptAsync();
    }

    public string Address => $"unix:{_folder["r"]}";

    /// <summary>Whether the digest was seen.</summary>
    public bool Found => _looking == 0;

    public void Dispose()
    {
        _listener.Dispose();
        _folder.Dispose();
    }

    private async Task AcceptAsync()
    {
        try
        {
            while (true) _ = ServeAsync(await _listener.AcceptAsync());
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            // Disposed.
        }
    }

    private async Task ServeAsync(Socket client)
    {
        using Socket near = client;
        using Socket far = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            await far.ConnectAsync(new UnixDomainSocketEndPoint(_server));
            await Task.WhenAny(PumpAsync(near, far, look: !_inAnswer), PumpAsync(far, near, look: _inAnswer));
        }
        catch (SocketException)
        {
            // No server there: the client sees its connection end.
        }
    }

    private async Task PumpAsync(Socket from, Socket to, bool look)
    {
        byte[] buffer = new byte[1 << 16];
        List<byte> tail = []; // a digest may be split over two reads
        try
        {
            while (await from.ReceiveAsync(buffer) is > 0 and int read)
            {
                if (look && _looking == 1)
                {
                    tail.AddRange(buffer.AsSpan(0, read));
                    if (tail.ToArray().AsSpan().IndexOf(_digest) >= 0 && Interlocked.Exchange(ref _looking, 0) == 1)
                    {
                        await _found();
                        return;
                    }

                    tail.RemoveRange(0, Math.Max(0, tail.Count - _digest.Length));
                }

                await to.SendAsync(buffer.AsMemory(0, read));
            }
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            // One side has disconnected.
        }
    }
}
