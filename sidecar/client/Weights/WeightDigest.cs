using System.IO.Hashing;

namespace Rollout.Client;

/// <summary>
/// Digests of weights as protos/rollout/v1/DEFINITIONS.md defines them: XXH3-128, which .NET calls XxHash128. Sixteen bytes, most
/// significant first, as xxHash writes its canonical form; shown as 32 hexadecimal digits.
/// </summary>
internal static class WeightDigest
{
    /// <summary>The name of this algorithm in the weights protocol.</summary>
    public const string Algorithm = "xxh3-128-tree-131072";

    public const int Length = 16;

    /// <summary>A tensor's digest is that of the digests of its pieces; all but the last have this length.</summary>
    public const int PieceBytes = 131072;

    /// <param name="digests">Of the tensors, one after the other, in manifest order.</param>
    public static byte[] Combine(ReadOnlySpan<byte> digests) => XxHash128.Hash(digests);

    public static string Show(ReadOnlySpan<byte> digest) => Convert.ToHexStringLower(digest);
}

/// <summary>Computes the digest of one tensor whose bytes come in order, in any cuts.</summary>
/// <param name="bytes">Of the tensor.</param>
internal sealed class TensorHasher(long bytes)
{
    private readonly byte[] _digests = new byte[(bytes + WeightDigest.PieceBytes - 1) / WeightDigest.PieceBytes * WeightDigest.Length];
    private XxHash128? _partial; // of a piece whose bytes come in several calls
    private long _position;

    public void Append(ReadOnlySpan<byte> next)
    {
        while (!next.IsEmpty)
        {
            long piece = _position / WeightDigest.PieceBytes;
            long begin = piece * WeightDigest.PieceBytes, end = Math.Min(begin + WeightDigest.PieceBytes, bytes);
            ReadOnlySpan<byte> own = next[..(int)Math.Min(next.Length, end - _position)];
            Span<byte> digest = _digests.AsSpan((int)piece * WeightDigest.Length, WeightDigest.Length);
            next = next[own.Length..];
            _position += own.Length;
            if (own.Length == end - begin)
            {
                XxHash128.Hash(own, digest);
                continue;
            }

            _partial ??= new XxHash128();
            _partial.Append(own);
            if (_position == end)
                _partial.GetHashAndReset(digest);
        }
    }

    /// <summary>Once all bytes have come.</summary>
    public void Finish(Span<byte> digest) => XxHash128.Hash(_digests, digest);
}
