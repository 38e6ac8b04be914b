using System.Text;
using Xunit;

namespace Rollout.Engine.Tests;

public sealed class JsonFileTests : IDisposable
{
    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void A_json_file_may_have_many_megabytes_and_not_hundreds()
    {
        string padding = string.Concat(Enumerable.Repeat(" ", 40 << 20));
        Assert.True(JsonFile.ReadObject(_folder.Write("large.json", $$"""{{{padding}}"a":1}""")).TryGetProperty("a", out _));
        using (FileStream file = File.Create(_folder["huge.json"])) file.SetLength(256L << 20);
        Assert.Contains("not valid JSON", Refused(() => JsonFile.ReadObject(_folder["huge.json"])));
        using (FileStream file = File.OpenWrite(_folder["huge.json"])) file.SetLength((256L << 20) + 1);
        Assert.Contains("at most", Refused(() => JsonFile.ReadObject(_folder["huge.json"])));
    }

    /// <summary>Latin-1: 0xE9 is é there, and the beginning of a longer character in UTF-8.</summary>
    [Theory]
    [InlineData("""{"é":1}""")]
    [InlineData("""{"a":{"b":["é"]}}""")]
    [InlineData("""{"a":"é\n"}""")]
    public void Text_in_another_encoding_is_refused(string json)
        => Assert.Contains("not valid UTF-8", Refused(() => JsonFile.ParseObject("a.json", Encoding.Latin1.GetBytes(json))));

    [Theory]
    [InlineData("""{"\ud800":1}""")]
    [InlineData("""{"a":{"b":["\udc00"]}}""")]
    [InlineData("""{"a":"\udc00\ud800"}""")]
    public void Half_a_character_is_refused(string json)
        => Assert.Contains("not valid Unicode", Refused(() => JsonFile.ParseObject("a.json", Encoding.UTF8.GetBytes(json))));

    private static string Refused(Func<object> read) => Assert.Throws<InvalidModelException>(read).Message;
}
