using System.Buffers;
using System.Globalization;
using System.Text;
using System.Text.RegularExpressions;

namespace Rollout.Engine;

/// <summary>
/// One step of splitting text into words by a regular expression of tokenizer.json.
/// <para>
/// Such expressions are written for Oniguruma, which matches code points; .NET matches UTF-16 units, where a letter beyond U+FFFF is two
/// surrogates and not a letter. So before matching, each such character is replaced by one of its general category below U+FFFF. Syntax
/// that the two dialects write differently or give different meanings is refused.
/// </para>
/// </summary>
internal sealed partial class WordSplit
{
    /// <summary>GPT-2's pattern, the default of a ByteLevel pre-tokenizer.</summary>
    public const string Gpt2Pattern = @"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

    // For each general category that exists beyond U+FFFF, a character below it that a pattern is unlikely to name.
    private static readonly Dictionary<UnicodeCategory, char> s_stand = new()
    {
        [UnicodeCategory.UppercaseLetter] = '\uA640',
        [UnicodeCategory.LowercaseLetter] = '\uA641',
        [UnicodeCategory.TitlecaseLetter] = '\u1F88',
        [UnicodeCategory.ModifierLetter] = '\uA4F8',
        [UnicodeCategory.OtherLetter] = '\uA4D0',
        [UnicodeCategory.NonSpacingMark] = '\uA66F',
        [UnicodeCategory.SpacingCombiningMark] = '\uA823',
        [UnicodeCategory.EnclosingMark] = '\uA670',
        [UnicodeCategory.DecimalDigitNumber] = '\uA620',
        [UnicodeCategory.LetterNumber] = '\uA6E6',
        [UnicodeCategory.OtherNumber] = '\uA830',
        [UnicodeCategory.Format] = '\uFFF9',
        [UnicodeCategory.PrivateUse] = '\uE000',
        [UnicodeCategory.OtherNotAssigned] = '\uFDD0',
        [UnicodeCategory.ConnectorPunctuation] = '\uFE4F',
        [UnicodeCategory.DashPunctuation] = '\uFE58',
        [UnicodeCategory.OpenPunctuation] = '\uFE59',
        [UnicodeCategory.ClosePunctuation] = '\uFE5A',
        [UnicodeCategory.InitialQuotePunctuation] = '\u2E02',
        [UnicodeCategory.FinalQuotePunctuation] = '\u2E03',
        [UnicodeCategory.OtherPunctuation] = '\uA4FE',
        [UnicodeCategory.MathSymbol] = '\uFE62',
        [UnicodeCategory.CurrencySymbol] = '\uA838',
        [UnicodeCategory.ModifierSymbol] = '\uA700',
        [UnicodeCategory.OtherSymbol] = '\uA828',
    };

    private readonly Regex _regex;
    private readonly bool _keepGaps;

    private WordSplit(string pattern, bool keepGaps)
    {
        // The timeout is for patterns that backtrack exponentially: they come with the model and are untrusted.
        _regex = new Regex(pattern, RegexOptions.CultureInvariant | RegexOptions.Compiled, TimeSpan.FromSeconds(10));
        _keepGaps = keepGaps;
    }

    public delegate void Receiver(ReadOnlySpan<char> word);

    /// <summary>The characters that replace those beyond U+FFFF; for tests.</summary>
    internal static IReadOnlyDictionary<UnicodeCategory, char> StandIns => s_stand;

    /// <summary>Compiles a pattern, or says why it cannot be used.</summary>
    /// <param name="pattern">In Oniguruma's syntax.</param>
    /// <param name="keepGaps">Text between matches is a word too; otherwise it is dropped.</param>
    /// <param name="problem">Null on success.</param>
    public static WordSplit? TryCreate(string pattern, bool keepGaps, out string? problem)
    {
        problem = FindDifference(pattern);
        if (problem is not null)
            return null;
        try
        {
            return new WordSplit(pattern, keepGaps);
        }
        catch (ArgumentException e)
        {
            problem = e.Message;
            return null;
        }
    }

    /// <summary>Splits at a fixed string instead.</summary>
    public static WordSplit Literal(string text, bool keepGaps) => new(Regex.Escape(text), keepGaps);

