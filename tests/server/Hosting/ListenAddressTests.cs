using Rollout.Server.Hosting;

namespace Rollout.Server.Tests;

/// <summary>Where `rollout serve` is told to listen.</summary>
public sealed class ListenAddressTests
{
    [Theory]
    [InlineData("127.0.0.1:50051", "127.0.0.1:50051")]
    [InlineData("localhost:0", "127.0.0.1:0")]
    [InlineData("*:80", "0.0.0.0:80")]
    [InlineData("[::1]:80", "[::1]:80")]
    [InlineData("::1:80", null)]
    [InlineData("1:80", null)]
    [InlineData("host:80", null)]
    [InlineData("127.0.0.1", null)]
    [InlineData("127.0.0.1:65536", null)]
    [InlineData("127.0.0.1:-1", null)]
    public void Addresses_to_listen_on(string text, string? expected)
    {
        Assert.Equal(expected, ListenAddress.Parse(text, out string? error)?.ToString());
        Assert.Equal(expected is null, error is not null);
    }
}
