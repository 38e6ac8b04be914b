using System.Text;
using System.Text.Json;

namespace Rollout.Engine;

/// <summary>
/// Reads a tokenizer.json into what <see cref="BpeTokenizer"/> needs. A setting that would change ids or text and is not supported is
/// refused by name, never ignored. truncation and padding are ignored: they concern batches, and transformers overrides them too.
/// </summary>
internal sealed class TokenizerJson
{
    // Largest id: bounds the size of the tables against hostile files.
    private const int MostId = 1 << 22;

    private readonly List<string> _problems = [];
    private readonly Dictionary<string, int> _vocabulary = new(StringComparer.Ordinal);
    private readonly Dictionary<int, string> _textById = [];
    private readonly Dictionary<int, byte[]> _tokenBytes = [];
    private readonly int[] _byteIds = new int[256];
    private readonly Dictionary<long, BytePairMerger.Merge> _merges = [];
    private readonly List<(string Text, int Id)> _addedRaw = [];
    private readonly List<(string Text, int Id)> _addedNormalized = [];
    private readonly Dictionary<string, int> _special = new(StringComparer.Ordinal);
    private readonly List<WordSplit> _splits = [];
    private readonly List<int> _before = [];
    private readonly List<int> _after = [];
    private bool _ignoreMerges;
    private bool _nfc;
    private int _prefixSpaceAt = -1;

    private TokenizerJson()
    {
    }

    public static BpeTokenizer.Data Read(string path, JsonElement root)
    {
        TokenizerJson reader = new();
        reader.ReadModel(root);
        InvalidModelException.ThrowIfAny(path, reader._problems);
        reader.ReadNormalizer(Get(root, "normalizer"), "normalizer");
        reader.ReadAddedTokens(Get(root, "added_tokens"));
        reader.ReadPreTokenizer(Get(root, "pre_tokenizer"));
        reader.ReadPostProcessor(Get(root, "post_processor"), "post_processor");
        reader.ReadDecoder(Get(root, "decoder"), "decoder");
        InvalidModelException.ThrowIfAny(path, reader._problems);
        return new BpeTokenizer.Data
        {
            TokenBytes = reader._tokenBytes,
            ByteIds = reader._byteIds,
            Merges = reader._merges,
            WholeWords = reader._ignoreMerges ? reader._vocabulary : null,
            LongestToken = reader._vocabulary.Keys.Max(token => token.Length),
            Nfc = reader._nfc,
            AddedRaw = reader._addedRaw.Count > 0 ? new AddedTokens(reader._addedRaw) : null,
            AddedNormalized = reader._addedNormalized.Count > 0 ? new AddedTokens(reader._addedNormalized) : null,
            Special = reader._special,
            Splits = reader._splits,
            PrefixSpaceAt = reader._prefixSpaceAt,
            Before = reader._before,
            After = reader._after,
        };
    }

    private static JsonElement? Get(JsonElement? parent, string name) =>
        parent is { ValueKind: JsonValueKind.Object } found && found.TryGetProperty(name, out JsonElement value)
        && value.ValueKind != JsonValueKind.Null ? value : null;

    private static string? GetText(JsonElement? parent, string name) =>
        Get(parent, name) is { ValueKind: JsonValueKind.String } value ? value.GetString() : null;

    private static bool IsTrue(JsonElement? parent, string name) => Get(parent, name) is { ValueKind: JsonValueKind.True };

    private static IEnumerable<JsonElement> Elements(JsonElement? parent, string name) =>
        Get(parent, name) is { ValueKind: JsonValueKind.Array } array ? array.EnumerateArray() : [];

    private static bool TryGetId(JsonElement? value, out int id)
    {
        id = 0;
        return value is { ValueKind: JsonValueKind.Number } number && number.TryGetInt32(out id) && id is >= 0 and <= MostId;
    }

    private void ReadModel(JsonElement root)
    {
        if (Get(root, "model") is not { ValueKind: JsonValueKind.Object } model)
        {
            _problems.Add("model must be an object");
            return;
        }
        // Old files of GPT-2 have no type.
        if (Get(model, "type") is { } type && GetText(model, "type") != "BPE")
            _problems.Add($"model.type must be BPE; it is {Shorten(type)}");
        foreach (string name in (string[])["continuing_subword_prefix", "end_of_word_suffix"])
        {
            if (Get(model, name) is { } affix && GetText(model, name) != "")
                _problems.Add($"model.{name} is not supported; it is {Shorten(affix)}");
        }
        if (Get(model, "dropout") is { } dropout && !(dropout.ValueKind == JsonValueKind.Number && dropout.GetDouble() == 0))
            _problems.Add($"model.dropout must be 0; it is {Shorten(dropout)}");
        if (IsTrue(model, "byte_fallback"))
            _problems.Add("model.byte_fallback is not supported: only byte-level vocabularies are");
        _ignoreMerges = IsTrue(model, "ignore_merges");
        ReadVocabulary(model);
        if (_problems.Count == 0)
            ReadMerges(model);
    }

