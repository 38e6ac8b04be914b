using System.Runtime.InteropServices;

namespace Rollout.Client;

/// <summary>Copies a tensor's bytes [offset, offset + destination.Length), row-major and little-endian, to a destination.</summary>
/// <param name="offset">In bytes; a multiple of the element size.</param>
/// <param name="destination">Whole elements; at most a mebibyte, the last one of a tensor often shorter.</param>
public delegate void TensorCopy(long offset, Span<byte> destination);

/// <summary>
/// One tensor to push, or a slice of one: the Hugging Face checkpoint's name and full shape, and a way to copy its bytes. They are copied
/// piece by piece, in ascending order, directly into the send buffer, so a tensor of any size needs no memory here.
/// </summary>
public sealed class TensorSource
{
    private readonly TensorCopy _copy;

    /// <exception cref="ArgumentException">A dimension is negative or the tensor has more than 2^63 bytes.</exception>
    public TensorSource(string name, TensorDType dtype, IReadOnlyList<long> shape, TensorCopy copy)
        : this(name, dtype, shape, copy, sparseCount: null, firstRow: 0, rows: null)
    {
    }

    private TensorSource(
        string name, TensorDType dtype, IReadOnlyList<long> shape, TensorCopy copy, long? sparseCount, long firstRow, long? rows)
    {
        ArgumentException.ThrowIfNullOrEmpty(name);
        ArgumentNullException.ThrowIfNull(copy);
        SparseCount = sparseCount;
        FirstRow = firstRow;
        Rows = rows;
        Name = name;
        DType = dtype;
        Shape = [.. shape];
        _copy = copy;
        Bytes = CountBytes();
    }

    public string Name { get; }

    public TensorDType DType { get; }

    public IReadOnlyList<long> Shape { get; }

    /// <summary>Length of what is sent.</summary>
    public long Bytes { get; }

    /// <summary>How many of its elements are sent; null: all.</summary>
    public long? SparseCount { get; }

    /// <summary>Of a slice: the index in dimension 0 of its first row.</summary>
    public long FirstRow { get; }

    /// <summary>Of a slice: how many indices of dimension 0 it has; null: all.</summary>
    public long? Rows { get; }

    /// <summary>Some elements of a tensor; the others keep their values in the sidecar.</summary>
    /// <param name="name">The Hugging Face checkpoint's.</param>
    /// <param name="dtype">Of the values.</param>
    /// <param name="shape">Of the full tensor.</param>
    /// <param name="indices">Into the flattened tensor, strictly ascending; read at each push.</param>
    /// <param name="values">As many, little-endian; read at each push.</param>
    /// <exception cref="ArgumentException">There is not a value for every index.</exception>
    public static TensorSource Sparse(
        string name, TensorDType dtype, IReadOnlyList<long> shape, ReadOnlyMemory<uint> indices, ReadOnlyMemory<byte> values)
    {
        if (values.Length != (long)indices.Length * dtype.Size())
            throw new ArgumentException($"tensor '{name}': {values.Length} bytes of values for {indices.Length} indices", nameof(values));
        return new TensorSource(name, dtype, shape, Copy, indices.Length, firstRow: 0, rows: null);

        // The payload is the indices, then the values; a piece may contain the end of the indices and the start of the values.
        void Copy(long offset, Span<byte> destination)
        {
            ReadOnlySpan<byte> first = MemoryMarshal.AsBytes(indices.Span);
            int ofFirst = (int)Math.Clamp(first.Length - offset, 0, destination.Length);
            if (ofFirst > 0)
                first.Slice((int)offset, ofFirst).CopyTo(destination);
            values.Span.Slice((int)Math.Max(0, offset - first.Length), destination.Length - ofFirst).CopyTo(destination[ofFirst..]);
        }
    }

    /// <summary>A slice along dimension 0. A push has all slices of a tensor, in any places, every row in one of them.</summary>
    /// <param name="name">The Hugging Face checkpoint's.</param>
    /// <param name="dtype">The same for all slices of a tensor.</param>
    /// <param name="shape">Of the full tensor.</param>
    /// <param name="firstRow">Index in dimension 0.</param>
    /// <param name="rows">At least one.</param>
    /// <param name="copy">Of the slice's bytes: offset 0 is the first of its first row.</param>
    /// <exception cref="ArgumentException">The tensor does not have these rows.</exception>
    public static TensorSource Slice(
        string name, TensorDType dtype, IReadOnlyList<long> shape, long firstRow, long rows, TensorCopy copy)
    {
        if (shape.Count == 0 || rows < 1 || firstRow < 0 || firstRow > shape[0] - rows)
        {
            throw new ArgumentException(
                $"tensor '{name}': [{string.Join(", ", shape)}] has no {rows} rows from row {firstRow} on", nameof(rows));
        }

        return new TensorSource(name, dtype, shape, copy, sparseCount: null, firstRow, rows);
    }

    /// <param name="bytes">Row-major, little-endian; read at each push, so a trainer may update them in place between pushes.</param>
    /// <exception cref="ArgumentException">The shape asks for another number of bytes.</exception>
    public static TensorSource FromMemory(string name, TensorDType dtype, IReadOnlyList<long> shape, ReadOnlyMemory<byte> bytes)
    {
        TensorSource source = new(name, dtype, shape, (offset, destination) =>
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
            if (SparseCount is { } count)
                return count * (sizeof(uint) + DType.Size());
            long bytes = DType.Size();
            for (int i = 0; i < Shape.Count; i++)
            {
                ArgumentOutOfRangeException.ThrowIfNegative(Shape[i]);
                bytes = checked(bytes * (i == 0 ? Rows ?? Shape[i] : Shape[i]));
            }

            return bytes;
        }
        catch (Exception e) when (e is ArgumentOutOfRangeException or OverflowException)
        {
            throw new ArgumentException($"tensor '{Name}': [{string.Join(", ", Shape)}] is not a shape", nameof(Shape), e);
        }
    }
}
