using System.Text;
using Rollout.Engine;

namespace Rollout.Server.Generation;

/// <summary>
/// Turns the tokens of one sample into text as they come. A token may end in the middle of a character, and a text may turn out to begin
/// a stop string that will be cut away; both are held back until it is known. The pieces joined are <see cref="Tokenizer.Decode"/> of all
/// tokens.
/// </summary>
internal sealed class TextStream(Tokenizer tokenizer, IReadOnlyList<string> stops)
{
    private readonly Decoder _decoder = Encoding.UTF8.GetDecoder();
    private readonly StringBuilder _decoded = new();
    private int _lastToken; // where in _decoded the last token's text begins

    /// <summary>The text that can be given out now that these tokens have come.</summary>
    /// <param name="tokens">The next tokens.</param>
    /// <param name="last">No more will come: hold nothing back.</param>
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
    /// Where the match begins that ended in the last token. Not simply the first or last in the text: matches before min_tokens do not
    /// count, and one token may hold two.
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
    /// Where the text to hold back begins: at the start of a stop string, or at a whole one that ends in the last token. A whole one
    /// before that token did not end the sample.
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
