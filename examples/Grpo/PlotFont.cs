using ScottPlot;
using SkiaSharp;

namespace Rollout.Examples.Grpo;

/// <summary>
/// Text on plots where no font is installed, for example in a minimal container: ScottPlot would silently omit every label there. Where
/// fonts are installed, one of them is used instead.
/// </summary>
public static class PlotFont
{
    public static void Install()
    {
        HashSet<string> installed = SKFontManager.Default.FontFamilies.ToHashSet(StringComparer.OrdinalIgnoreCase);
        string[] preferred = ["Inter", "Open Sans", "Noto Sans", "DejaVu Sans", "Liberation Sans", "Arial", "Segoe UI"];
        if (preferred.FirstOrDefault(installed.Contains) is { } name)
            Fonts.Default = name;
        else if (SKTypeface.Default.GlyphCount == 0)
            Fonts.FontResolvers.Insert(0, new PixelResolver());
    }

    private sealed class PixelResolver : IFontResolver
    {
        private readonly SKTypeface _typeface = SKTypeface.FromData(SKData.CreateCopy(PixelFont.Build()))
            ?? throw new InvalidOperationException("The pixel font is not a valid font.");

        public SKTypeface CreateTypeface(string fontName, FontWeight weight, FontSlant slant, FontSpacing spacing) => _typeface;

        public SKTypeface CreateTypeface(string fontName, bool bold, bool italic) => _typeface;
    }
}
