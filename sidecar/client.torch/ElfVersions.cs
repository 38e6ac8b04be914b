using System.Buffers.Binary;
using System.Text;

namespace Rollout.Client.Torch;

/// <summary>One entry of <c>.gnu.version_r</c>: a version of a library that an ELF file says it needs.</summary>
/// <param name="Library">The library that defines the version, such as <c>libstdc++.so.6</c>.</param>
/// <param name="Name">The version, such as <c>GLIBCXX_3.4.32</c>.</param>
/// <param name="Index">The number that <c>.gnu.version</c> uses for it.</param>
/// <param name="IsWeak">Whether the dynamic loader tolerates its absence.</param>
/// <param name="FlagsOffset">Offset of its two flag bytes in the file.</param>
public readonly record struct ElfVersionNeed(string Library, string Name, int Index, bool IsWeak, int FlagsOffset);

/// <summary>
/// Reads the version needs of a 64-bit little-endian ELF shared library, and can mark one of them weak.
/// It uses only the program headers, as the dynamic loader does, because section headers may be stripped.
/// </summary>
public sealed class ElfVersions
{
    private const ushort VerFlgWeak = 2;
    private const int SymbolSize = 24;
    private const int RelaSize = 24;

    private readonly byte[] _image;
    private readonly string _name;
    private readonly List<(ulong Address, ulong Offset, ulong Size)> _segments = [];
    private readonly Dictionary<long, ulong> _dynamic = [];

    /// <summary>Parses an image. It is not copied, and <see cref="MarkWeak"/> modifies it.</summary>
    /// <param name="image">The whole file.</param>
    /// <param name="name">Name of the file in error messages.</param>
    /// <exception cref="BadImageFormatException">It is not a whole 64-bit little-endian ELF shared library.</exception>
    public ElfVersions(byte[] image, string name)
    {
        ArgumentNullException.ThrowIfNull(image);
        _image = image;
        _name = name;
        ReadSegments();
        Needs = ReadNeeds();
    }

    /// <summary>Every version this file needs of other libraries.</summary>
    public IReadOnlyList<ElfVersionNeed> Needs { get; }

    /// <summary>
    /// Marks <paramref name="need"/> weak, so that the loader accepts a library without that version. Refused when a relocation uses a
    /// symbol of the version, because that symbol would be missing at run time.
    /// </summary>
    /// <exception cref="InvalidOperationException">The version is in use.</exception>
    public void MarkWeak(ElfVersionNeed need)
    {
        if (FirstRelocatedSymbol(need.Index) is { } symbol)
        {
            throw new InvalidOperationException(
                $"{_name} uses '{symbol}' of {need.Name}: it needs a newer {need.Library}, marking the version weak would not help.");
        }

        Span<byte> flags = _image.AsSpan(need.FlagsOffset, 2);
        BinaryPrimitives.WriteUInt16LittleEndian(flags, (ushort)(BinaryPrimitives.ReadUInt16LittleEndian(flags) | VerFlgWeak));
    }

    private void ReadSegments()
    {
        if (_image.Length < 64 || !_image.AsSpan(0, 4).SequenceEqual("\u007fELF"u8))
            throw Bad("it does not start with an ELF header");
        if (_image[4] != 2)
            throw Bad("it is a 32-bit ELF file");
        if (_image[5] != 1)
            throw Bad("it is a big-endian ELF file");
        if (U16(16) != 3)
            throw Bad("it is not a shared library (e_type is not ET_DYN)");

        ulong table = U64(32);
        int entrySize = U16(54), count = U16(56);
        if (entrySize != 56)
            throw Bad($"its program headers have {entrySize} bytes, not 56");
        (ulong Offset, ulong Size)? dynamic = null;
        for (int i = 0; i < count; i++)
        {
            ulong header = table + (ulong)(i * entrySize);
            ulong offset = U64(header + 8), size = U64(header + 32);
            if (offset > (ulong)_image.Length || size > (ulong)_image.Length - offset)
                throw Bad($"program header {i} points past its end");
            switch (U32(header))
            {
                case 1:
                    _segments.Add((U64(header + 16), offset, size));
                    break;
                case 2:
                    dynamic = (offset, size);
                    break;
            }
        }

        (ulong start, ulong length) = dynamic ?? throw Bad("it has no dynamic section");
        for (ulong at = start; at + 16 <= start + length && U64(at) != 0; at += 16)
            _dynamic[(long)U64(at)] = U64(at + 8);
    }

