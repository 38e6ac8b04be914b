using System.Globalization;

namespace Rollout.Server.Commands;

/// <summary>A size, or a fraction of the free memory.</summary>
internal readonly record struct MemoryShare(long Bytes, double Fraction)
{
    /// <summary>"512MiB", or "40%".</summary>
    public static bool TryParse(string text, out MemoryShare share)
    {
        if (text.EndsWith('%'))
        {
            bool isNumber = double.TryParse(
                text.AsSpan(0, text.Length - 1), NumberStyles.AllowDecimalPoint, CultureInfo.InvariantCulture, out double percent);
            share = new(0, percent / 100);
            return isNumber && share.Fraction is > 0 and <= 1;
        }

        bool isSize = ByteSize.TryParse(text, out long bytes);
        share = new(bytes, 0);
        return isSize;
    }
}

/// <summary>Sizes with units: 512MiB, 2GB, 1048576.</summary>
internal static class ByteSize
{
    // Binary units first: "MiB" must not be read as "B".
    private static readonly (string Suffix, long Bytes)[] s_units =
    [
        ("KiB", 1L << 10), ("MiB", 1L << 20), ("GiB", 1L << 30), ("TiB", 1L << 40),
        ("KB", 1_000), ("MB", 1_000_000), ("GB", 1_000_000_000), ("TB", 1_000_000_000_000),
        ("B", 1),
    ];

    /// <summary>False when the text is not a whole positive number of bytes.</summary>
    public static bool TryParse(string text, out long bytes)
    {
        (string number, long unit) = (text, 1);
        foreach ((string suffix, long size) in s_units)
        {
            if (!text.EndsWith(suffix, StringComparison.OrdinalIgnoreCase)) continue;
            (number, unit) = (text[..^suffix.Length].TrimEnd(), size);
            break;
        }

        bytes = 0;
        const NumberStyles Plain = NumberStyles.AllowDecimalPoint;
        if (!decimal.TryParse(number, Plain, CultureInfo.InvariantCulture, out decimal value) || value > long.MaxValue / unit) return false;
        bytes = (long)(value * unit);
        return bytes > 0;
    }

    /// <summary>A readable size with about three digits.</summary>
    public static string Format(long bytes)
    {
        double value = bytes;
        string[] units = ["B", "KiB", "MiB", "GiB", "TiB"];
        int unit = 0;
        for (; value >= 1024 && unit < units.Length - 1; unit++) value /= 1024;
        return unit == 0 ? $"{bytes} B" : string.Create(CultureInfo.InvariantCulture, $"{value:0.##} {units[unit]}");
    }
}