    private void ReadVocabulary(JsonElement model)
    {
        if (Get(model, "vocab") is not { ValueKind: JsonValueKind.Object } vocabulary)
        {
            _problems.Add("model.vocab must be an object of tokens and ids");
            return;
        }
        foreach (JsonProperty entry in vocabulary.EnumerateObject())
        {
            if (!TryGetId(entry.Value, out int id))
            {
                Report($"model.vocab {InvalidModelException.Quote(entry.Name)} must have an id from 0 to {MostId}");
                continue;
            }
            _vocabulary.Add(entry.Name, id);
            if (!_textById.TryAdd(id, entry.Name))
            {
                (string? one, string? other) = (InvalidModelException.Quote(_textById[id]), InvalidModelException.Quote(entry.Name));
                Report($"model.vocab: {one} and {other} have the same id, {id}");
            }
            // A token with other characters, such as one repeated among the added tokens, is never the result of a merge.
            _tokenBytes[id] = ByteAlphabet.ToBytes(entry.Name) ?? Encoding.UTF8.GetBytes(entry.Name);
        }
        List<int> missing = new();
        for (int value = 0; value < 256; value++)
        {
            if (!_vocabulary.TryGetValue(ByteAlphabet.ToChar((byte)value).ToString(), out _byteIds[value]))
                missing.Add(value);
        }
        if (missing.Count > 0)
            Report($"model.vocab lacks tokens for {missing.Count} byte values, the first 0x{missing[0]:X2}: it is not byte-level");
    }

    private void ReadMerges(JsonElement model)
    {
        if (Get(model, "merges") is not { ValueKind: JsonValueKind.Array })
        {
            _problems.Add("model.merges must be an array");
            return;
        }
        int rank = 0;
        foreach (JsonElement merge in Elements(model, "merges"))
        {
            if (SplitMerge(merge) is not var (left, right))
            {
                Report($"model.merges [{rank}] must be \"a b\" or [\"a\", \"b\"]; it is {Shorten(merge)}");
            }
            else if (!_vocabulary.TryGetValue(left, out int leftId) || !_vocabulary.TryGetValue(right, out int rightId)
                || !_vocabulary.TryGetValue(left + right, out int id))
            {
                Report($"model.merges [{rank}], {Shorten(merge)}: both tokens and the merged one must be in model.vocab");
            }
            else
            {
                // Where a pair is listed twice the reference uses the last.
                _merges[BytePairMerger.Pair(leftId, rightId)] = new BytePairMerger.Merge(rank, id);
            }
            rank++;
        }
    }

    private static (string Left, string Right)? SplitMerge(JsonElement merge)
    {
        if (merge.ValueKind == JsonValueKind.Array && merge.GetArrayLength() == 2
            && merge[0].ValueKind == JsonValueKind.String && merge[1].ValueKind == JsonValueKind.String)
        {
            return (merge[0].GetString()!, merge[1].GetString()!);
        }
        return merge.ValueKind == JsonValueKind.String && merge.GetString()!.Split(' ') is [var left, var right] ? (left, right) : null;
    }

    private void ReadNormalizer(JsonElement? normalizer, string where)
    {
        switch (normalizer is null ? "" : GetText(normalizer, "type"))
        {
            case "":
                break;
            case "NFC":
                _nfc = true;
                break;
            case "Sequence":
                foreach (JsonElement part in Elements(normalizer, "normalizers"))
                    ReadNormalizer(part, $"{where}.normalizers");
                break;
            default:
                Report($"{where} must be null or NFC; it is {Shorten(normalizer!.Value)}");
                break;
        }
    }

    private void ReadAddedTokens(JsonElement? tokens)
    {
        if (tokens is { ValueKind: not JsonValueKind.Array })
            Report("added_tokens must be an array");
        if (tokens is not { ValueKind: JsonValueKind.Array } array)
            return;
        HashSet<string> seen = new(StringComparer.Ordinal);
        foreach (JsonElement token in array.EnumerateArray())
        {
            if (GetText(token, "content") is not { Length: > 0 } text || !TryGetId(Get(token, "id"), out int id))
            {
                Report($"added_tokens: {Shorten(token)} must have a content and an id from 0 to {MostId}");
                continue;
            }
            string quoted = InvalidModelException.Quote(text);
            foreach (string option in (string[])["single_word", "lstrip", "rstrip"])
            {
                if (IsTrue(token, option))
                    Report($"added_tokens {quoted}: {option} is not supported");
            }
            if (!seen.Add(text))
                Report($"added_tokens {quoted} appears twice");
            else if (_vocabulary.TryGetValue(text, out int known) && known != id)
                Report($"added_tokens {quoted} has id {id}, but {known} in model.vocab");
            else if (!_textById.TryAdd(id, text) && _textById[id] != text)
                Report($"added_tokens {quoted} has the id of {InvalidModelException.Quote(_textById[id])}, {id}");

            // normalized says in which form of the text the token is matched, and it is decoded in that form.
            bool normalized = IsTrue(token, "normalized");
            string form = normalized && _nfc ? Nfc.Normalize(text).ToString() : text;
            (normalized ? _addedNormalized : _addedRaw).Add((form, id));
            if (IsTrue(token, "special"))
                _special[text] = id;
            // As the reference decodes it: through the byte alphabet where it can be.
            _tokenBytes[id] = IsTrue(token, "special") ? [] : ByteAlphabet.ToBytes(form) ?? Encoding.UTF8.GetBytes(form);
        }
    }

