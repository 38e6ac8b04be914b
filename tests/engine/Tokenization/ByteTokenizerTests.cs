using CsCheck;
using Xunit;

namespace Rollout.Engine.Tests;

public sealed class ByteTokenizerTests
{
    private readonly ByteTokenizer _tokenizer = new();

    [Fact]
    public void A_token_is_a_byte()
    {
        Assert.Equal(256, _tokenizer.VocabSize);
        Assert.Empty(_tokenizer.SpecialTokens);
        Assert.Equal([0x61, 0xC3, 0xA9], _tokenizer.Encode("aé", true));
        Assert.Equal([0xFF], _tokenizer.TokenBytes(255).ToArray());
        Assert.True(_tokenizer.TokenBytes(256).IsEmpty);
        Assert.True(_tokenizer.TokenBytes(-1).IsEmpty);
    }

    [Fact]
    public void Invalid_utf8_decodes_to_one_replacement_character_for_each_maximal_part()
    {
        Assert.Equal("\uFFFDa", _tokenizer.Decode([0xE2, 0x82, 'a']));
        Assert.Equal("\uFFFD\uFFFD", _tokenizer.Decode([0x80, 0xFF]));
        Assert.Equal("\u20AC", _tokenizer.Decode([0xE2, 0x82, 0xAC]));
        Assert.Equal("", _tokenizer.Decode([]));
    }

    [Fact]
    public void Half_a_surrogate_pair_is_read_as_a_replacement_character() =>
        Assert.Equal([0xEF, 0xBF, 0xBD, 'b'], _tokenizer.Encode("\uD800b", false));

    [Fact]
    public void Any_ids_decode() => Gen.Int[-2, 260].Array[0, 50].Sample(ids => _tokenizer.Decode(ids) is not null);
}
