using System.Buffers;
using System.Collections.Frozen;
using System.Text;

namespace Rollout.Engine;

/// <summary>
/// Byte-level byte-pair encoding as in GPT-2, Llama 3 and Qwen, read from a tokenizer.json. The ids equal those of Hugging Face's
/// tokenizers.
/// <code>
///   text -> added tokens -> NFC -> added tokens -> words (regular expressions) -> UTF-8 bytes -> merges -> ids
/// </code>
/// <para>
/// Not built on Microsoft.ML.Tokenizers: its merging takes minutes for a word of a million letters (2.0.1), it has no ignore_merges, and it
/// supports neither the two kinds of added token nor, with invariant globalisation, NFC.
/// </para>
/// </summary>
public sealed class BpeTokenizer : Tokenizer
{
    private readonly Data _data;
    private readonly byte[] _bytes;
    private readonly int[] _offsets;
    private readonly FrozenDictionary<string, int> _special;

    internal BpeTokenizer(Data data)
    {
        _data = data;
        _special = data.Special.ToFrozenDictionary(StringComparer.Ordinal);
        _offsets = new int[data.TokenBytes.Keys.Max() + 2];
        _bytes = new byte[data.TokenBytes.Sum(token => token.Value.Length)];
        foreach ((int id, byte[]? bytes) in data.TokenBytes)
            _offsets[id + 1] = bytes.Length;
        for (int id = 0; id + 1 < _offsets.Length; id++)
        {
            _offsets[id + 1] += _offsets[id];
            if (data.TokenBytes.TryGetValue(id, out byte[]? bytes))
                bytes.CopyTo(_bytes, _offsets[id]);
        }
        data.TokenBytes.Clear();
    }

    public override int VocabSize => _offsets.Length - 1;

    public override IReadOnlyDictionary<string, int> SpecialTokens => _special;

    /// <summary>Reads a tokenizer.json.</summary>
    /// <exception cref="InvalidModelException">The file is missing, invalid or not supported; lists every problem.</exception>
    public static new BpeTokenizer Load(string path) => new(TokenizerJson.Read(path, JsonFile.ReadObject(path)));

    /// <summary>As <see cref="Load"/>, from the text of a tokenizer.json.</summary>
    public static BpeTokenizer Parse(ReadOnlySpan<byte> json) =>
        new(TokenizerJson.Read("tokenizer.json", JsonFile.ParseObject("tokenizer.json", json)));

    public override ReadOnlySpan<byte> TokenBytes(int id) =>
        (uint)id < (uint)VocabSize ? _bytes.AsSpan(_offsets[id].._offsets[id + 1]) : default;

    public override int[] Encode(string text, bool addSpecialTokens)
    {
        ArgumentNullException.ThrowIfNull(text);
        List<int> ids = new(text.Length / 3 + 4);
        if (addSpecialTokens)
            ids.AddRange(_data.Before);
        using (BytePairMerger merger = new(_data.Merges))
            EncodeRaw(ReplaceLoneSurrogates(text), merger, ids);
        if (addSpecialTokens)
            ids.AddRange(_data.After);
        return [.. ids];
    }

    /// <summary>Extracts the added tokens that are matched before normalisation.</summary>
    private void EncodeRaw(ReadOnlySpan<char> text, BytePairMerger merger, List<int> ids)
    {
        while (_data.AddedRaw is { } added && added.TryFind(text, out int at, out int length, out int id))
        {
            EncodeNormalized(Normalize(text[..at]), merger, ids);
            ids.Add(id);
            text = text[(at + length)..];
        }
        EncodeNormalized(Normalize(text), merger, ids);
    }

    private ReadOnlySpan<char> Normalize(ReadOnlySpan<char> text) => _data.Nfc ? Nfc.Normalize(text) : text;

    /// <summary>Extracts those that are matched after it.</summary>
    private void EncodeNormalized(ReadOnlySpan<char> text, BytePairMerger merger, List<int> ids)
    {
        while (_data.AddedNormalized is { } added && added.TryFind(text, out int at, out int length, out int id))
        {
            EncodeWords(text[..at], 0, merger, ids);
            ids.Add(id);
            text = text[(at + length)..];
        }
        EncodeWords(text, 0, merger, ids);
    }

    private void EncodeWords(ReadOnlySpan<char> text, int split, BytePairMerger merger, List<int> ids)
    {
        if (text.IsEmpty)
            return;
        if (split == _data.PrefixSpaceAt && text[0] != ' ')
            text = string.Concat(" ", text);
        if (split == _data.Splits.Count)
            EncodeWord(text, merger, ids);
        else
            _data.Splits[split].Split(text, word => EncodeWords(word, split + 1, merger, ids));
    }

    private void EncodeWord(ReadOnlySpan<char> word, BytePairMerger merger, List<int> ids)
    {
        const int OnStack = 256;
        byte[]? rented = null;
        int most = Encoding.UTF8.GetMaxByteCount(word.Length);
        Span<byte> buffer = most <= OnStack ? stackalloc byte[OnStack] : (rented = ArrayPool<byte>.Shared.Rent(most));
        Span<byte> bytes = buffer[..Encoding.UTF8.GetBytes(word, buffer)];
        if (bytes.Length == 1)
            ids.Add(_data.ByteIds[bytes[0]]);
        else if (_data.WholeWords is { } whole && TryFindWhole(whole, bytes, out int id))
            ids.Add(id);
        else
            merger.Apply(bytes, _data.ByteIds, ids);
        if (rented is not null)
            ArrayPool<byte>.Shared.Return(rented);
    }

    private bool TryFindWhole(Dictionary<string, int> vocabulary, ReadOnlySpan<byte> word, out int id)
    {
        id = 0;
        if (word.Length > _data.LongestToken)
            return false;
        Span<char> text = word.Length <= 256 ? stackalloc char[256] : new char[word.Length];
        for (int i = 0; i < word.Length; i++)
            text[i] = ByteAlphabet.ToChar(word[i]);
        return vocabulary.GetAlternateLookup<ReadOnlySpan<char>>().TryGetValue(text[..word.Length], out id);
    }

    /// <summary>The checked content of a tokenizer.json.</summary>
    internal sealed class Data
    {
        /// <summary>Bytes by id, of all tokens that are not special; special ones have none.</summary>
        public required Dictionary<int, byte[]> TokenBytes { get; init; }

        /// <summary>The token of each byte.</summary>
        public required int[] ByteIds { get; init; }

        public required Dictionary<long, BytePairMerger.Merge> Merges { get; init; }

        /// <summary>With ignore_merges, the vocabulary: a word in it is one token, without merging.</summary>
        public required Dictionary<string, int>? WholeWords { get; init; }

        /// <summary>Bytes of the longest token.</summary>
        public required int LongestToken { get; init; }

        public required bool Nfc { get; init; }

        public required AddedTokens? AddedRaw { get; init; }

        public required AddedTokens? AddedNormalized { get; init; }

        public required Dictionary<string, int> Special { get; init; }

        public required IReadOnlyList<WordSplit> Splits { get; init; }

        /// <summary>The split before which a space is put where there is none (add_prefix_space), or -1.</summary>
        public required int PrefixSpaceAt { get; init; }

        /// <summary>Special tokens that go before and after a text.</summary>
        public required IReadOnlyList<int> Before { get; init; }

        public required IReadOnlyList<int> After { get; init; }
    }
}