    private void ReadPreTokenizer(JsonElement? preTokenizer)
    {
        List<JsonElement> steps = GetText(preTokenizer, "type") == "Sequence" ? Elements(preTokenizer, "pretokenizers").ToList()
            : preTokenizer is { } single ? [single] : [];
        for (int i = 0; i < steps.Count; i++)
        {
            JsonElement step = steps[i];
            switch (GetText(step, "type"))
            {
                case "Split":
                    ReadSplit(step);
                    break;
                case "Digits":
                    AddSplit(IsTrue(step, "individual_digits") ? @"\p{N}" : @"\p{N}+", keepGaps: true);
                    break;
                case "ByteLevel" when i == steps.Count - 1:
                    // Both options are true when they are not given.
                    if (Get(step, "add_prefix_space") is not { ValueKind: JsonValueKind.False })
                        _prefixSpaceAt = _splits.Count;
                    if (Get(step, "use_regex") is not { ValueKind: JsonValueKind.False })
                        AddSplit(WordSplit.Gpt2Pattern, keepGaps: true);
                    return;
                default:
                    Report($"pre_tokenizer: {Shorten(step)} is not supported here");
                    break;
            }
        }
        Report("pre_tokenizer must be ByteLevel, or a Sequence that ends with it: only byte-level tokenizers are supported");
    }

    private void ReadSplit(JsonElement step)
    {
        bool keepGaps = GetText(step, "behavior") == "Isolated";
        if (!keepGaps && !(GetText(step, "behavior") == "Removed" && IsTrue(step, "invert")))
        {
            Report($"pre_tokenizer: behavior of Split must be Isolated, or Removed with invert; it is {Shorten(step)}");
            return;
        }
        JsonElement? pattern = Get(step, "pattern");
        if (GetText(pattern, "Regex") is { } regex)
            AddSplit(regex, keepGaps);
        else if (GetText(pattern, "String") is { Length: > 0 } literal)
            _splits.Add(WordSplit.Literal(literal, keepGaps));
        else
            Report($"pre_tokenizer: pattern of Split must be a Regex or a String; it is {Shorten(step)}");
    }

    private void AddSplit(string pattern, bool keepGaps)
    {
        if (WordSplit.TryCreate(pattern, keepGaps, out string? problem) is { } split)
            _splits.Add(split);
        else
            Report($"pre_tokenizer: the pattern {InvalidModelException.Quote(pattern)} cannot be used: {problem}");
    }

    private void ReadPostProcessor(JsonElement? processor, string where)
    {
        switch (processor is null ? "ByteLevel" : GetText(processor, "type"))
        {
            case "ByteLevel":
                break; // changes offsets only
            case "Sequence":
                foreach (JsonElement part in Elements(processor, "processors"))
                    ReadPostProcessor(part, $"{where}.processors");
                break;
            case "TemplateProcessing" when _before.Count + _after.Count == 0:
                ReadTemplate(processor!.Value, where);
                break;
            default:
                Report($"{where} must be null, ByteLevel or one TemplateProcessing; it is {Shorten(processor!.Value)}");
                break;
        }
    }

    private void ReadTemplate(JsonElement template, string where)
    {
        int texts = 0;
        foreach (JsonElement part in Elements(template, "single"))
        {
            if (GetText(Get(part, "Sequence"), "id") == "A")
            {
                texts++;
                continue;
            }
            string? name = GetText(Get(part, "SpecialToken"), "id");
            List<JsonElement> ids = name is null ? [] : Elements(Get(Get(template, "special_tokens"), name), "ids").ToList();
            if (ids.Count == 0)
                Report($"{where}.single: {Shorten(part)} must be Sequence A or a token of special_tokens");
            foreach (JsonElement element in ids)
            {
                if (TryGetId(element, out int id) && _textById.ContainsKey(id))
                    (texts == 0 ? _before : _after).Add(id);
                else
                    Report($"{where}.special_tokens: {Shorten(element)} is not the id of a token");
            }
        }
        if (texts != 1)
            Report($"{where}.single must hold Sequence A once");
    }

    private void ReadDecoder(JsonElement? decoder, string where)
    {
        string? type = GetText(decoder, "type");
        if (type == "Sequence" && Elements(decoder, "decoders").ToList() is [var only])
            ReadDecoder(only, $"{where}.decoders");
        else if (type != "ByteLevel")
            Report($"{where} must be ByteLevel; it is {(decoder is { } given ? Shorten(given) : "missing")}");
    }

    private void Report(string problem)
    {
        // A vocabulary may have a problem in every token, so the list is capped.
        const int Most = 1000;
        if (_problems.Count < Most)
            _problems.Add(problem);
    }

    private static string Shorten(JsonElement value)
    {
        const int Most = 100;
        string text = value.GetRawText();
        return text.Length > Most ? text[..Most] + "..." : text;
    }
}
