using System.Text;
using CsCheck;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>Stop strings are found at the token in which they end, for any token boundaries, and at no other.</summary>
public sealed class StopStringMatcherTests
{
    [Fact]
    public void A_stop_string_is_found_where_a_search_of_the_whole_text_finds_it()
        => Gen.Select(
            Gen.Select(Gen.OneOf("a", "b", "é", "日"), Gen.Int[0, 9]).Array[1, 7].Array[1, 4], // of characters of one to three bytes
            Gen.OneOf<byte>(0x61, 0x62, 0xC3, 0xA9, 0xE6, 0x97, 0xA5).Array[0, 5].Array[1, 12], // pieces that cut characters
            Gen.Int[0, 11].Array[1, 40]).Sample((stops, pieces, tokens) =>
        {
            string[] strings = [.. stops.Select(stop => string.Concat(stop.Select(letter => letter.Item1)))];
            byte[][] all = [.. pieces, .. strings.Select(Encoding.UTF8.GetBytes)];
            StopStringMatcher matcher = new(strings, new PieceTokenizer(all));
            List<byte> text = [];
            foreach (int draw in tokens)
            {
                int token = draw % all.Length;
                int before = text.Count;
                text.AddRange(all[token]);
                string? expected = strings.FirstOrDefault(stop => EndsAfter(text, Encoding.UTF8.GetBytes(stop), before));
                Assert.Equal(expected is not null, matcher.Append(token));
                Assert.Equal(expected, matcher.Matched);
            }
        }, iter: 3000, threads: 1);

    [Fact]
    public void A_short_stop_string_before_min_tokens_does_not_match_at_the_next_token()
    {
        StopStringMatcher matcher = new(["a long one", "a"], new PieceTokenizer(["a"u8.ToArray(), "x"u8.ToArray(), []]));
        Assert.True(matcher.Append(0));
        Assert.False(matcher.Append(1));
        Assert.Null(matcher.Matched);
        Assert.True(matcher.Append(0));
        Assert.False(matcher.Append(2)); // a token without a text
    }

    [Theory]
    [InlineData(1)]
    [InlineData(63)]
    [InlineData(64)]
    [InlineData(65)]
    [InlineData(1000)]
    public void A_token_of_any_length_is_searched_to_both_ends(int filler)
    {
        byte[] tail = [.. Enumerable.Repeat((byte)'.', filler), .. "sto"u8];
        byte[] head = [.. "p"u8, .. Enumerable.Repeat((byte)'.', filler)];
        StopStringMatcher matcher = new(["stop"], new PieceTokenizer([tail, head, [.. "stop"u8, .. tail], [.. head, .. "stop"u8]]));
        Assert.Equal([false, true, true, true, false, false, true],
            new[] { 0, 1, 2, 1, 1, 0, 3 }.Select(matcher.Append));
    }

    private static bool EndsAfter(List<byte> text, byte[] stop, int before)
    {
        for (int end = Math.Max(before + 1, stop.Length); end <= text.Count; end++)
            if (text.GetRange(end - stop.Length, stop.Length).SequenceEqual(stop)) return true;
        return false;
    }
}
