using System.Buffers.Binary;

namespace Rollout.Examples.Grpo;

/// <summary>A TrueType font made from a 5 by 7 dot matrix: the printable ASCII that labels need, with a square for every dot.</summary>
internal static class PixelFont
{
    private const int Columns = 5, Rows = 7, Dot = 100, Advance = 600, Descent = 200, UnitsPerEm = 1000;
    private const char First = ' ', Last = '~';

    // Five columns a character, from ' ' to '~', the lowest bit of a column its top dot; row 8, the highest bit, is below the line.
    private const string Dots =
        "0000000000" + "00005F0000" + "0007000700" + "147F147F14" + "242A7F2A12" + "2313086462" + "3649552250" + "0005030000"
        + "001C224100" + "0041221C00" + "14083E0814" + "08083E0808" + "0050300000" + "0808080808" + "0060600000" + "2010080402"
        + "3E5149453E" + "00427F4000" + "4261514946" + "2141454B31" + "1814127F10" + "2745454539" + "3C4A494930" + "0171090503"
        + "3649494936" + "064949291E" + "0036360000" + "0056360000" + "0814224100" + "1414141414" + "0041221408" + "0201510906"
        + "324979413E" + "7E1111117E" + "7F49494936" + "3E41414122" + "7F4141221C" + "7F49494941" + "7F09090901" + "3E4149497A"
        + "7F0808087F" + "00417F4100" + "2040413F01" + "7F08142241" + "7F40404040" + "7F020C027F" + "7F0408107F" + "3E4141413E"
        + "7F09090906" + "3E4151215E" + "7F09192946" + "4649494931" + "01017F0101" + "3F4040403F" + "1F2040201F" + "3F4038403F"
        + "6314081463" + "0708700807" + "6151494543" + "007F414100" + "0204081020" + "0041417F00" + "0402010204" + "4040404040"
        + "0001020400" + "2054545478" + "7F48444438" + "3844444420" + "384444487F" + "3854545418" + "087E090102" + "18A4A4A47C"
        + "7F08040478" + "00447D4000" + "4080847D00" + "7F10284400" + "00417F4000" + "7C04180478" + "7C08040478" + "3844444438"
        + "FC24242418" + "18242418FC" + "7C08040408" + "4854545420" + "043F444020" + "3C4040207C" + "1C2040201C" + "3C4030403C"
        + "4428102844" + "1CA0A0A07C" + "4464544C44" + "0008364100" + "00007F0000" + "0041360800" + "0804080810";

