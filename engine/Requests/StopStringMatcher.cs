namespace Rollout.Engine;

/// <summary>
/// Finds stop strings in the bytes of the sampled tokens, token by token. A match may begin in one token and end in another. Keeps only
/// the last bytes, and allocates nothing per token.
/// </summary>
internal sealed class StopStringMatcher
{
    private readonly IReadOnlyList<string> _strings;
    private readonly byte[][] _patterns;
    private readonly Tokenizer _tokenizer;
    private readonly byte[] _tail; // the last bytes seen, one less than the longest pattern
    private byte[] _window;
    private int _tailLength;

    public StopStringMatcher(IReadOnlyList<string> strings, Tokenizer tokenizer)
    {
        _strings = strings;
        _patterns = [.. strings.Select(System.Text.Encoding.UTF8.GetBytes)];
        _tokenizer = tokenizer;
        _tail = new byte[_patterns.Max(pattern => pattern.Length) - 1];
        _window = new byte[_tail.Length + 64];
    }

    /// <summary>The stop string that ended in the last token; the first in the given order if there are several.</summary>
    public string? Matched { get; private set; }

    /// <summary>Appends the next token's bytes. True when a stop string ends in them.</summary>
    public bool Append(int token)
    {
        Matched = null;
        ReadOnlySpan<byte> bytes = _tokenizer.TokenBytes(token);
        int length = _tailLength + bytes.Length;
        if (_window.Length < length) _window = new byte[2 * length]; // a token longer than any before
        Span<byte> window = _window.AsSpan(0, length);
        _tail.AsSpan(0, _tailLength).CopyTo(window);
        bytes.CopyTo(window[_tailLength..]);
        for (int i = 0; i < _patterns.Length; i++)
        {
            // Only matches that end in the new bytes count; earlier ones were found by earlier calls.
            int from = Math.Max(0, _tailLength + 1 - _patterns[i].Length);
            if (window[from..].IndexOf(_patterns[i]) < 0) continue;
            Matched = _strings[i];
            break;
        }

        _tailLength = Math.Min(_tail.Length, length);
        window[^_tailLength..].CopyTo(_tail);
        return Matched is not null;
    }
}
