using System.Buffers;

namespace Rollout.Engine;

/// <summary>
/// Tokens that are found in the text itself, before it is split into words: the leftmost match, and of those the longest.
/// </summary>
internal sealed class AddedTokens
{
    private readonly SearchValues<string> _any;
    private readonly ILookup<char, (string Text, int Id)> _byFirst;

    public AddedTokens(IReadOnlyCollection<(string Text, int Id)> tokens)
    {
        _any = SearchValues.Create([.. tokens.Select(token => token.Text)], StringComparison.Ordinal);
        _byFirst = tokens.OrderByDescending(token => token.Text.Length).ToLookup(token => token.Text[0]);
    }

    /// <summary>Finds the first token: its position, length and id. False when there is none.</summary>
    public bool TryFind(ReadOnlySpan<char> text, out int at, out int length, out int id)
    {
        at = text.IndexOfAny(_any);
        if (at >= 0)
        {
            foreach ((string candidate, int candidateId) in _byFirst[text[at]])
            {
                if (text[at..].StartsWith(candidate, StringComparison.Ordinal))
                {
                    (length, id) = (candidate.Length, candidateId);
                    return true;
                }
            }
        }
        (length, id) = (0, 0);
        return false;
    }
}
