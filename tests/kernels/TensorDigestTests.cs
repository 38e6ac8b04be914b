using System.IO.Hashing;
using CsCheck;
using Xunit;

namespace Rollout.Kernels.Tests;

public sealed class TensorDigestTests
{
    /// <summary>The test vectors of DEFINITIONS.md.</summary>
    [Theory]
    [InlineData(0, "99aa06d3014798d86001c324468d497f")]
    [InlineData(1, "d4bb14079dface434a09d02574c507f7")]
    [InlineData(131_072, "7b8c03a20d3d9943c5e068d15eab05ae")]
    [InlineData(131_073, "69ace5a8cdf84f681035e1c21cbc9d3a")]
    [InlineData(1_000_003, "0248dbd5dc7476f99f672cc9bf9ef022")]
    public void The_digest_of_a_tensor_is_as_defined(int length, string expected)
    {
        byte[] tensor = [.. Enumerable.Range(0, length).Select(i => (byte)((i * 31L + 7) % 251))];
        Assert.Equal(expected, Convert.ToHexStringLower(TensorDigest.Of(tensor)));
    }

    /// <summary>Pieces may come in any order, and their bytes in any cuts.</summary>
    [Fact]
    public void The_digest_does_not_depend_on_how_the_bytes_come()
        => Gen.Select(Gen.Int[0, 600_000], Gen.Int[1, 300_000], Gen.Int[0, 5], Gen.Int).Sample((length, cut, split, seed) =>
        {
            byte[] tensor = new byte[length];
            new Random(seed).NextBytes(tensor);
            byte[] digests = new byte[TensorDigest.Pieces(length) * TensorDigest.Length];
            int border = Math.Min(length, split * TensorDigest.PieceBytes);
            PieceHasher front = new(digests, length, 0), back = new(digests, length, border);
            foreach (byte[] part in tensor[border..].Chunk(cut)) back.Append(part);
            foreach (byte[] part in tensor[..border].Chunk(cut)) front.Append(part);
            byte[] expected = XxHash128.Hash([.. tensor.Chunk(131_072).SelectMany(piece => XxHash128.Hash(piece))]);
            Assert.Equal(expected, TensorDigest.OfPieces(digests));
            Assert.Equal(expected, TensorDigest.Of(tensor));
        }, iter: 100);
}
