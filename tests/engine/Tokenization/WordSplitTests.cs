using System.Globalization;
using Xunit;

namespace Rollout.Engine.Tests;

public sealed class WordSplitTests
{
    [Theory]
    [InlineData(@"\p{L}++", "possessive")]
    [InlineData(@"a?+", "possessive")]
    [InlineData(@"[a-z&&b]", "intersection")]
    [InlineData(@"[[:alpha:]]", "a set within a set")]
    [InlineData(@"[a-z-[b]]", "a set within a set")]
    [InlineData(@"[]a]", "begins with ]")]
    [InlineData(@"^a", "^ is not supported")]
    [InlineData(@"a$", "$ is not supported")]
    [InlineData(@"\w+", @"\w is not supported")]
    [InlineData(@"\bx", @"\b is not supported")]
    [InlineData(@"(a)\1", @"\1 is not supported")]
    [InlineData(@"\p{Han}", @"\p is not supported")]
    [InlineData(@"(?<n>a)", "only the groups")]
    [InlineData(@"(?#x)", "only the groups")]
    [InlineData(@"(?m:x)", "only the groups")]
    [InlineData(@"a{,3}", "{,n}")]
    [InlineData("[\U00020000-\U0002A6DF]", "beyond U+FFFF")]
    [InlineData(@"\", "is not supported")]
    [InlineData(@"(", "(")]
    [InlineData(@"[b-a]", "b-a")]
    public void Patterns_that_mean_something_else_in_dotnet_are_refused(string pattern, string problem)
    {
        Assert.Null(WordSplit.TryCreate(pattern, true, out string? found));
        Assert.Contains(problem, found);
    }

    [Theory]
    [InlineData(WordSplit.Gpt2Pattern)]
    [InlineData(@"\p{N}{1,3}")]
    [InlineData(@"[一-龥぀-ゟ゠-ヿ]+")]
    [InlineData(@"[!""#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s+")]
    [InlineData(@"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t)?|a+?b")]
    public void Patterns_of_well_known_models_are_accepted(string pattern)
    {
        Assert.NotNull(WordSplit.TryCreate(pattern, true, out string? problem));
        Assert.Null(problem);
    }

    [Fact]
    public void Characters_that_stand_for_others_have_their_category() =>
        Assert.All(WordSplit.StandIns, entry => Assert.Equal(entry.Key, CharUnicodeInfo.GetUnicodeCategory(entry.Value)));

    [Fact]
    public void Text_between_matches_is_kept_or_dropped()
    {
        Assert.Equal(["a", "--", "b"], Split(WordSplit.Literal("--", true), "a--b"));
        Assert.Equal(["--"], Split(WordSplit.Literal("--", false), "a--b"));
        Assert.Equal(["--"], Split(WordSplit.Literal("--", false), "\U0001F642--\U0001F642"));
        Assert.Empty(Split(WordSplit.Literal("--", true), ""));
        Assert.Equal(["\U0001F642\U0001F642", "--", "z"], Split(WordSplit.Literal("--", true), "\U0001F642\U0001F642--z"));
        Assert.Equal(["a\U0001F642", "--", "b", "--", "\U0001F642"], Split(WordSplit.Literal("--", true), "a\U0001F642--b--\U0001F642"));
    }

    [Fact]
    public void Letters_and_digits_beyond_the_bmp_are_letters_and_digits()
    {
        WordSplit split = WordSplit.TryCreate(@"\p{L}+|\p{N}", true, out _)!;
        Assert.Equal(["\U0001D400a\U00020BB7", "\U0001D7D8", "\U0001D7D9", "\U0001F642\U0001F642", "x"],
            Split(split, "\U0001D400a\U00020BB7\U0001D7D8\U0001D7D9\U0001F642\U0001F642x"));
    }

    private static List<string> Split(WordSplit split, string text)
    {
        List<string> words = new();
        split.Split(text, word => words.Add(word.ToString()));
        return words;
    }
}
