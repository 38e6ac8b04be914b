using System.IO.Hashing;

namespace Rollout.Kernels;

/// <summary>
/// The digest of a tensor's bytes: XXH3-128 over the digests of its pieces, each XXH3-128 in canonical byte order (DEFINITIONS.md). Pieces
/// can be hashed in any order and at the same time, on the host or on a device.
/// </summary>
public static class TensorDigest
{
    /// <summary>The name of this algorithm in the weights protocol.</summary>
    public const string Algorithm = "xxh3-128-tree-131072";

    /// <summary>Of a digest.</summary>
    public const int Length = 16;

    /// <summary>Of every piece but a tensor's last, which may be shorter.</summary>
    public const int PieceBytes = 131072;

    /// <summary>How many pieces a tensor of so many bytes has: none where it is empty.</summary>
    public static int Pieces(long bytes) => checked((int)((bytes + PieceBytes - 1) / PieceBytes));

    /// <summary>The digest of a tensor that is in memory as a whole.</summary>
    public static byte[] Of(ReadOnlySpan<byte> tensor)
    {
        byte[] pieces = new byte[Pieces(tensor.Length) * Length];
        new PieceHasher(pieces, tensor.Length, 0).Append(tensor);
        return OfPieces(pieces);
    }

    /// <summary>The digest of one piece.</summary>
    public static void OfPiece(ReadOnlySpan<byte> piece, Span<byte> digest) => XxHash128.Hash(piece, digest);

    /// <summary>The digest of a tensor whose pieces have these digests, one after the other.</summary>
    public static byte[] OfPieces(ReadOnlySpan<byte> digests) => XxHash128.Hash(digests);
}

/// <summary>Hashes pieces of one tensor that follow each other, as their bytes come, in any cuts.</summary>
/// <param name="digests">Of all the tensor's pieces, one after the other; those of finished pieces are written.</param>
/// <param name="bytes">Of the tensor.</param>
/// <param name="position">The tensor's byte that comes first: where a piece begins.</param>
public sealed class PieceHasher(byte[] digests, long bytes, long position)
{
    private XxHash128? _partial; // of a piece whose bytes come in several calls
    private long _position = position;

    /// <summary>Hashes the next bytes.</summary>
    public void Append(ReadOnlySpan<byte> next)
    {
        while (!next.IsEmpty)
        {
            long piece = _position / TensorDigest.PieceBytes;
            long begin = piece * TensorDigest.PieceBytes, end = Math.Min(begin + TensorDigest.PieceBytes, bytes);
            ReadOnlySpan<byte> own = next[..(int)Math.Min(next.Length, end - _position)];
            Span<byte> digest = digests.AsSpan((int)piece * TensorDigest.Length, TensorDigest.Length);
            next = next[own.Length..];
            _position += own.Length;
            if (own.Length == end - begin)
            {
                TensorDigest.OfPiece(own, digest);
                continue;
            }

            _partial ??= new XxHash128();
            _partial.Append(own);
            if (_position == end) _partial.GetHashAndReset(digest);
        }
    }
}
