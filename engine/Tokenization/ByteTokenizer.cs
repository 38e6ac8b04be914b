using System.Collections.Frozen;
using System.Text;

namespace Rollout.Engine;

/// <summary>A token is a byte of UTF-8, its id the byte's value. For tests and examples that have no vocabulary.</summary>
public sealed class ByteTokenizer : Tokenizer
{
    private static readonly byte[] s_bytes = [.. Enumerable.Range(0, 256).Select(value => (byte)value)];

    public override int VocabSize => s_bytes.Length;

    public override IReadOnlyDictionary<string, int> SpecialTokens => FrozenDictionary<string, int>.Empty;

    public override int[] Encode(string text, bool addSpecialTokens)
    {
        ArgumentNullException.ThrowIfNull(text);
        // The encoder replaces a lone surrogate by U+FFFD itself.
        return Array.ConvertAll(Encoding.UTF8.GetBytes(text), value => (int)value);
    }

    public override ReadOnlySpan<byte> TokenBytes(int id) => (uint)id < s_bytes.Length ? s_bytes.AsSpan(id, 1) : default;
}
