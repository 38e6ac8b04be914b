namespace Rollout.Kernels.Cuda;

/// <summary>Zeroed device memory that can be given back and taken again.</summary>
internal sealed class CudaStorage(CudaBackend owner, long bytes) : IDisposable
{
    private DeviceBuffer? _buffer = owner.Device.AllocateZeroed(bytes);

    public long Bytes => bytes;

    /// <summary>Disposed, or discarded and not restored.</summary>
    public bool IsGone => _buffer is null;

    public nuint Pointer => _buffer?.Pointer ?? throw new ObjectDisposedException(nameof(CudaStorage));

    private bool _disposed;

    public void Discard()
    {
        _buffer?.Dispose();
        _buffer = null;
    }

    /// <exception cref="OutOfMemoryException">The device has not got it.</exception>
    public void Restore()
    {
        ObjectDisposedException.ThrowIf(_disposed, this);
        _buffer ??= owner.Device.AllocateZeroed(bytes);
    }

    public void Dispose()
    {
        _disposed = true;
        Discard();
    }
}

/// <summary>
/// Activations [rows, columns]: fp32, and with bf16 storage also as a matmul takes them. The operation that writes a tensor says in which of the two
/// forms its values are; whoever needs the other asks the backend.
/// </summary>
internal sealed class CudaTensor : Tensor
{
    private readonly CudaStorage _fp32;
    private CudaStorage? _rounded;

    public CudaTensor(CudaBackend owner, int rows, int columns)
        : base(rows, columns)
    {
        Owner = owner;
        _fp32 = new CudaStorage(owner, (long)rows * columns * sizeof(float));
    }

    /// <summary>Which form has the values.</summary>
    public bool IsRounded { get; set; }

    public nuint Fp32 => _fp32.Pointer;

    /// <summary>As a matmul takes them; the same memory as <see cref="Fp32"/> where that is fp32. Taken when first needed.</summary>
    public nuint Rounded => Owner.StoresFp32
        ? _fp32.Pointer
        : (_rounded ??= new CudaStorage(Owner, (long)Rows * Columns * Owner.StoredBytes)).Pointer;

    public override long Bytes => _fp32.Bytes + (_rounded?.Bytes ?? 0);

    internal override CudaBackend Owner { get; }

    internal override bool IsGone => _fp32.IsGone;

    public override void Read(int rows, Span<float> destination)
    {
        Check(rows, destination.Length, nameof(destination));
        Owner.Read(this, rows, destination[..(rows * Columns)]);
    }

    public override void Write(int rows, ReadOnlySpan<float> source)
    {
        Check(rows, source.Length, nameof(source));
        Owner.Flush(); // what was noted reads what this replaces
        Owner.Device.Upload(Fp32, System.Runtime.InteropServices.MemoryMarshal.AsBytes(source[..(rows * Columns)]));
        IsRounded = false;
    }

    public override void Discard()
    {
        Owner.Flush();
        _fp32.Discard();
        _rounded?.Dispose();
        _rounded = null;
    }

    public override void Restore()
    {
        _fp32.Restore();
        IsRounded = false;
    }

    public override void Dispose()
    {
        if (!IsGone)
            Owner.Flush();
        _fp32.Dispose();
        _rounded?.Dispose();
    }

    private void Check(int rows, int length, string name)
    {
        ObjectDisposedException.ThrowIf(IsGone, this);
        ArgumentOutOfRangeException.ThrowIfNegative(rows);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(rows, Rows);
        if (length < (long)rows * Columns)
            throw new ArgumentException($"{length} elements, needed {(long)rows * Columns}.", name);
    }
}

/// <summary>A matrix [outputs, inputs] in the storage type, rows one after another, or a vector in fp32.</summary>
internal sealed class CudaWeight : Weight
{
    private readonly CudaStorage _storage;

    public CudaWeight(CudaBackend owner, int outputs, int inputs)
        : base(outputs, inputs)
    {
        Owner = owner;
        _storage = new CudaStorage(owner, (long)outputs * inputs * (IsVector ? sizeof(float) : owner.StoredBytes));
    }

    public nuint Pointer => _storage.Pointer;

    /// <summary>The last step that reads it: a write waits for that one.</summary>
    public long LastStep { get; set; }

    public override long Bytes => _storage.Bytes;

    internal override CudaBackend Owner { get; }

    internal override bool IsGone => _storage.IsGone;

    public override void Discard() => _storage.Discard();

    public override void Restore() => _storage.Restore();

    public override void Dispose() => _storage.Dispose();
}

/// <summary>Keys, then values, each [layers][blocks][kvHeads][16 tokens][headDim] in the storage type.</summary>
internal sealed class CudaKvCache : KvCache
{
    private readonly CudaStorage _storage;

    public CudaKvCache(CudaBackend owner, int layers, int blocks, int kvHeads, int headDim)
        : base(layers, blocks, kvHeads, headDim)
    {
        Owner = owner;
        BlockBytes = (long)kvHeads * BlockTokens * headDim * owner.StoredBytes;
        _storage = new CudaStorage(owner, 2 * layers * blocks * BlockBytes);
    }

    /// <summary>Of the keys, or of the values, of one layer's block.</summary>
    public long BlockBytes { get; }

    public nuint Keys(int layer) => _storage.Pointer + (nuint)(layer * Blocks * BlockBytes);

    public nuint Values(int layer) => Keys(Layers + layer);

    public override long Bytes => _storage.Bytes;

    internal override CudaBackend Owner { get; }

    internal override bool IsGone => _storage.IsGone;

    public override void Discard() => _storage.Discard();

    public override void Restore() => _storage.Restore();

    public override void Dispose() => _storage.Dispose();
}

/// <summary>[positions][2][headDim / 2]: cosines, then sines.</summary>
internal sealed class CudaRopeTable : RopeTable
{
    private readonly CudaStorage _storage;
    private readonly float[] _angles;

    public CudaRopeTable(CudaBackend owner, ReadOnlySpan<float> inverseFrequencies, int positions, float scale)
        : base(positions, inverseFrequencies.Length * 2)
    {
        Owner = owner;
        int half = inverseFrequencies.Length;
        _angles = new float[(long)positions * HeadDim];
        for (int position = 0; position < positions; position++)
        {
            Span<float> row = _angles.AsSpan(position * HeadDim, HeadDim);
            for (int i = 0; i < half; i++)
            {
                (double sin, double cos) = VectorMath.SinCos(position * inverseFrequencies[i]);
                row[i] = (float)cos * scale;
                row[half + i] = (float)sin * scale;
            }
        }

        _storage = new CudaStorage(owner, (long)positions * HeadDim * sizeof(float));
        Fill();
    }

    public nuint Pointer => _storage.Pointer;

    public override long Bytes => _storage.Bytes;

    internal override CudaBackend Owner { get; }

    internal override bool IsGone => _storage.IsGone;

    public override void Discard() => _storage.Discard();

    public override void Restore()
    {
        if (!_storage.IsGone)
            return;
        _storage.Restore();
        Fill();
    }

    public override void Dispose() => _storage.Dispose();

    private void Fill() => Owner.Device.Upload(Pointer, System.Runtime.InteropServices.MemoryMarshal.AsBytes<float>(_angles));
}
