using Rollout.V1;

namespace Rollout.Client;

/// <summary>
/// The offset of each tensor in the payload. Depends only on names, types and shapes, which stay the same from push to push, so it is
/// computed once.
/// </summary>
internal sealed class PayloadLayout
{
    /// <summary>Alignment of offsets: a multiple of a cache line, and one that device copies prefer.</summary>
    public const int Alignment = 256;

    private readonly int _alignment;

    private PayloadLayout(IReadOnlyList<V1.ManifestTensor> manifest, IReadOnlyList<long> sizes, long payloadBytes, int alignment)
    {
        _alignment = alignment;
        Manifest = manifest;
        Sizes = sizes;
        PayloadBytes = payloadBytes;
    }

    public IReadOnlyList<V1.ManifestTensor> Manifest { get; }

    /// <summary>Bytes of each tensor.</summary>
    public IReadOnlyList<long> Sizes { get; }

    /// <summary>Up to the end of the last tensor.</summary>
    public long PayloadBytes { get; }

    /// <param name="tensors">In payload order.</param>
    /// <param name="alignment">1 where no gaps are allowed.</param>
    /// <exception cref="ArgumentException">No tensors, or two of the same name that are no slices; lists all of them.</exception>
    public static PayloadLayout Of(IReadOnlyList<TensorSource> tensors, int alignment = Alignment)
    {
        if (tensors.Count == 0)
            throw new ArgumentException("an update without tensors", nameof(tensors));
        string[] twice = [.. tensors.GroupBy(tensor => tensor.Name)
            .Where(same => same.Count() > 1 && same.Any(tensor => tensor.Rows is null)).Select(same => same.Key)];
        if (twice.Length > 0)
            throw new ArgumentException($"tensors given more than once: {string.Join(", ", twice)}", nameof(tensors));

        List<ManifestTensor> manifest = new(tensors.Count);
        long end = 0;
        foreach (TensorSource tensor in tensors)
        {
            long offset = (end + alignment - 1) / alignment * alignment;
            ManifestTensor entry = new() { Name = tensor.Name, Dtype = tensor.DType.ToProto(), Offset = (ulong)offset };
            entry.Shape.AddRange(tensor.Shape.Select(dimension => (ulong)dimension));
            if (tensor.SparseCount is { } count)
                entry.SparseCount = (ulong)count;
            entry.FirstRow = (ulong)tensor.FirstRow;
            entry.Rows = (ulong)(tensor.Rows ?? 0);
            manifest.Add(entry);
            end = checked(offset + tensor.Bytes);
        }

        return new PayloadLayout(manifest, [.. tensors.Select(tensor => tensor.Bytes)], end, alignment);
    }

    /// <summary>Whether these tensors have this layout.</summary>
    public bool Fits(IReadOnlyList<TensorSource> tensors, int alignment)
    {
        if (tensors.Count != Manifest.Count || alignment != _alignment)
            return false;
        for (int i = 0; i < tensors.Count; i++)
        {
            V1.ManifestTensor entry = Manifest[i];
            TensorSource tensor = tensors[i];
            long? sparse = entry.HasSparseCount ? (long)entry.SparseCount : null;
            (ulong, ulong) rows = ((ulong)tensor.FirstRow, (ulong)(tensor.Rows ?? 0));
            if (entry.Name != tensor.Name || entry.Dtype != tensor.DType.ToProto() || sparse != tensor.SparseCount
                || rows != (entry.FirstRow, entry.Rows)
                || !entry.Shape.SequenceEqual(tensor.Shape.Select(dimension => (ulong)dimension)))
            {
                return false;
            }
        }

        return true;
    }
}
