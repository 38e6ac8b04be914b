using System.Text;
using Rollout.Engine;

namespace Rollout.Server.Generation;

/// <summary>
/// Decodes the tokens of one sample incrementally. A token may end in the middle of a character, and text may be the beginning of a stop
/// string that will be removed; both are held back until that is known. The concatenated pieces equal <see cref="Tokenizer.Decode"/> of
/// all tokens.
/// </summary>
internal sealed class TextStream(Tokenizer tokenizer, IReadOnlyList<string> stops)
{
    private readonly Decoder _decoder = Encoding.UTF8.GetDecoder();
    private readonly StringBuilder _decoded = new();
    private int _lastToken; // offset in _decoded of the last token's text

    /// <summary>Appends tokens and returns the text that can be sent now.</summary>
    /// <param name="tokens">The next tokens.</param>
    /// <param name="last">Whether these are the last tokens: nothing is held back then.</param>
    /// <param name="matchedStop">The stop string that ended the sample; text ends before it.</param>
    public string Append(ReadOnlySpan<int> tokens, bool last, string? matchedStop)
    {
        foreach (int token in tokens)
        {
            _lastToken = _decoded.Length;
            Decode(tokenizer.TokenBytes(token), flush: false);
        }

        if (last) Decode([], flush: true);
        string pending = _decoded.ToString();
        int cut = !last ? HoldFrom(pending) : matchedStop is null ? pending.Length : MatchIn(pending, matchedStop);
        _decoded.Remove(0, cut);
        _lastToken -= cut;
        return pending[..cut];
    }

    private void Decode(ReadOnlySpan<byte> bytes, bool flush)
    {
        const int Piece = 256;
        Span<char> chars = stackalloc char[Piece + 4];
        do
        {
            ReadOnlySpan<byte> piece = bytes[..Math.Min(Piece, bytes.Length)];
            bytes = bytes[piece.Length..];
            _decoded.Append(chars[.._decoder.GetChars(piece, chars, flush)]);
        }
        while (!bytes.IsEmpty);
    }

    /// <summary>
    /// The start of the match that ended in the last token. It need not be the first or last match in the text: matches before min_tokens
    /// do not count, and one token may contain two.
    /// </summary>
    private int MatchIn(string text, string stop)
    {
        int match = MatchInLastToken(text, stop);
        if (match < 0) match = text.LastIndexOf(stop, StringComparison.Ordinal);
        return match < 0 ? text.Length : match;
    }

    private int MatchInLastToken(string text, string stop)
        => text.IndexOf(stop, Math.Clamp(_lastToken - stop.Length + 1, 0, text.Length), StringComparison.Ordinal);

    /// <summary>
    /// The start of the text to hold back: a beginning of a stop string, or a whole one that ends in the last token. A whole one before
    /// that token did not end the sample.
    /// </summary>
    private int HoldFrom(string text)
    {
        int hold = text.Length;
        foreach (string stop in stops)
        {
            if (stop.Length == 0) continue;
            int match = MatchInLastToken(text, stop);
            if (match >= 0) hold = Math.Min(hold, match);
            for (int length = Math.Min(stop.Length - 1, text.Length); length > 0; length--)
            {
                if (!text.EndsWith(stop[..length], StringComparison.Ordinal)) continue;
                hold = Math.Min(hold, text.Length - length);
                break;
            }
        }

        return hold;
    }
}
