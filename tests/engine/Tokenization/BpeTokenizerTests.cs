using System.Diagnostics;
using System.Globalization;
using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;
using CsCheck;
using Xunit;

namespace Rollout.Engine.Tests;

public class BpeTokenizerTests
{
    public static TheoryData<string> Makes => new("gpt2", "qwen2", "llama3");

    [Theory]
    [MemberData(nameof(Makes))]
    public void Ids_and_text_are_those_of_the_reference(string make)
    {
        BpeTokenizer tokenizer = Load(make);
        using JsonDocument golden = JsonDocument.Parse(File.ReadAllBytes(GoldenFiles.Get("tokenizers", make, "cases.json")));
        List<string> wrong = new();
        foreach (JsonElement reference in golden.RootElement.GetProperty("cases").EnumerateArray())
        {
            string text = reference.GetProperty("text").GetString()!;
            string written = reference.GetProperty("text").GetRawText();
            int[] ids = Ids(reference, "ids");
            if (tokenizer.Encode(text, false) is var ours && !ours.SequenceEqual(ids))
                wrong.Add($"{written}: [{string.Join(',', ours)}], not [{string.Join(',', ids)}]");
            if (!tokenizer.Encode(text, true).SequenceEqual(Ids(reference, "special")))
                wrong.Add($"{written}: with special tokens");
            if (tokenizer.Decode(ids) != reference.GetProperty("decoded").GetString())
                wrong.Add($"{written}: decoded");
        }
        foreach (JsonElement reference in golden.RootElement.GetProperty("decode").EnumerateArray())
        {
            string decoded = tokenizer.Decode(Ids(reference, "ids"));
            if (decoded != reference.GetProperty("decoded").GetString())
                wrong.Add($"{reference.GetRawText()}: decoded as {JsonSerializer.Serialize(decoded)}");
        }
        Assert.Empty(wrong);
    }

    [Theory]
    [MemberData(nameof(Makes))]
    public void Decoding_gives_back_the_text(string make)
    {
        BpeTokenizer tokenizer = Load(make);
        GenText.Sample(text =>
        {
            string expected = make == "qwen2" ? Nfc.Normalize(text).ToString() : text;
            Assert.Equal(expected, tokenizer.Decode(tokenizer.Encode(text, false)));
        }, iter: 1000);
    }

    [Theory]
    [MemberData(nameof(Makes))]
    public void Lone_surrogates_are_read_as_replacement_characters(string make)
    {
        BpeTokenizer tokenizer = Load(make);
        int[] expected = tokenizer.Encode("a\uFFFDb \uFFFD\U0001F642\uFFFD", false);
        Assert.Equal(expected, tokenizer.Encode("a\uD800b \uDC00\U0001F642\uD83D", false));
    }

    [Fact]
    public void Special_tokens_are_known_and_have_no_bytes()
    {
        BpeTokenizer tokenizer = Load("llama3");
        Assert.Equal(707, tokenizer.VocabSize);
        Assert.Equal(702, tokenizer.SpecialTokens["<|begin_of_text|>"]);
        Assert.Equal(5, tokenizer.SpecialTokens.Count);
        Assert.True(tokenizer.TokenBytes(702).IsEmpty);
        Assert.Equal([702], tokenizer.Encode("", true));
        Assert.Empty(tokenizer.Encode("", false));

        BpeTokenizer added = Load("qwen2");
        Assert.Equal("<tool_call>"u8, added.TokenBytes(added.Encode("<tool_call>", false)[0]));
        Assert.False(added.SpecialTokens.ContainsKey("<tool_call>"));
    }

    [Fact]
    public void Ids_that_no_token_has_decode_to_nothing()
    {
        BpeTokenizer tokenizer = Load("llama3");
        foreach (int id in (int[])[-1, int.MinValue, int.MaxValue, tokenizer.VocabSize])
            Assert.True(tokenizer.TokenBytes(id).IsEmpty);
        Assert.Equal("a", tokenizer.Decode([-1, tokenizer.Encode("a", false)[0], int.MaxValue]));
    }

    [Fact]
    public void Token_bytes_take_no_memory()
    {
        BpeTokenizer tokenizer = Load("gpt2");
        int sum = tokenizer.TokenBytes(300).Length;
        long before = GC.GetAllocatedBytesForCurrentThread();
        for (int id = 0; id < 700; id++)
            sum += tokenizer.TokenBytes(id).Length;
        Assert.Equal(0, GC.GetAllocatedBytesForCurrentThread() - before);
        Assert.True(sum > 700);
    }

