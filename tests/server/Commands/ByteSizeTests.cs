using Rollout.Server.Commands;

namespace Rollout.Server.Tests;

/// <summary>Amounts of memory on the command line.</summary>
public sealed class ByteSizeTests
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
}
