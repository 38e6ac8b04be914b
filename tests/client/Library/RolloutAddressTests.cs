using System.Net;
using System.Net.Sockets;
using Xunit;

namespace Rollout.Client.Tests;

public sealed class RolloutAddressTests
{
    [Theory]
    [InlineData("unix:/run/rollout.sock")]
    [InlineData("unix:///run/rollout.sock")]
    public void Unix_sockets_in_both_spellings(string text)
    {
        RolloutAddress address = RolloutAddress.Parse(text);
        Assert.Equal("/run/rollout.sock", Assert.IsType<UnixDomainSocketEndPoint>(address.EndPoint).ToString());
        Assert.Equal(text, address.Text);
    }

    [Theory]
    [InlineData("http://127.0.0.1:8080", "127.0.0.1", 8080)]
    [InlineData("http://trainer-3:50051/", "trainer-3", 50051)]
    [InlineData("http://[::1]:50051", "::1", 50051)]
    public void Host_and_port(string text, string host, int port)
    {
        DnsEndPoint endPoint = Assert.IsType<DnsEndPoint>(RolloutAddress.Parse(text).EndPoint);
        Assert.Equal((host, port), (endPoint.Host, endPoint.Port));
    }

    [Theory]
    [InlineData("")]
    [InlineData(" ")]
    [InlineData("unix:")]
    [InlineData("unix:relative.sock")]
    [InlineData("unix://relative.sock")]
    [InlineData("localhost:50051")]
    [InlineData("https://localhost:50051")]
    [InlineData("http://")]
    [InlineData("http://localhost:50051/path")]
    [InlineData("http://me@localhost:50051")]
    [InlineData("http://localhost:99999")]
    public void Anything_else_is_refused(string text) => Assert.ThrowsAny<ArgumentException>(() => RolloutAddress.Parse(text));

    [Fact]
    public void A_socket_path_the_kernel_cannot_hold_is_refused_by_its_length()
    {
        ArgumentException error = Assert.Throws<ArgumentException>(() => RolloutAddress.Parse("unix:/" + new string('x', 107)));
        Assert.Contains("107", error.Message);
        RolloutAddress.Parse("unix:/" + new string('x', 106));
        RolloutAddress.Parse("unix:///" + new string('x', 106));
        RolloutAddress.Parse("unix:/" + new string('ä', 53));
        Assert.Throws<ArgumentException>(() => RolloutAddress.Parse("unix:/" + new string('ä', 54)));
    }
}
