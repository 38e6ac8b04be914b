namespace Rollout.Client;

/// <summary>
/// Where each tensor stands in the payload. Depends on names, types and shapes alone, which stay the same from push to push, so it is
/// worked out once.
/// </summary>
internal sealed class PayloadLayout
{
    /// <summary>Of each tensor's offset: a cache line, and what a device copy likes.</summary>
    public const int Alignment = 256;

    private PayloadLayout(IReadOnlyList<V1.ManifestTensor> manifest, IReadOnlyList<long> sizes, long payloadBytes)
    {
        Manifest = manifest;
        Sizes = sizes;
        PayloadBytes = payloadBytes;
    }

    public IReadOnlyList<V1.ManifestTensor> Manifest { get; }

    /// <summary>Bytes of each tensor.</summary>
    public IReadOnlyList<long> Sizes { get; }

    /// <summary>Up to the end of the last tensor.</summary>
    public long PayloadBytes { get; }

    /// <exception cref="ArgumentException">No tensors, or two of the same name; lists all of them.</exception>
    public static PayloadLayout Of(IReadOnlyList<TensorSource> tensors)
    {
        if (tensors.Count == 0)
            throw new ArgumentException("an update without tensors", nameof(tensors));
        string[] twice = [.. tensors.GroupBy(tensor => tensor.Name).Where(same => same.Count() > 1).Select(same => same.Key)];
        if (twice.Length > 0)
            throw new ArgumentException($"tensors given more than once: {string.Join(", ", twice)}", nameof(tensors));

        var manifest = new List<V1.ManifestTensor>(tensors.Count);
        long end = 0;
        foreach (TensorSource tensor in tensors)
        {
            long offset = (end + Alignment - 1) / Alignment * Alignment;
            var entry = new V1.ManifestTensor { Name = tensor.Name, Dtype = tensor.DType.ToProto(), Offset = (ulong)offset };
            entry.Shape.AddRange(tensor.Shape.Select(dimension => (ulong)dimension));
            manifest.Add(entry);
            end = checked(offset + tensor.Bytes);
        }

        return new PayloadLayout(manifest, [.. tensors.Select(tensor => tensor.Bytes)], end);
    }

    /// <summary>Whether these tensors have this layout.</summary>
    public bool Fits(IReadOnlyList<TensorSource> tensors)
    {
        if (tensors.Count != Manifest.Count)
            return false;
        for (int i = 0; i < tensors.Count; i++)
        {
            V1.ManifestTensor entry = Manifest[i];
            TensorSource tensor = tensors[i];
            if (entry.Name != tensor.Name || entry.Dtype != tensor.DType.ToProto()
                || !entry.Shape.SequenceEqual(tensor.Shape.Select(dimension => (ulong)dimension)))
                return false;
        }

        return true;
    }
}