    [Theory]
    [InlineData("a")]
    [InlineData(" ")]
    [InlineData("\n")]
    [InlineData("\u4E2D")]
    [InlineData("\U0001D400")]
    [InlineData("the!")]
    [InlineData("\u0301\u0327")]
    [InlineData("<|")]
    [InlineData("<|im_start|>")]
    public void Time_grows_with_length_and_not_with_its_square(string unit)
    {
        BpeTokenizer tokenizer = Load("qwen2", WithChains);
        string text = string.Concat(Enumerable.Repeat(unit, 1_000_000 / unit.Length));
        Stopwatch watch = Stopwatch.StartNew();
        int[] ids = tokenizer.Encode(text, false);
        // Half a second on a free machine; the square would be many minutes.
        Assert.InRange(watch.Elapsed.TotalSeconds, 0, 30);
        Assert.NotEmpty(ids);
    }

    [Fact]
    public void Merges_go_by_rank_and_then_from_the_left()
    {
        // Against the definition, on words of three letters with many overlapping merges.
        (int Left, int Right)[] pairs = [('a', 'b'), ('b', 'a'), ('a', 'a'), ('c', 256), (256, 257), (258, 258), (258, 'a'), ('b', 'c')];
        Dictionary<long, BytePairMerger.Merge> merges = new();
        for (int rank = 0; rank < pairs.Length; rank++)
            merges.Add(BytePairMerger.Pair(pairs[rank].Left, pairs[rank].Right), new(rank, 256 + rank));
        int[] byteIds = [.. Enumerable.Range(0, 256)];
        Gen.Char["abc"].Array[1, 40].Sample(letters =>
        {
            List<int> expected = letters.Select(letter => (int)letter).ToList();
            while (true)
            {
                (BytePairMerger.Merge best, int at) = (new BytePairMerger.Merge(int.MaxValue, 0), -1);
                for (int i = 0; i + 1 < expected.Count; i++)
                {
                    if (merges.TryGetValue(BytePairMerger.Pair(expected[i], expected[i + 1]), out BytePairMerger.Merge merge)
                        && merge.Rank < best.Rank)
                    {
                        (best, at) = (merge, i);
                    }
                }
                if (at < 0)
                    break;
                expected[at] = best.Id;
                expected.RemoveAt(at + 1);
            }
            List<int> ids = new();
            using BytePairMerger merger = new(merges);
            merger.Apply([.. letters.Select(letter => (byte)letter)], byteIds, ids);
            Assert.Equal(expected, ids);
        }, iter: 2000);
    }

    [Fact]
    public void A_prefix_space_is_added_where_there_is_none()
    {
        BpeTokenizer plain = Load("gpt2");
        BpeTokenizer prefixed = Load("gpt2", root => root["pre_tokenizer"]!["add_prefix_space"] = true);
        Assert.Equal(plain.Encode(" hello", false), prefixed.Encode("hello", false));
        Assert.Equal(plain.Encode(" hello", false), prefixed.Encode(" hello", false));
        Assert.Empty(prefixed.Encode("", false));
    }