    private List<ElfVersionNeed> ReadNeeds()
    {
        const long VerNeed = 0x6ffffffe, VerNeedNum = 0x6fffffff;
        List<ElfVersionNeed> needs = new();
        if (!_dynamic.TryGetValue(VerNeed, out ulong address))
            return needs;
        ulong at = FileOffset(address);
        for (ulong left = _dynamic.GetValueOrDefault(VerNeedNum); left > 0; left--)
        {
            string library = Text(U32(at + 4));
            ulong entry = at + U32(at + 8);
            for (ushort entries = U16(at + 2); entries > 0; entries--)
            {
                bool isWeak = (U16(entry + 4) & VerFlgWeak) != 0;
                needs.Add(new(library, Text(U32(entry + 8)), U16(entry + 6), isWeak, (int)entry + 4));
                entry += U32(entry + 12);
            }

            at += U32(at + 12);
        }

        return needs;
    }

    private string? FirstRelocatedSymbol(int version)
    {
        const long Symbols = 6, Rela = 7, RelaBytes = 8, PltRelaBytes = 2, PltRela = 23, VersionOfSymbol = 0x6ffffff0;
        if (!_dynamic.TryGetValue(VersionOfSymbol, out ulong versionsAddress))
            return null;
        ulong versions = FileOffset(versionsAddress), symbols = FileOffset(_dynamic[Symbols]);
        foreach ((long table, long size) in ((long, long)[])[(Rela, RelaBytes), (PltRela, PltRelaBytes)])
        {
            if (!_dynamic.TryGetValue(table, out ulong address))
                continue;
            ulong start = FileOffset(address);
            for (ulong at = start; at < start + _dynamic.GetValueOrDefault(size); at += RelaSize)
            {
                ulong symbol = U64(at + 8) >> 32;
                if (symbol != 0 && (U16(versions + (2 * symbol)) & 0x7fff) == version)
                    return Text(U32(symbols + (SymbolSize * symbol)));
            }
        }

        return null;
    }

    private ulong FileOffset(ulong address)
    {
        foreach ((ulong start, ulong offset, ulong size) in _segments)
        {
            if (address >= start && address - start < size)
                return offset + (address - start);
        }

        throw Bad($"its dynamic section points at 0x{address:x}, which no segment holds");
    }

    private string Text(uint index)
    {
        const long Strings = 5;
        if (!_dynamic.TryGetValue(Strings, out ulong strings))
            throw Bad("it has no string table");
        int start = At(FileOffset(strings) + index, 1);
        int end = _image.AsSpan(start).IndexOf((byte)0);
        return end >= 0 ? Encoding.UTF8.GetString(_image, start, end) : throw Bad("a name in its string table has no end");
    }

    private ushort U16(ulong offset) => BinaryPrimitives.ReadUInt16LittleEndian(_image.AsSpan(At(offset, 2)));

    private uint U32(ulong offset) => BinaryPrimitives.ReadUInt32LittleEndian(_image.AsSpan(At(offset, 4)));

    private ulong U64(ulong offset) => BinaryPrimitives.ReadUInt64LittleEndian(_image.AsSpan(At(offset, 8)));

    private int At(ulong offset, uint size) =>
        offset <= (ulong)_image.Length && size <= (ulong)_image.Length - offset ? (int)offset : throw Bad("it is cut short");

    private BadImageFormatException Bad(string why) => new($"{_name} is not a 64-bit little-endian ELF shared library: {why}.", _name);
}
