using Rollout.Server.Commands;
using Rollout.Server.Hosting;

namespace Rollout.Server.Tests;

public sealed class UnitTests
{
    [Theory]
    [InlineData("512MiB", 512L << 20)]
    [InlineData("2GB", 2_000_000_000L)]
    [InlineData("1.5 gib", 3L << 29)]
    [InlineData("1048576", 1L << 20)]
    [InlineData("7B", 7L)]
    public void Sizes_are_read_as_people_write_them(string text, long bytes)
    {
        Assert.True(ByteSize.TryParse(text, out long read));
        Assert.Equal(bytes, read);
    }

    [Theory]
    [InlineData("")]
    [InlineData("-1GB")]
    [InlineData("0")]
    [InlineData("GB")]
    [InlineData("1e9")]
    [InlineData("99999999999TB")]
    public void What_is_no_size_is_refused(string text) => Assert.False(ByteSize.TryParse(text, out _));

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
