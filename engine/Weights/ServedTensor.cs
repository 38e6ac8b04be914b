using System.Buffers;
using System.Runtime.InteropServices;
using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>A tensor as it was last loaded or pushed.</summary>
/// <param name="Name">Hugging Face name.</param>
/// <param name="Type">Of the bytes that came; how they are stored is the backend's matter.</param>
/// <param name="Shape">Full shape.</param>
/// <param name="Digest">
/// <see cref="TensorDigest"/> of the whole tensor's bytes in that type. Empty where it is not known: once single elements were changed of
/// a weight that is stored in another precision than they came in, or while an update in place writes.
/// </param>
public sealed record DescribedWeight(string Name, DType Type, IReadOnlyList<long> Shape, byte[] Digest);

/// <summary>A tensor in service, and what is known of the digests of its pieces.</summary>
/// <param name="Description">As <see cref="RolloutEngine.Describe"/> gives it; no digest while pieces are to be hashed again.</param>
/// <param name="Pieces">Digests of the pieces of the whole tensor, one after the other; null where they cannot be known.</param>
/// <param name="Changed">The pieces that elements have changed in since they were hashed; each once.</param>
internal sealed record ServedTensor(DescribedWeight Description, byte[]? Pieces, int[] Changed)
{
    public string Name => Description.Name;

    /// <summary>A tensor that came in slices: every piece is to be hashed.</summary>
    public static ServedTensor NotHashed(DescribedWeight description)
    {
        long elements = description.Shape.Aggregate(1L, (product, length) => product * length);
        int pieces = TensorDigest.Pieces(elements * description.Type.Size());
        return new ServedTensor(description, new byte[pieces * TensorDigest.Length], [.. Enumerable.Range(0, pieces)]);
    }

    /// <summary>Whether the digest is not known but can be computed from the weights.</summary>
    public bool IsStale => Pieces is not null && Changed.Length > 0;

    /// <summary>What becomes of the tensor when single elements of it are sent.</summary>
    /// <param name="sent">Those elements, and the pieces that they are in.</param>
    /// <param name="exact">Whether the weights hold exactly what was sent, so that the other elements can be read back.</param>
    public ServedTensor With(ServedTensor sent, bool exact)
    {
        if (Pieces is null || !exact || sent.Description.Type != Description.Type) return sent;
        if (sent.Changed.Length == 0) return this;
        int[] changed = Changed.Length == 0 ? sent.Changed : [.. Changed.Union(sent.Changed)];
        return this with { Description = Description with { Digest = [] }, Changed = changed };
    }

    /// <summary>The tensor with its digest, for which the changed pieces are hashed again.</summary>
    /// <param name="read">
    /// Reads elements of the tensor from one on. Returns false where they may have changed meanwhile.
    /// </param>
    /// <returns>Null where <paramref name="read"/> returned false.</returns>
    public ServedTensor? Rehashed(ElementReader read)
    {
        DType type = Description.Type;
        long elements = Description.Shape.Aggregate(1L, (product, length) => product * length);
        int most = TensorDigest.PieceBytes / type.Size();
        byte[] pieces = [.. Pieces!];
        float[] values = ArrayPool<float>.Shared.Rent(most);
        byte[] bytes = ArrayPool<byte>.Shared.Rent(TensorDigest.PieceBytes);
        try
        {
            foreach (int piece in Changed)
            {
                long first = (long)piece * most;
                int count = (int)Math.Min(most, elements - first);
                if (!read(first, values.AsSpan(0, count))) return null;
                Span<byte> content = bytes.AsSpan(0, count * type.Size());
                Encode(values.AsSpan(0, count), type, content);
                TensorDigest.OfPiece(content, pieces.AsSpan(piece * TensorDigest.Length, TensorDigest.Length));
            }
        }
        finally
        {
            ArrayPool<float>.Shared.Return(values);
            ArrayPool<byte>.Shared.Return(bytes);
        }

        return new ServedTensor(Description with { Digest = TensorDigest.OfPieces(pieces) }, pieces, []);
    }

    /// <summary>Bits of bf16 or fp32, which the weights hold exactly.</summary>
    private static void Encode(ReadOnlySpan<float> values, DType type, Span<byte> bytes)
    {
        ReadOnlySpan<uint> bits = MemoryMarshal.Cast<float, uint>(values);
        if (type == DType.Float32)
        {
            MemoryMarshal.AsBytes(bits).CopyTo(bytes);
            return;
        }

        Span<ushort> halves = MemoryMarshal.Cast<byte, ushort>(bytes);
        for (int i = 0; i < bits.Length; i++) halves[i] = (ushort)(bits[i] >> 16);
    }
}

/// <summary>Reads elements of a tensor in service, the first being <paramref name="element"/>.</summary>
/// <param name="element">Of the whole tensor.</param>
/// <param name="values">Filled.</param>
/// <returns>Whether they are of the weights that were in service when the reading began.</returns>
internal delegate bool ElementReader(long element, Span<float> values);
