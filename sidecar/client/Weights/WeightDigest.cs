using System.IO.Hashing;

namespace Rollout.Client;

/// <summary>
/// XxHash128 of each tensor's bytes, and over their concatenation in manifest order. Sixteen bytes, most significant first, as xxHash
/// writes its canonical form; shown as 32 hexadecimal digits.
/// </summary>
internal static class WeightDigest
{
    public const int Length = 16;

    /// <param name="digests">Of the tensors, one after the other.</param>
    public static byte[] Combine(ReadOnlySpan<byte> digests) => XxHash128.Hash(digests);

    public static string Show(ReadOnlySpan<byte> digest) => Convert.ToHexStringLower(digest);
}
