using System.Globalization;
using System.Text;

namespace Rollout.Engine;

/// <summary>
/// Unicode normalisation form C. Implemented here because string.Normalize does nothing with invariant globalisation, which Rollout uses
/// (no libicu to deploy, and the same result on every machine).
/// </summary>
internal static partial class Nfc
{
    // Hangul syllables are composed by arithmetic: The Unicode Standard, section 3.12.
    private const int HangulBase = 0xAC00, LeadBase = 0x1100, VowelBase = 0x1161, TrailBase = 0x11A7;
    private const int Leads = 19, Vowels = 21, Trails = 28;

    // Every character below is its own normal form and composes with no character before it.
    private const char FirstCombining = '\u0300';

    private static readonly Lazy<Tables> s_tables = new(() => new Tables());

    /// <summary>The normal form; <paramref name="text"/> itself when no character can change. It must have no lone surrogates.</summary>
    public static ReadOnlySpan<char> Normalize(ReadOnlySpan<char> text)
    {
        if (text.IndexOfAnyInRange(FirstCombining, char.MaxValue) < 0)
            return text;

        Tables tables = s_tables.Value;
        List<int> runes = new(text.Length);
        foreach (Rune rune in text.EnumerateRunes())
            Decompose(rune.Value, tables, runes);
        Order(runes, tables);
        Compose(runes, tables);
        StringBuilder result = new(runes.Count);
        foreach (int rune in runes)
            result.Append(new Rune(rune));
        return result.ToString();
    }

    private static void Decompose(int rune, Tables tables, List<int> output)
    {
        int hangul = rune - HangulBase;
        if (rune < 0xC0)
        {
            output.Add(rune);
        }
        else if (hangul >= 0 && hangul < Leads * Vowels * Trails)
        {
            output.Add(LeadBase + hangul / (Vowels * Trails));
            output.Add(VowelBase + hangul / Trails % Vowels);
            if (hangul % Trails != 0)
                output.Add(TrailBase + hangul % Trails);
        }
        else if (tables.Decompositions.TryGetValue(rune, out (int First, int Second) parts))
        {
            Decompose(parts.First, tables, output);
            if (parts.Second != 0)
                output.Add(parts.Second); // never decomposes further
        }
        else
        {
            output.Add(rune);
        }
    }

    /// <summary>Sorts every run of combining marks by class; marks of one class keep their order.</summary>
    private static void Order(List<int> runes, Tables tables)
    {
        for (int start = 0; start < runes.Count; start++)
        {
            if (tables.Class(runes[start]) == 0)
                continue;
            int end = start + 1;
            while (end < runes.Count && tables.Class(runes[end]) != 0)
                end++;
            if (end - start > 1)
            {
                List<int> sorted = runes.GetRange(start, end - start).OrderBy(tables.Class).ToList();
                for (int i = 0; i < sorted.Count; i++)
                    runes[start + i] = sorted[i];
            }
            start = end;
        }
    }

    private static void Compose(List<int> runes, Tables tables)
    {
        (int starter, int kept) = (-1, 0);
        int lastClass = 0;
        for (int i = 0; i < runes.Count; i++)
        {
            (int rune, int combining) = (runes[i], tables.Class(runes[i]));
            // A mark composes with its starter when no mark between them has the same or a higher class.
            bool reaches = starter >= 0 && (kept == starter + 1 || lastClass < combining && lastClass != 0);
            if (reaches && TryCompose(runes[starter], rune, tables, out int composed))
            {
                runes[starter] = composed;
                continue;
            }
            if (combining == 0)
                starter = kept;
            lastClass = combining;
            runes[kept++] = rune;
        }
        runes.RemoveRange(kept, runes.Count - kept);
    }

    private static bool TryCompose(int first, int second, Tables tables, out int composed)
    {
        (int lead, int vowel, int hangul, int trail) = (first - LeadBase, second - VowelBase, first - HangulBase, second - TrailBase);
        composed = 0;
        if (lead >= 0 && lead < Leads && vowel >= 0 && vowel < Vowels)
            composed = HangulBase + (lead * Vowels + vowel) * Trails;
        else if (hangul >= 0 && hangul < Leads * Vowels * Trails && hangul % Trails == 0 && trail > 0 && trail < Trails)
            composed = first + trail;
        else
            return tables.Compositions.TryGetValue((first, second), out composed);
        return true;
    }

    private sealed class Tables
    {
        private readonly Dictionary<int, int> _classes = [];

        public Tables()
        {
            foreach (string entry in Nfc.Decompositions.Split((char[])[' ', '\n'], StringSplitOptions.RemoveEmptyEntries))
            {
                int sign = entry.IndexOfAny(['+', '-', '=']);
                int dot = entry.IndexOf('.');
                int from = Hex(entry.AsSpan(0, sign));
                int first = Hex(entry.AsSpan(sign + 1, (dot < 0 ? entry.Length : dot) - sign - 1));
                int second = dot < 0 ? 0 : Hex(entry.AsSpan(dot + 1));
                Decompositions.Add(from, (first, second));
                if (entry[sign] == '+')
                    Compositions.Add((first, second), from);
            }
            foreach (string entry in CombiningClasses.Split((char[])[' ', '\n'], StringSplitOptions.RemoveEmptyEntries))
            {
                (int dash, int colon) = (entry.IndexOf('-'), entry.IndexOf(':'));
                int last = Hex(entry.AsSpan(dash + 1, colon - dash - 1));
                for (int rune = Hex(entry.AsSpan(0, dash)); rune <= last; rune++)
                    _classes.Add(rune, Hex(entry.AsSpan(colon + 1)));
            }
        }

        /// <summary>One step of canonical decomposition; Second is 0 for a singleton.</summary>
        public Dictionary<int, (int First, int Second)> Decompositions { get; } = [];

        public Dictionary<(int First, int Second), int> Compositions { get; } = [];

        public int Class(int rune) => rune < FirstCombining ? 0 : _classes.GetValueOrDefault(rune);

        private static int Hex(ReadOnlySpan<char> digits) => int.Parse(digits, NumberStyles.HexNumber, CultureInfo.InvariantCulture);
    }
}
