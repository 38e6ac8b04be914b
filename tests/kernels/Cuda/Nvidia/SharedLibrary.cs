using System.Buffers.Binary;
using System.Text;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>Reads what an ELF library of 64 bits exports, without loading it: a driver's initialisation would look for devices.</summary>
internal static class SharedLibrary
{
    private const int SectionBytes = 64, SymbolBytes = 24;
    private const uint DynamicSymbols = 11; // SHT_DYNSYM

    /// <summary>Names of the symbols that it defines for others.</summary>
    /// <exception cref="InvalidDataException">The file is not such a library.</exception>
    public static HashSet<string> Exports(string file)
    {
        using FileStream stream = File.OpenRead(file);
        byte[] header = Read(stream, 0, 64);
        if (BinaryPrimitives.ReadUInt32BigEndian(header) != 0x7F454C46 || header[4] != 2)
            throw new InvalidDataException($"{file} is not a 64-bit ELF file.");
        byte[] sections = Read(stream, Long(header, 40), SectionBytes * Short(header, 60));
        for (int at = 0; at < sections.Length; at += SectionBytes)
        {
            if (Int(sections, at + 4) == DynamicSymbols) // which links to the section with their names
                return Names(Content(at), Content(SectionBytes * (int)Int(sections, at + 40)));
        }

        throw new InvalidDataException($"{file} has no dynamic symbols.");

        byte[] Content(int at) => Read(stream, Long(sections, at + 24), (int)Long(sections, at + 32));
    }

    private static HashSet<string> Names(byte[] symbols, byte[] strings)
    {
        HashSet<string> names = [];
        for (int at = 0; at < symbols.Length; at += SymbolBytes)
        {
            int binding = symbols[at + 4] >> 4, section = Short(symbols, at + 6);
            if (binding is not (1 or 2) || section == 0) // neither global nor weak, or undefined here
                continue;
            ReadOnlySpan<byte> name = strings.AsSpan((int)Int(symbols, at));
            names.Add(Encoding.ASCII.GetString(name[..name.IndexOf((byte)0)]));
        }

        return names;
    }

    private static byte[] Read(FileStream stream, long offset, int bytes)
    {
        byte[] content = new byte[bytes];
        stream.Position = offset;
        stream.ReadExactly(content);
        return content;
    }

    private static int Short(byte[] bytes, int at) => BinaryPrimitives.ReadUInt16LittleEndian(bytes.AsSpan(at));

    private static uint Int(byte[] bytes, int at) => BinaryPrimitives.ReadUInt32LittleEndian(bytes.AsSpan(at));

    private static long Long(byte[] bytes, int at) => BinaryPrimitives.ReadInt64LittleEndian(bytes.AsSpan(at));
}
