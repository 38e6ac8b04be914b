using System.Text;

namespace Rollout.Server.Grpc;

/// <summary>
/// The text of a status, which travels in a header: clients refuse headers of more than some kilobytes and then report an error of their
/// own instead of ours.
/// </summary>
internal static class StatusText
{
    /// <summary>Most bytes as sent. gRPC sends printable ASCII as it is, and three characters for every other byte of UTF-8.</summary>
    public const int MostBytes = 4096;

    private const string Cut = "... (cut)";

    /// <summary>The text, or as much of its beginning as fits.</summary>
    public static string Capped(string text)
    {
        int sent = 0, fits = 0, at = 0;
        foreach (Rune rune in text.EnumerateRunes())
        {
            sent += rune.Value is >= ' ' and <= '~' and not '%' ? 1 : 3 * rune.Utf8SequenceLength;
            at += rune.Utf16SequenceLength;
            if (sent <= MostBytes - Cut.Length) fits = at;
            if (sent > MostBytes) return text[..fits] + Cut;
        }

        return text;
    }
}