    public static byte[] Build()
    {
        // Glyph 0, for missing characters, is empty. Glyph n is the n-th character from ' '.
        byte[] dots = Convert.FromHexString(Dots);
        int count = Last - First + 2;
        Writer glyphs = new();
        Writer offsets = new();
        int points = 0;
        for (int glyph = 0; glyph < count; glyph++)
        {
            offsets.U32(glyphs.Length);
            if (glyph > 0)
                points = Math.Max(points, Glyph(glyphs, dots.AsSpan((glyph - 1) * Columns, Columns)));
        }

        offsets.U32(glyphs.Length);
        Writer metrics = new();
        for (int glyph = 0; glyph < count; glyph++)
            metrics.U16(Advance, 0);

        const int Ascent = (Rows * Dot) + 100;
        (string Tag, Writer Table)[] tables =
        [
            ("OS/2", new Writer().U16(3, Advance, 400, 5, 0, 650, 700, 0, 140, 650, 700, 0, 480, 50, 250, 0).U16(new int[5])
                .U32(1).U16(new int[6]).Text("RLLT").U16(0x40, First, Last, Ascent, -Descent, 0, Ascent, Descent)
                .U32(1).U32(0).U16(5 * Dot, Rows * Dot, 0, ' ', 1)),
            ("cmap", new Writer().U16(0, 1, 3, 1).U32(12).U16(4, 32, 0, 4, 4, 1, 0, Last, 0xffff, 0, First, 0xffff, 1 - First, 1, 0, 0)),
            ("glyf", glyphs),
            ("head", new Writer().U16(1, 0, 1, 0).U32(0).U32(0x5f0f3cf5).U16(0, UnitsPerEm).U32(0).U32(0).U32(0).U32(0)
                .U16(0, -Dot, Columns * Dot, Rows * Dot, 0, 8, 2, 1, 0)),
            ("hhea", new Writer().U16(1, 0, Ascent, -Descent, 0, Advance, 0, 0, Columns * Dot, 1, 0, 0, 0, 0, 0, 0, 0, count)),
            ("hmtx", metrics),
            ("loca", offsets),
            ("maxp", new Writer().U16(1, 0, count, points, points / 4, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0)),
            ("name", new Writer().U16(0, 1, 18, 3, 1, 0x409, 1, 10, 0).U16([.. "Pixel".Select(c => (int)c)])),
            ("post", new Writer().U32(0x30000).U32(0).U16(-100, 50).U32(1).U32(0).U32(0).U32(0).U32(0)),
        ];

        Writer directory = new Writer().U32(0x10000).U16(tables.Length, 128, 3, (tables.Length * 16) - 128);
        int offset = 12 + (16 * tables.Length);
        foreach ((string tag, Writer table) in tables)
        {
            directory.Text(tag).U32(0).U32(offset).U32(table.Length);
            offset += (table.Length + 3) / 4 * 4;
        }

        foreach ((string _, Writer table) in tables)
            directory.Append(table);
        return directory.ToArray();
    }

    /// <summary>Writes a square contour for every dot, and returns the number of points.</summary>
    private static int Glyph(Writer writer, ReadOnlySpan<byte> columns)
    {
        List<(int X, int Y)> corners = new();
        for (int column = 0; column < Columns; column++)
        {
            for (int row = 0; row < 8; row++)
            {
                if ((columns[column] >> row & 1) == 0)
                    continue;
                int x = column * Dot, y = (Rows - 1 - row) * Dot;
                corners.AddRange([(x, y), (x, y + Dot), (x + Dot, y + Dot), (x + Dot, y)]);
            }
        }

        if (corners.Count == 0)
            return 0;
        writer.U16(corners.Count / 4, corners.Min(c => c.X), corners.Min(c => c.Y), corners.Max(c => c.X), corners.Max(c => c.Y));
        for (int last = 3; last < corners.Count; last += 4)
            writer.U16(last);
        writer.U16(0);
        foreach ((int X, int Y) _ in corners)
            writer.U8(1);
        int before = 0;
        foreach ((int x, int _) in corners)
            (_, before) = (writer.U16(x - before), x);
        before = 0;
        foreach ((int _, int y) in corners)
            (_, before) = (writer.U16(y - before), y);
        writer.Align();
        return corners.Count;
    }

    /// <summary>Big-endian numbers, as fonts have them.</summary>
    private sealed class Writer
    {
        private readonly List<byte> _bytes = [];

        public int Length => _bytes.Count;

        public Writer U8(byte value)
        {
            _bytes.Add(value);
            return this;
        }

        public Writer U16(params ReadOnlySpan<int> values)
        {
            foreach (int value in values)
                _bytes.AddRange([(byte)(value >> 8), (byte)value]);
            return this;
        }

        public Writer U32(int value)
        {
            Span<byte> bytes = stackalloc byte[4];
            BinaryPrimitives.WriteInt32BigEndian(bytes, value);
            _bytes.AddRange(bytes);
            return this;
        }

        public Writer Text(string text)
        {
            _bytes.AddRange([.. text.Select(c => (byte)c)]);
            return this;
        }

        public Writer Align()
        {
            while (_bytes.Count % 4 != 0)
                _bytes.Add(0);
            return this;
        }

        public void Append(Writer other)
        {
            _bytes.AddRange(other._bytes);
            Align();
        }

        public byte[] ToArray() => [.. _bytes];
    }
}
