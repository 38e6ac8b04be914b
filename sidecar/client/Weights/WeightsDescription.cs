namespace Rollout.Client;

/// <summary>The weights being served.</summary>
/// <param name="Version">Of the weights.</param>
/// <param name="Tensors">All of them.</param>
/// <param name="DigestAlgorithm">
/// How the sidecar computes digests; this client knows "xxh3-128-tree-131072" (DEFINITIONS.md). "": a sidecar older than the name.
/// </param>
public sealed record WeightsDescription(ulong Version, IReadOnlyList<DescribedTensor> Tensors, string DigestAlgorithm)
{
    internal static WeightsDescription From(V1.DescribeReply reply)
        => new(reply.Version, [.. reply.Tensors.Select(DescribedTensor.From)], reply.DigestAlgorithm);
}

/// <param name="Name">The Hugging Face checkpoint's.</param>
/// <param name="DType">As stored by the engine; other types are converted.</param>
/// <param name="Shape">Of the full tensor.</param>
/// <param name="Digest">
/// Of the whole tensor's bytes in the type that it was last sent in (DEFINITIONS.md), 32 hexadecimal digits; "" where none is known: after
/// single elements were pushed of a tensor that the sidecar stores in another precision.
/// </param>
public sealed record DescribedTensor(string Name, TensorDType DType, IReadOnlyList<long> Shape, string Digest)
{
    internal static DescribedTensor From(V1.DescribedTensor tensor) => new(
        tensor.Name,
        tensor.Dtype.ToClient(),
        [.. tensor.Shape.Select(dimension => (long)dimension)],
        WeightDigest.Show(tensor.Digest.Span));
}