    [Theory]
    [InlineData("model", "null", "model must be an object")]
    [InlineData("model.type", "\"Unigram\"", "model.type must be BPE; it is \"Unigram\"")]
    [InlineData("model.vocab", "[]", "model.vocab must be an object")]
    [InlineData("model.vocab", "{\"a\":0}", "model.vocab lacks tokens for 255 byte values, the first 0x00")]
    [InlineData("model.vocab.a", "-1", "model.vocab 'a' must have an id from 0")]
    [InlineData("model.vocab.a", "2000000000", "model.vocab 'a' must have an id from 0")]
    [InlineData("model.vocab.a", "65", "have the same id, 65")]
    [InlineData("model.merges", "null", "model.merges must be an array")]
    [InlineData("model.merges", "[\"a b c\"]", "model.merges [0] must be")]
    [InlineData("model.merges", "[[\"a\"]]", "model.merges [0] must be")]
    [InlineData("model.merges", "[7]", "model.merges [0] must be")]
    [InlineData("model.merges", "[\"a zz\"]", "must be in model.vocab")]
    [InlineData("model.dropout", "0.1", "model.dropout must be 0; it is 0.1")]
    [InlineData("model.byte_fallback", "true", "model.byte_fallback is not supported")]
    [InlineData("model.continuing_subword_prefix", "\"##\"", "model.continuing_subword_prefix is not supported")]
    [InlineData("model.end_of_word_suffix", "\"</w>\"", "model.end_of_word_suffix is not supported")]
    [InlineData("normalizer", """{"type":"Lowercase"}""", """normalizer must be null or NFC; it is {"type":"Lowercase"}""")]
    [InlineData("normalizer", """{"type":"Sequence","normalizers":[{"type":"NFC"},{"type":"NFD"}]}""", """it is {"type":"NFD"}""")]
    [InlineData("pre_tokenizer", "null", "pre_tokenizer must be ByteLevel")]
    [InlineData("pre_tokenizer", """{"type":"Metaspace"}""", """{"type":"Metaspace"} is not supported""")]
    [InlineData("pre_tokenizer", """{"type":"Sequence","pretokenizers":[{"type":"Digits"}]}""", "pre_tokenizer must be ByteLevel")]
    [InlineData("pre_tokenizer.pretokenizers.0.behavior", "\"MergedWithNext\"", "behavior of Split must be Isolated")]
    [InlineData("pre_tokenizer.pretokenizers.0.pattern", "{}", "pattern of Split must be")]
    [InlineData("pre_tokenizer.pretokenizers.0.pattern", """{"Regex":"\\p{Han}+"}""", @"\p is not supported")]
    [InlineData("pre_tokenizer.pretokenizers.0.pattern", """{"Regex":"(a"}""", "cannot be used")]
    [InlineData("post_processor", """{"type":"BertProcessing"}""", "post_processor must be null, ByteLevel or one TemplateProcessing")]
    [InlineData("post_processor.processors.1.single", "[]", "post_processor.processors.single must hold Sequence A once")]
    [InlineData("post_processor.processors.1.special_tokens", "{}", "must be Sequence A or a token of special_tokens")]
    [InlineData("decoder", "null", "decoder must be ByteLevel; it is missing")]
    [InlineData("decoder", """{"type":"Metaspace"}""", """decoder must be ByteLevel; it is {"type":"Metaspace"}""")]
    [InlineData("added_tokens", "{}", "added_tokens must be an array")]
    [InlineData("added_tokens.0.content", "\"\"", "must have a content and an id")]
    [InlineData("added_tokens.0.content", "\"<|eot_id|>\"", "added_tokens '<|eot_id|>' appears twice")]
    [InlineData("added_tokens.0.content", "\"a\"", "added_tokens 'a' has id 702, but 64 in model.vocab")]
    [InlineData("added_tokens.0.id", "3", "added_tokens '<|begin_of_text|>' has the id of '$', 3")]
    [InlineData("added_tokens.0.id", "4194305", "must have a content and an id")]
    [InlineData("added_tokens.0.lstrip", "true", "added_tokens '<|begin_of_text|>': lstrip is not supported")]
    [InlineData("added_tokens.0.single_word", "true", "added_tokens '<|begin_of_text|>': single_word is not supported")]
    public void What_is_not_supported_is_refused_by_name(string path, string json, string problem)
    {
        InvalidModelException error = Assert.Throws<InvalidModelException>(() => Load("llama3", root =>
        {
            string[] parts = path.Split('.');
            JsonNode at = root;
            foreach (string part in parts[..^1])
                at = (int.TryParse(part, CultureInfo.InvariantCulture, out int index) ? at[index] : at[part])!;
            at[parts[^1]] = JsonNode.Parse(json);
        }));
        Assert.Contains(problem, error.Message);
    }

    [Fact]
    public void Any_mutilated_file_is_read_or_refused()
    {
        byte[] text = File.ReadAllBytes(GoldenFiles.Get("tokenizers", "llama3", "tokenizer.json"));
        // The first part holds everything but the vocabulary and merges, which are more of the same.
        Gen.Select(Gen.Int[0, 2500], Gen.OneOf(Gen.Byte, Gen.OneOf("0123456789{}[]\",:-e.tn"u8.ToArray()))).Array[1, 4].Sample(changes =>
        {
            byte[] changed = text.ToArray();
            foreach ((int at, byte value) in changes)
                changed[at] = value;
            try
            {
                BpeTokenizer.Parse(changed).Encode("Hello <|eot_id|>", true);
            }
            catch (InvalidModelException)
            {
            }
        }, iter: 200);
    }

    private static Gen<string> GenText { get; } = Gen.OneOf(
        Gen.OneOf(
            "the", " ", "\n", "'s", "12", "é", "e\u0301", "привет", "你好", "\U0001F642", "\U0001D400", "<|", "Ġ", "\0", "!?")
            .Array[0, 20].Select(parts => string.Concat(parts)),
        Gen.Int[0, 0x10FFFF].Where(Rune.IsValid).Array[0, 20].Select(runes => string.Concat(runes.Select(rune => new Rune(rune)))));

    /// <summary>Adds merges that make long runs of one letter into longer and longer tokens.</summary>
    private static void WithChains(JsonObject root)
    {
        JsonNode model = root["model"]!;
        int next = 100_000;
        for (string token = "a"; token.Length < 64; token += token)
        {
            model["vocab"]![token + token] = next++;
            model["merges"]!.AsArray().Add(new JsonArray(token, token));
        }
    }

    private static BpeTokenizer Load(string make, Action<JsonObject> change)
    {
        JsonObject root = JsonNode.Parse(File.ReadAllBytes(GoldenFiles.Get("tokenizers", make, "tokenizer.json")))!.AsObject();
        change(root);
        return BpeTokenizer.Parse(Encoding.UTF8.GetBytes(root.ToJsonString()));
    }

    private static BpeTokenizer Load(string make) => BpeTokenizer.Load(GoldenFiles.Get("tokenizers", make, "tokenizer.json"));

    private static int[] Ids(JsonElement reference, string name) =>
        [.. reference.GetProperty(name).EnumerateArray().Select(id => id.GetInt32())];
}
