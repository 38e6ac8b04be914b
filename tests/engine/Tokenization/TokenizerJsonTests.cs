using System.Text;
using System.Text.Json.Nodes;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>
/// Settings of a tokenizer.json that the golden files do not have. Expected values are derived by hand from the reference's rules.
/// </summary>
public sealed class TokenizerJsonTests
{
    [Fact]
    public void Of_two_merges_the_one_that_is_listed_first_goes_first_however_many_there_are()
    {
        // 2000 merges that nothing in the text needs, then the two that compete.
        BpeTokenizer model = Model(root =>
        {
            for (int i = 0; i < 2000; i++)
                Merge(root, $"{(char)('A' + i % 26)}", $"{(char)(0x100 + i / 26 % 60)}{(i >= 1560 ? "!" : "")}");
            Merge(root, "b", "c");
            Merge(root, "a", "b");
        });
        Assert.Equal(["a", "bc"], Texts(model, "abc"));
        Assert.Equal(["ab", "b"], Texts(model, "abb"));
        // In a word so long that places need more than 16 bits, too.
        Assert.Equal(["a", "bc"], Texts(model, new string('x', 70_000) + "abc")[^2..]);
    }

    [Fact]
    public void A_merge_that_stands_twice_has_its_last_rank()
    {
        BpeTokenizer model = Model(root =>
        {
            Merge(root, "a", "b");
            Merge(root, "b", "c");
            Merge(root, "a", "b");
        });
        Assert.Equal(["a", "bc"], Texts(model, "abc"));
    }

    [Fact]
    public void With_ignore_merges_a_word_of_the_vocabulary_is_one_token_the_longest_included()
    {
        string longest = new('y', 300); // no merges make it
        BpeTokenizer ignoring = Model(root =>
        {
            root["model"]!["ignore_merges"] = true;
            Add(root, "abc");
            Add(root, longest);
            Merge(root, "a", "b");
        });
        Assert.Equal(["abc"], Texts(ignoring, "abc"));
        Assert.Equal([longest], Texts(ignoring, longest));
        Assert.Equal(301, ignoring.Encode(longest + "y", false).Length);
        BpeTokenizer merging = Model(root =>
        {
            Add(root, "abc");
            Merge(root, "a", "b");
        });
        Assert.Equal(["ab", "c"], Texts(merging, "abc"));
    }

    [Theory]
    [InlineData("<tool>", "<tool>x", "<t")] // listed in any order: the longest at a place
    [InlineData("<tool>x", "<tool>", "<t")]
    [InlineData("<t", "<tool>", "<tool>x")]
    public void Of_added_tokens_that_begin_at_one_place_the_longest_is_taken(params string[] added)
    {
        BpeTokenizer model = Model(root =>
        {
            foreach (string text in added)
                AddToken(root, text);
        });
        Assert.Equal(["a", "<tool>x", "<tool>", "<t", "x", "<"], Texts(model, "a<tool>x<tool><tx<"));
    }

    [Fact]
    public void Added_tokens_are_found_before_or_after_normalisation_as_they_say()
    {
        BpeTokenizer model = Model(root =>
        {
            root["normalizer"] = JsonNode.Parse("""{"type":"NFC"}""");
            AddToken(root, "e\u0301!"); // looked for in the text as it is
            AddToken(root, "o\u0301!", normalized: true); // looked for in its normal form
        });
        int raw = 256, normalized = 257;
        Assert.Equal([raw, normalized, normalized], model.Encode("e\u0301!o\u0301!\u00F3!", false));
        Assert.DoesNotContain(raw, model.Encode("\u00E9!", false));
        // The mark before a raw token is not composed with what follows it, and text after it is normalised.
        Assert.Equal(model.Encode("\u00E9", false), model.Encode("e\u0301!e\u0301", false)[1..]);
    }

    [Fact]
    public void A_special_token_has_no_bytes_wherever_its_id_comes_from()
    {
        BpeTokenizer model = Model(root =>
        {
            Add(root, "<end>");
            AddToken(root, "<end>", special: true, id: 256);
            AddToken(root, "<pad>", special: true);
            AddToken(root, "<word>");
        });
        Assert.Equal([256, 257, 258], model.Encode("<end><pad><word>", false));
        Assert.Equal("<word>", model.Decode([256, 257, 258]));
        Assert.Equal(["<end>", "<pad>"], model.SpecialTokens.Keys.Order());
    }

    [Fact]
    public void Special_tokens_go_before_and_after_a_text_as_the_template_says()
    {
        BpeTokenizer model = Model(root =>
        {
            AddToken(root, "<s>", special: true);
            AddToken(root, "</s>", special: true);
            root["post_processor"] = JsonNode.Parse("""
                {"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}},
                 {"SpecialToken":{"id":"</s>","type_id":0}},{"SpecialToken":{"id":"<s>","type_id":0}}],"pair":[],
                 "special_tokens":{"<s>":{"id":"<s>","ids":[256],"tokens":["<s>"]},"</s>":{"id":"</s>","ids":[257],"tokens":["</s>"]}}}
                """);
        });
        Assert.Equal([256, 'a', 257, 256], model.Encode("a", true));
        Assert.Equal([256, 257, 256], model.Encode("", true));
        Assert.Equal(['a'], model.Encode("a", false));
    }

