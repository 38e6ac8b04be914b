using System.Text;
using CsCheck;
using Rollout.Engine;
using Rollout.Server.Generation;

namespace Rollout.Server.Tests;

/// <summary>Streamed text has whole characters and no part of the stop string that ends it; no other text is held back.</summary>
public sealed class TextStreamTests
{
    // Few letters, of one to four bytes, so that stop strings meet, overlap and begin each other.
    private static readonly string[] s_letters = ["a", "b", "é", "漢", "😀", "😁"];
    private static readonly Gen<string> s_letter = Gen.Int[0, s_letters.Length - 1].Select(i => s_letters[i]);

    private sealed record Case(string Text, string[] Stops, int MinTokens, int MostTokens, int[] Tokens, int[] Appends, bool EndsAlone);

    private static readonly Gen<Case> s_case =
        from text in s_letter.Array[0, 24]
        from stops in s_letter.Array[1, 4].Select(letters => string.Concat(letters)).Array[0, 3]
        from minTokens in Gen.Int[0, 6]
        from mostTokens in Gen.Int[1, 60]
        from tokens in Gen.Int[1, 6].Array[1, 20]
        from appends in Gen.Int[0, 4].Array[1, 20]
        from endsAlone in Gen.Bool
        select new Case(string.Concat(text), stops, minTokens, mostTokens, tokens, appends, endsAlone);

    /// <summary>
    /// A sample as the engine ends it: by a stop string that ends in its last token, of min_tokens or more, or at its most tokens. Its
    /// tokens come in any number of appends; the end may come with the last of them or alone.
    /// </summary>
    [Fact]
    public void All_text_before_the_match_is_given_out_that_begins_no_stop_string()
    {
        int stopped = 0;
        s_case.Sample(sample =>
        {
            byte[][] tokens = [.. Cut(Encoding.UTF8.GetBytes(sample.Text), sample.Tokens).Take(sample.MostTokens)];
            (int count, string? matched, string expected) = End(tokens, sample.Stops, sample.MinTokens);
            if (matched is not null) Interlocked.Increment(ref stopped);
            TextStream stream = new(Pieces(tokens), sample.Stops);
            StringBuilder given = new();
            int taken = 0;
            for (int i = 0; taken < count || (sample.EndsAlone && i == 0); i++)
            {
                int[] next = [.. Enumerable.Range(taken, Math.Min(sample.Appends[i % sample.Appends.Length] + (i % 2), count - taken))];
                if (taken + next.Length == count && !sample.EndsAlone) break;
                given.Append(stream.Append(next, last: false, matchedStop: null));
                taken += next.Length;
                Assert.Equal(Known(tokens, taken)[..HeldFrom(tokens, taken, sample.Stops)], given.ToString());
                Assert.StartsWith(given.ToString(), expected, StringComparison.Ordinal);
            }

            given.Append(stream.Append([.. Enumerable.Range(taken, count - taken)], last: true, matched));
            Assert.Equal(expected, given.ToString());
        }, iter: 30_000);
        Assert.InRange(stopped, 1000, 30_000);
    }

    [Fact]
    public void Pieces_of_text_joined_are_the_text_of_all_tokens()
    {
        ByteTokenizer tokenizer = new();
        Gen<byte[]> text = Gen.OneOf(Gen.String.Select(Encoding.UTF8.GetBytes), Gen.Byte.Array[0, 40]);
        Gen.Select(text, Gen.Int[1, 5].Array[1, 80]).Sample((bytes, sizes) =>
        {
            int[] tokens = [.. bytes.Select(value => (int)value)];
            TextStream stream = new(tokenizer, ["never\u0001there"]);
            StringBuilder joined = new();
            for (int at = 0, i = 0; at < tokens.Length; i++)
            {
                int to = Math.Min(tokens.Length, at + sizes[i % sizes.Length]);
                string piece = stream.Append(tokens.AsSpan(at, to - at), last: false, matchedStop: null);
                Assert.False(piece.Length > 0 && char.IsHighSurrogate(piece[^1]));
                joined.Append(piece);
                at = to;
            }

            joined.Append(stream.Append([], last: true, matchedStop: null));
            Assert.Equal(tokenizer.Decode(tokens), joined.ToString());
        });
    }

