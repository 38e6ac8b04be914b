using System.Runtime.InteropServices;
using Rollout.Engine;

namespace Rollout.Server.Services;

/// <summary>
/// Turns the tokens of one sample into text as they come. A token may end in the middle of a character, and a text may turn out to begin
/// a stop string that will be cut away; both are held back until it is known. The pieces joined are the text of all tokens at once.
/// <code>
///   tokens  [ text given out or pending | shown again for context | not yet a whole character ]
///           0                           _context                  _decoded                    Count
/// </code>
/// </summary>
internal sealed class TextStream(Tokenizer tokenizer, IReadOnlyList<string> stops)
{
    private const char Incomplete = '\uFFFD';

    private readonly List<int> _tokens = [];
    private int _context;
    private int _decoded;
    private string _pending = "";

    /// <summary>The text that can be given out now that these tokens have come.</summary>
    /// <param name="tokens">The next tokens.</param>
    /// <param name="last">No more will come: hold nothing back.</param>
    /// <param name="matchedStop">The stop string that ended the sample; text ends before it.</param>
    public string Append(ReadOnlySpan<int> tokens, bool last, string? matchedStop)
    {
        _tokens.AddRange(tokens);
        int lastToken = last && matchedStop is not null ? LastTokenLength() : 0;
        Decode(last);
        int cut = !last ? HoldFrom(_pending) : matchedStop is null ? _pending.Length : MatchIn(_pending, matchedStop, lastToken);
        string text = _pending[..cut];
        _pending = _pending[cut..];
        return text;
    }

    private int LastTokenLength()
    {
        ReadOnlySpan<int> shown = CollectionsMarshal.AsSpan(_tokens)[_context..];
        return shown.IsEmpty ? 0 : tokenizer.Decode(shown).Length - tokenizer.Decode(shown[..^1]).Length;
    }

    /// <summary>
    /// Where the match begins that ended in the last token. Not simply the first or last in the text: matches before min_tokens do not
    /// count, and one token may hold two.
    /// </summary>
    private static int MatchIn(string text, string stop, int lastToken)
    {
        int from = Math.Clamp(text.Length - lastToken - stop.Length + 1, 0, text.Length);
        int match = text.IndexOf(stop, from, StringComparison.Ordinal);
        if (match < 0) match = text.LastIndexOf(stop, StringComparison.Ordinal);
        return match < 0 ? text.Length : match;
    }

    // Decoding starts a few tokens back because some tokenizers treat the first token of a text differently.
    private void Decode(bool last)
    {
        ReadOnlySpan<int> all = CollectionsMarshal.AsSpan(_tokens);
        if (_decoded == all.Length) return;
        string before = tokenizer.Decode(all[_context.._decoded]);
        string after = tokenizer.Decode(all[_context..]);
        if (!last && (after.Length <= before.Length || after[^1] == Incomplete)) return;
        if (after.Length > before.Length) _pending += after[before.Length..];
        _context = _decoded;
        _decoded = all.Length;
    }

    /// <summary>Where text begins that may become, or already is, a stop string.</summary>
    private int HoldFrom(string text)
    {
        int hold = text.Length;
        foreach (string stop in stops)
        {
            if (stop.Length == 0) continue;
            int match = text.IndexOf(stop, StringComparison.Ordinal);
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