    [Theory]
    [InlineData("""{"type":"Digits","individual_digits":true}""", "ab|1|2|3|c")]
    [InlineData("""{"type":"Digits","individual_digits":false}""", "ab|123|c")]
    [InlineData("""{"type":"Digits"}""", "ab|123|c")]
    [InlineData("""{"type":"Split","pattern":{"Regex":"[0-9]"},"behavior":"Isolated","invert":false}""", "ab|1|2|3|c")]
    [InlineData("""{"type":"Split","pattern":{"String":"12"},"behavior":"Isolated","invert":false}""", "ab|1|2|3c")]
    [InlineData("""{"type":"Split","pattern":{"Regex":"[0-9]+"},"behavior":"Removed","invert":true}""", "123")]
    public void Text_is_split_as_the_pre_tokenizer_says(string split, string expected)
    {
        // Merges across every border that a split may make.
        BpeTokenizer model = Model(root =>
        {
            foreach (string pair in (string[])["2 3", "1 23", "a b", "3 c", "123 c", "ab 123c"])
                Merge(root, pair.Split(' ')[0], pair.Split(' ')[1]);
            root["pre_tokenizer"]!["pretokenizers"]!.AsArray().Insert(0, JsonNode.Parse(split));
        });
        Assert.Equal(expected, string.Join('|', Texts(model, "ab123c")));
    }

    [Fact]
    public void Matches_that_are_removed_are_refused()
        => Assert.Contains("behavior of Split", Assert.Throws<InvalidModelException>(() => Model(root =>
            root["pre_tokenizer"]!["pretokenizers"]!.AsArray().Insert(0, JsonNode.Parse(
                """{"type":"Split","pattern":{"String":"x"},"behavior":"Removed","invert":false}""")))).Message);

    [Theory]
    [InlineData("""{"type":"ByteLevel","use_regex":false}""", true, false)] // both are on when they are not given
    [InlineData("""{"type":"ByteLevel","add_prefix_space":false}""", false, true)]
    [InlineData("""{"type":"ByteLevel","add_prefix_space":null,"use_regex":null}""", true, true)]
    [InlineData("""{"type":"ByteLevel","add_prefix_space":false,"use_regex":false}""", false, false)]
    public void Byte_level_adds_a_space_and_splits_words_unless_told_not_to(string byteLevel, bool space, bool regex)
    {
        BpeTokenizer model = Model(root =>
        {
            Merge(root, "a", "\u0120");
            root["pre_tokenizer"] = JsonNode.Parse(byteLevel);
        });
        // Only a space counts, not a line break.
        Assert.Equal([.. space ? (int[])[' ', '\n'] : ['\n'], 'x'], model.Encode("\nx", false));
        Assert.Equal([' ', 'x'], model.Encode(" x", false));
        // "a " merges only where the words are not split.
        Assert.Equal([.. space ? (int[])[' '] : [], .. regex ? (int[])['a', ' '] : [256], 'b'], model.Encode("a b", false));
    }

    [Fact]
    public void The_space_goes_before_every_word_of_the_splits_that_come_first()
    {
        BpeTokenizer model = Model(root => root["pre_tokenizer"] = JsonNode.Parse("""
            {"type":"Sequence","pretokenizers":[{"type":"Digits","individual_digits":true},{"type":"ByteLevel","add_prefix_space":true}]}
            """));
        Assert.Equal("a 1 b", string.Concat(Texts(model, "a1b"))[1..]);
    }

    /// <summary>The texts of a text's tokens.</summary>
    private static string[] Texts(BpeTokenizer tokenizer, string text)
        => [.. tokenizer.Encode(text, false).Select(id => tokenizer.Decode([id]))];

    /// <summary>A tokenizer of the 256 bytes, each with its own value as id, that splits nothing; and what is added to it.</summary>
    private static BpeTokenizer Model(Action<JsonObject> change)
    {
        JsonObject root = JsonNode.Parse("""
            {"model":{"type":"BPE","vocab":{},"merges":[]},"added_tokens":[],"decoder":{"type":"ByteLevel"},
             "pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"ByteLevel","add_prefix_space":false,"use_regex":false}]}}
            """)!.AsObject();
        for (int value = 0; value < 256; value++)
            root["model"]!["vocab"]![ByteAlphabet.ToChar((byte)value).ToString()] = value;
        change(root);
        return BpeTokenizer.Parse(Encoding.UTF8.GetBytes(root.ToJsonString()));
    }

    private static void Add(JsonObject root, string token)
    {
        JsonObject vocabulary = root["model"]!["vocab"]!.AsObject();
        if (!vocabulary.ContainsKey(token))
            vocabulary[token] = vocabulary.Count;
    }

    private static void Merge(JsonObject root, string left, string right)
    {
        Add(root, right);
        Add(root, left + right);
        root["model"]!["merges"]!.AsArray().Add(new JsonArray(left, right));
    }

    private static void AddToken(JsonObject root, string text, bool special = false, bool normalized = false, int? id = null)
    {
        JsonArray tokens = root["added_tokens"]!.AsArray();
        JsonObject vocabulary = root["model"]!["vocab"]!.AsObject();
        int next = vocabulary.Count + tokens.Count(token => !vocabulary.ContainsKey((string)token!["content"]!));
        tokens.Add(new JsonObject { ["id"] = id ?? next, ["content"] = text, ["special"] = special, ["normalized"] = normalized });
    }
}
