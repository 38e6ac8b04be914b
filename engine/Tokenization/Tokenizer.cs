using System.Buffers;
using System.Text;

namespace Rollout.Engine;

/// <summary>Text to token ids and back. Immutable: one instance serves all threads.</summary>
public abstract class Tokenizer
{
    /// <summary>One more than the largest id. A model's vocabulary may be padded beyond it.</summary>
    public abstract int VocabSize { get; }

    /// <summary>Special tokens by their text.</summary>
    public abstract IReadOnlyDictionary<string, int> SpecialTokens { get; }

    /// <summary>Reads the tokenizer.json of a Hugging Face model folder.</summary>
    /// <exception cref="InvalidModelException">The file is missing, invalid or not supported; lists every problem.</exception>
    public static Tokenizer Load(string folder) => BpeTokenizer.Load(Path.Combine(folder, "tokenizer.json"));

    /// <summary>
    /// The ids of a text. Special and added tokens are recognised in the text; half a surrogate pair is read as U+FFFD.
    /// </summary>
    /// <param name="text">Any text of any length n; the time is O(n log n).</param>
    /// <param name="addSpecialTokens">
    /// Adds the special tokens that the model expects around a text, such as a beginning-of-text token.
    /// </param>
    public abstract int[] Encode(string text, bool addSpecialTokens);

    /// <summary>
    /// The bytes that a token stands for, which need not be whole characters; empty for special tokens and for ids beyond the vocabulary,
    /// which a padded model may produce. Allocates nothing.
    /// </summary>
    public abstract ReadOnlySpan<byte> TokenBytes(int id);

    /// <summary>
    /// The text of the concatenated <see cref="TokenBytes"/>, special tokens left out; every maximal invalid part of UTF-8 becomes one
    /// U+FFFD.
    /// </summary>
    public string Decode(ReadOnlySpan<int> ids)
    {
        ArrayBufferWriter<byte> bytes = new(Math.Max(16, ids.Length * 4));
        foreach (int id in ids)
            bytes.Write(TokenBytes(id));
        return Encoding.UTF8.GetString(bytes.WrittenSpan);
    }

    /// <summary>The text with every lone surrogate, which UTF-8 cannot express, replaced by U+FFFD.</summary>
    private protected static string ReplaceLoneSurrogates(string text)
    {
        if (text.AsSpan().IndexOfAnyInRange('\uD800', '\uDFFF') < 0)
            return text;
        return string.Create(text.Length, text, static (result, source) =>
        {
            source.CopyTo(result);
            for (int i = 0; i < result.Length; i++)
            {
                if (!char.IsSurrogate(result[i]))
                    continue;
                if (i + 1 < result.Length && char.IsSurrogatePair(result[i], result[i + 1]))
                    i++;
                else
                    result[i] = '\uFFFD';
            }
        });
    }
}
