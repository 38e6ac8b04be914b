using System.Text;
using Rollout.Engine;

namespace Rollout.Server.Hosting;

/// <summary>Every byte of UTF-8 text is a token, its id the byte; other ids have no text. For models without a tokenizer of their own.</summary>
internal sealed class ByteTokenizer : Tokenizer
{
    private static readonly byte[] s_bytes = [.. Enumerable.Range(0, 256).Select(value => (byte)value)];

    public override int[] Encode(string text, bool addSpecialTokens)
    {
        byte[] bytes = Encoding.UTF8.GetBytes(text);
        int[] ids = new int[bytes.Length];
        for (int i = 0; i < bytes.Length; i++) ids[i] = bytes[i];
        return ids;
    }

    public override string Decode(ReadOnlySpan<int> ids)
    {
        byte[] bytes = new byte[ids.Length];
        int length = 0;
        foreach (int id in ids)
        {
            if (id is >= 0 and < 256) bytes[length++] = (byte)id;
        }

        return Encoding.UTF8.GetString(bytes, 0, length);
    }

    public override ReadOnlySpan<byte> TokenBytes(int id) => id is >= 0 and < 256 ? s_bytes.AsSpan(id, 1) : [];
}