    /// <summary>Passes the words of a text to a receiver, in order.</summary>
    public void Split(ReadOnlySpan<char> text, Receiver receiver)
    {
        if (text.IndexOfAnyInRange('\uD800', '\uDFFF') >= 0)
        {
            SplitBeyondBmp(text, receiver);
            return;
        }
        int at = 0;
        foreach (ValueMatch match in _regex.EnumerateMatches(text))
        {
            if (match.Length == 0)
                continue;
            if (_keepGaps && match.Index > at)
                receiver(text[at..match.Index]);
            at = match.Index + match.Length;
            receiver(text[match.Index..at]);
        }
        if (_keepGaps && at < text.Length)
            receiver(text[at..]);
    }

    private void SplitBeyondBmp(ReadOnlySpan<char> text, Receiver receiver)
    {
        char[] buffer = ArrayPool<char>.Shared.Rent(text.Length);
        int count = 0;
        foreach (Rune rune in text.EnumerateRunes())
            buffer[count++] = rune.IsBmp ? (char)rune.Value : s_stand.GetValueOrDefault(Rune.GetUnicodeCategory(rune), '\uFDD0');

        // at counts code points, position the characters of the text up to there.
        (int at, int position) = (0, 0);
        foreach (ValueMatch match in _regex.EnumerateMatches(buffer.AsSpan(0, count)))
        {
            if (match.Length == 0)
                continue;
            ReadOnlySpan<char> gap = Take(text, ref position, match.Index - at);
            if (_keepGaps && gap.Length > 0)
                receiver(gap);
            receiver(Take(text, ref position, match.Length));
            at = match.Index + match.Length;
        }
        if (_keepGaps && position < text.Length)
            receiver(text[position..]);
        ArrayPool<char>.Shared.Return(buffer);
    }

    private static ReadOnlySpan<char> Take(ReadOnlySpan<char> text, ref int position, int codePoints)
    {
        int start = position;
        for (; codePoints > 0; codePoints--)
            position += char.IsHighSurrogate(text[position]) ? 2 : 1;
        return text[start..position];
    }

    /// <summary>
    /// Names the first construct in a pattern that .NET interprets differently from Oniguruma, or that is not known to be the same.
    /// </summary>
    private static string? FindDifference(string pattern)
    {
        bool inClass = false;
        bool quantified = false; // the pattern so far ends with a quantifier
        for (int i = 0; i < pattern.Length; i++)
        {
            bool afterQuantifier = quantified;
            quantified = !inClass && "?*+}".Contains(pattern[i]);
            ReadOnlySpan<char> rest = pattern.AsSpan(i);
            switch (pattern[i])
            {
                case '\\':
                    Match escape = Escapes().Match(pattern, i);
                    if (!escape.Success)
                        return $"{rest[..Math.Min(2, rest.Length)]} is not supported";
                    i += escape.Length - 1;
                    break;
                case '[' when inClass:
                    return "a set within a set is not supported";
                case '&' when inClass && rest.StartsWith("&&"):
                    return "an intersection of sets is not supported";
                case '[':
                    inClass = true;
                    // A bracket that comes first is a member in .NET; Oniguruma warns and may not agree.
                    if (rest.StartsWith("[]") || rest.StartsWith("[^]"))
                        return "a set that begins with ] is not supported";
                    break;
                case ']' when inClass:
                    inClass = false;
                    break;
                case '^' or '$' when !inClass:
                    return $"{pattern[i]} is not supported";
                case '(' when !inClass && rest.StartsWith("(?") && !Groups().IsMatch(rest):
                    return "only the groups (, (?:, (?i:, (?=, (?!, (?<= and (?<! are supported";
                case '{' when !inClass && rest.StartsWith("{,"):
                    return "{,n} is not supported";
                case '+' when !inClass && afterQuantifier:
                    return "possessive quantifiers are not supported";
                case >= '\uD800' and <= '\uDFFF':
                    return "characters beyond U+FFFF are not supported";
            }
        }
        return null;
    }

    [GeneratedRegex(@"\G\\(?:[pP]\{(?:L[ultmo]?|M[nce]?|N[dlo]?|P[cdseifo]?|S[mcko]?|Z[slp]?)\}"
        + "|[sSdDrntf]|u(?![dD][89a-fA-F])[0-9a-fA-F]{4}|[!-/:-@[-`{-~ ])")]
    private static partial Regex Escapes();

    [GeneratedRegex(@"^\(\?(?:i?:|=|!|<=|<!)")]
    private static partial Regex Groups();
}
