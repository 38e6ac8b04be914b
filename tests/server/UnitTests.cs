using System.Text;
using CsCheck;
using Rollout.Engine;
using Rollout.Server.Commands;
using Rollout.Server.Hosting;
using Rollout.Server.Services;

namespace Rollout.Server.Tests;

public sealed class UnitTests
{
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
        TextStream stream = new(new PieceTokenizer("line", "\n\n"), ["\n"]);
        Assert.Equal("line", stream.Append([0, 1], last: true, matchedStop: "\n"));
    }

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

    private sealed class PieceTokenizer(params string[] pieces) : Tokenizer
    {
        public override int VocabSize => pieces.Length;

        public override IReadOnlyDictionary<string, int> SpecialTokens => new Dictionary<string, int>();

        public override int[] Encode(string text, bool addSpecialTokens) => throw new NotSupportedException();

        public override ReadOnlySpan<byte> TokenBytes(int id) => Encoding.UTF8.GetBytes(pieces[id]);
    }
}
