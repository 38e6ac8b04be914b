namespace Rollout.Engine;

/// <summary>
/// GPT-2's way of writing bytes as text in vocabulary files: printable Latin-1 characters stand for themselves, the other 68 bytes for
/// U+0100 and up, in order.
/// </summary>
internal static class ByteAlphabet
{
    private static readonly char[] s_chars = MakeChars();
    private static readonly short[] s_bytes = MakeBytes();

    public static char ToChar(byte value) => s_chars[value];

    /// <summary>The byte that a character stands for, or -1.</summary>
    public static int ToByte(char c) => c < s_bytes.Length ? s_bytes[c] : -1;

    /// <summary>The bytes of a token, or null when a character stands for none.</summary>
    public static byte[]? ToBytes(string token)
    {
        byte[] bytes = new byte[token.Length];
        for (int i = 0; i < bytes.Length; i++)
        {
            int value = ToByte(token[i]);
            if (value < 0)
                return null;
            bytes[i] = (byte)value;
        }
        return bytes;
    }

    private static char[] MakeChars()
    {
        char next = (char)0x100;
        char[] chars = new char[256];
        for (int value = 0; value < 256; value++)
            chars[value] = value is (>= '!' and <= '~') or (>= 0xA1 and not 0xAD) ? (char)value : next++;
        return chars;
    }

    private static short[] MakeBytes()
    {
        short[] bytes = new short[s_chars.Max() + 1];
        Array.Fill(bytes, (short)-1);
        for (short value = 0; value < 256; value++)
            bytes[s_chars[value]] = value;
        return bytes;
    }
}
