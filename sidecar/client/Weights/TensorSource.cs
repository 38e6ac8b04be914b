namespace Rollout.Client;

/// <summary>Copies a tensor's bytes [offset, offset + destination.Length), row-major and little-endian, to a destination.</summary>
/// <param name="offset">In bytes; a multiple of the element size.</param>
/// <param name="destination">Whole elements; at most a mebibyte, the last one of a tensor often shorter.</param>
public delegate void TensorCopy(long offset, Span<byte> destination);

/// <summary>
/// One tensor to push: the Hugging Face checkpoint's name and full shape, and how to get at its bytes. They are copied piece by piece, in
/// ascending order, straight into what is sent, so a tensor of any size costs no memory here.
/// </summary>
public sealed class TensorSource
{
    private readonly TensorCopy _copy;

    /// <exception cref="ArgumentException">A dimension is negative or the tensor has more than 2^63 bytes.</exception>
    public TensorSource(string name, TensorDType dtype, IReadOnlyList<long> shape, TensorCopy copy)
    {
        ArgumentException.ThrowIfNullOrEmpty(name);
        ArgumentNullException.ThrowIfNull(copy);
        Name = name;
        DType = dtype;
        Shape = [.. shape];
        _copy = copy;
        Bytes = CountBytes();
    }

    public string Name { get; }

    public TensorDType DType { get; }

    public IReadOnlyList<long> Shape { get; }

    public long Bytes { get; }

    /// <param name="bytes">Row-major, little-endian; read at each push, so a trainer may update them in place between pushes.</param>
    /// <exception cref="ArgumentException">The shape asks for another number of bytes.</exception>
    public static TensorSource FromMemory(string name, TensorDType dtype, IReadOnlyList<long> shape, ReadOnlyMemory<byte> bytes)
    {
        var source = new TensorSource(name, dtype, shape, (offset, destination) =>
            bytes.Span.Slice((int)offset, destination.Length).CopyTo(destination));
        if (source.Bytes != bytes.Length)
            throw new ArgumentException($"tensor '{name}': {bytes.Length} bytes given, its shape has {source.Bytes}", nameof(bytes));
        return source;
    }

    internal void CopyTo(long offset, Span<byte> destination) => _copy(offset, destination);

    private long CountBytes()
    {
        try
        {
            long bytes = DType.Size();
            foreach (long dimension in Shape)
            {
                ArgumentOutOfRangeException.ThrowIfNegative(dimension);
                bytes = checked(bytes * dimension);
            }

            return bytes;
        }
        catch (Exception e) when (e is ArgumentOutOfRangeException or OverflowException)
        {
            throw new ArgumentException($"tensor '{Name}': [{string.Join(", ", Shape)}] is not a shape", nameof(Shape), e);
        }
    }
}
