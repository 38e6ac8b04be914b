using System.Text;
using System.Text.Json;
using Xunit;

namespace Rollout.Engine.Tests;

public sealed class InvalidModelExceptionTests
{
    [Theory]
    [InlineData(2)]
    [InlineData(20)]
    [InlineData(21)]
    [InlineData(1000)]
    public void A_message_lists_twenty_problems_and_counts_the_rest(int count)
    {
        InvalidModelException error = new("folder", [.. Enumerable.Range(0, count).Select(i => $"problem {i}")]);

        Assert.Equal(count, error.Problems.Count);
        IEnumerable<string> lines = Enumerable.Range(0, Math.Min(count, 20)).Select(i => $"  problem {i}");
        if (count > 20) lines = lines.Append($"  and {count - 20} more");
        Assert.Equal([$"folder: {count} problems", .. lines], error.Message.Split('\n'));
    }

    [Fact]
    public void One_problem_stands_beside_the_path()
        => Assert.Equal("folder: has no weights", new InvalidModelException("folder", "has no weights").Message);

    /// <summary>A name from a file may hold a terminal's commands, or lines that look like a log's, or be as long as the file.</summary>
    [Theory]
    [InlineData("model.norm.weight", 1, "'model.norm.weight'")]
    [InlineData("a\n\u001b[31mb\u0085\0", 1, "'a\uFFFD\uFFFD[31mb\uFFFD\uFFFD'")]
    [InlineData("0123456789", 20, "'{0}'")]
    [InlineData("0123456789", 21, "'{0}...'")]
    public void A_name_is_quoted_without_control_characters_and_in_200_letters(string name, int times, string quoted)
    {
        name = string.Concat(Enumerable.Repeat(name, times));
        byte[] index = Encoding.UTF8.GetBytes($"{{\"weight_map\":{{{JsonSerializer.Serialize(name)}:1}}}}");
        using TemporaryFolder folder = new();
        folder.Write("model.safetensors.index.json", index);

        string problem = Assert.Single(Assert.Throws<InvalidModelException>(() => Checkpoint.Open(folder.Path)).Problems);
        quoted = quoted.Replace("{0}", name[..Math.Min(200, name.Length)], StringComparison.Ordinal);
        Assert.Equal($"model.safetensors.index.json: weight_map {quoted} must be a file name", problem);
    }
}