    [Theory]
    [InlineData("hello END", "END", "hello ")]
    [InlineData("ENENEND", "END", "ENEN")]
    [InlineData("END", "END", "")]
    [InlineData("an END before min_tokens, END", "END", "an END before min_tokens, ")]
    public void A_stop_string_is_never_given_out_in_part(string text, string stop, string expected)
    {
        ByteTokenizer tokenizer = new();
        foreach (int size in (int[])[1, 2, 3, 100])
        {
            TextStream stream = new(tokenizer, [stop, "other"]);
            int[][] pieces = [.. tokenizer.Encode(text, addSpecialTokens: false).Chunk(size)];
            StringBuilder joined = new();
            for (int i = 0; i < pieces.Length; i++)
            {
                bool last = i == pieces.Length - 1;
                joined.Append(stream.Append(pieces[i], last, last ? stop : null));
                Assert.StartsWith(joined.ToString(), expected, StringComparison.Ordinal);
            }

            Assert.Equal(expected, joined.ToString());
        }
    }

    [Fact]
    public void A_token_may_hold_the_stop_string_twice()
    {
        TextStream stream = new(Pieces("line"u8.ToArray(), "\n\n"u8.ToArray()), ["\n"]);
        Assert.Equal("line", stream.Append([0, 1], last: true, matchedStop: "\n"));
    }

    private static IEnumerable<byte[]> Cut(byte[] bytes, int[] sizes)
    {
        for (int at = 0, i = 0; at < bytes.Length; at += sizes[i++ % sizes.Length])
            yield return bytes[at..Math.Min(bytes.Length, at + sizes[i % sizes.Length])];
    }

    /// <summary>The characters that are whole after so many tokens.</summary>
    private static string Known(byte[][] tokens, int count)
    {
        byte[] bytes = [.. tokens.Take(count).SelectMany(token => token)];
        Decoder decoder = Encoding.UTF8.GetDecoder();
        char[] chars = new char[bytes.Length + 1];
        return new string(chars, 0, decoder.GetChars(bytes, chars, flush: false));
    }

    /// <summary>Tokens of a sample, the stop string that ended it or null, and its text.</summary>
    private static (int Count, string? Matched, string Text) End(byte[][] tokens, string[] stops, int minTokens)
    {
        for (int count = 1; count <= tokens.Length; count++)
        {
            if (count < minTokens || stops.FirstOrDefault(stop => MatchIn(tokens, count, stop) >= 0) is not { } matched) continue;
            return (count, matched, Known(tokens, count)[..MatchIn(tokens, count, matched)]);
        }

        return (tokens.Length, null, Encoding.UTF8.GetString([.. tokens.SelectMany(token => token)]));
    }

    /// <summary>Where the first match begins that ends in the last of so many tokens, or -1.</summary>
    private static int MatchIn(byte[][] tokens, int count, string stop)
    {
        string known = Known(tokens, count);
        int before = Known(tokens, count - 1).Length;
        for (int at = 0; at + stop.Length <= known.Length; at++)
            if (at + stop.Length > before && known.AsSpan(at, stop.Length).SequenceEqual(stop)) return at;
        return -1;
    }

    /// <summary>Where text begins that is a stop string which may have ended the sample, or that may become one.</summary>
    private static int HeldFrom(byte[][] tokens, int count, string[] stops)
    {
        if (count == 0) return 0;
        string known = Known(tokens, count);
        int[] matches = [.. stops.Select(stop => MatchIn(tokens, count, stop)).Where(at => at >= 0)];
        bool Begins(int at, string stop) => stop.Length > known.Length - at && stop.StartsWith(known[at..], StringComparison.Ordinal);
        int begins = Enumerable.Range(0, known.Length).FirstOrDefault(at => stops.Any(stop => Begins(at, stop)), known.Length);
        return matches.Append(begins).Min();
    }

    private static PieceTokenizer Pieces(params byte[][] pieces) => new(pieces);

    private sealed class PieceTokenizer(byte[][] pieces) : Tokenizer
    {
        public override int VocabSize => pieces.Length;

        public override IReadOnlyDictionary<string, int> SpecialTokens => new Dictionary<string, int>();

        public override int[] Encode(string text, bool addSpecialTokens) => throw new NotSupportedException();

        public override ReadOnlySpan<byte> TokenBytes(int id) => pieces[id];
    }
}
