namespace Rollout.Kernels.Cuda;

/// <summary>Zeroed device memory that can be discarded and restored at the same addresses.</summary>
internal sealed class CudaStorage : IDisposable
{
    private readonly CudaDevice _device;
    private readonly DeviceRange _range;

    /// <exception cref="OutOfMemoryException">The device does not have enough memory.</exception>
    public CudaStorage(CudaBackend owner, long bytes)
    {
        _device = owner.Device;
        Bytes = bytes;
        _range = _device.Reserve(bytes);
        try
        {
            Restore();
        }
        catch
        {
            _range.Dispose();
            throw;
        }
    }

    public long Bytes { get; }

    /// <summary>Disposed, or discarded and not restored.</summary>
    public bool IsGone => _range.IsClosed || !_range.IsMapped;

    public nuint Pointer => !IsGone ? _range.Pointer : throw new ObjectDisposedException(nameof(CudaStorage));

    public void Discard()
    {
        if (IsGone)
            return;
        Settle();
        _range.Unmap();
    }

    /// <exception cref="OutOfMemoryException">The device does not have enough memory.</exception>
    public void Restore()
    {
        ObjectDisposedException.ThrowIf(_range.IsClosed, this);
        if (_range.IsMapped)
            return;
        _device.MakeCurrent();
        _range.Map();
        _device.CountAllocation();
        _device.Zero(_range.Pointer, Bytes);
    }

    public void Dispose()
    {
        if (_range.IsClosed)
            return;
        if (_range.IsMapped)
            Settle();
        _range.Dispose();
    }

    /// <summary>Waits for work that may use the memory: unlike cuMemFree, cuMemUnmap does not wait.</summary>
    private void Settle()
    {
        _device.MakeCurrent();
        _device.Stream.Synchronize();
        _device.Beside.Synchronize();
    }
}

/// <summary>
/// Activations [rows, columns]: fp32, and with bf16 storage also as a matmul takes them. The operation that writes a tensor records which
/// of the two forms has the values; the backend converts when the other is needed.
/// </summary>
internal sealed class CudaTensor : Tensor
{
    private CudaStorage? _fp32, _rounded;

    /// <param name="owner">Has the device.</param>
    /// <param name="rows">Capacity.</param>
    /// <param name="columns">Of a row.</param>
    /// <param name="rounded">Which of two forms to allocate; the other is allocated when it is first needed.</param>
    public CudaTensor(CudaBackend owner, int rows, int columns, bool rounded)
        : base(rows, columns)
    {
        Owner = owner;
        IsKeptRounded = rounded;
        _ = rounded ? Rounded : Fp32;
    }

    /// <summary>Whether its readers take values in the storage type, where that is not fp32.</summary>
    public bool IsKeptRounded { get; }

    /// <summary>Which form has the values.</summary>
    public bool IsRounded { get; set; }

    public nuint Fp32 => (_fp32 ??= new CudaStorage(Owner, (long)Rows * Columns * sizeof(float))).Pointer;

    /// <summary>As a matmul takes them; the same memory as <see cref="Fp32"/> where that is fp32.</summary>
    public nuint Rounded => Owner.StoresFp32
        ? Fp32
        : (_rounded ??= new CudaStorage(Owner, (long)Rows * Columns * Owner.StoredBytes)).Pointer;

    public override long Bytes => (_fp32?.Bytes ?? 0) + (_rounded?.Bytes ?? 0);

    internal override CudaBackend Owner { get; }

    internal override bool IsGone => (_fp32 ?? _rounded)!.IsGone;

    public override void Read(int rows, Span<float> destination)
    {
        Check(rows, destination.Length, nameof(destination));
        Owner.Read(this, rows, destination[..(rows * Columns)]);
    }

    public override void Write(int rows, ReadOnlySpan<float> source)
    {
        Check(rows, source.Length, nameof(source));
        Owner.Flush(); // collected launches read the contents that this replaces
        Owner.Device.Upload(Fp32, System.Runtime.InteropServices.MemoryMarshal.AsBytes(source[..(rows * Columns)]));
        IsRounded = false;
    }

    public override void Discard()
    {
        Owner.Flush();
        _fp32?.Discard();
        _rounded?.Discard();
    }

    public override void Restore()
    {
        _fp32?.Restore();
        _rounded?.Restore();
        IsRounded = false;
    }

    public override void Dispose()
    {
        if (!IsGone)
            Owner.Flush();
        _fp32?.Dispose();
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
    private readonly long _offset;
    private readonly bool _isAlone;

    /// <summary>With memory of its own.</summary>
    public CudaWeight(CudaBackend owner, int outputs, int inputs)
        : this(owner, outputs, inputs, new CudaStorage(owner, BytesOf(owner, outputs, inputs)), 0)
        => _isAlone = true;

    /// <summary>A part of an arena, which allocates and frees its memory.</summary>
    public CudaWeight(CudaBackend owner, int outputs, int inputs, CudaStorage arena, long offset)
        : base(outputs, inputs)
    {
        Owner = owner;
        _storage = arena;
        _offset = offset;
    }

    public nuint Pointer => _storage.Pointer + (nuint)_offset;

    /// <summary>The last step that reads it: a write waits for that one.</summary>
    public long LastStep { get; set; }

    public override long Bytes => BytesOf(Owner, Outputs, Inputs);

    internal override CudaBackend Owner { get; }

    internal override bool IsGone => _storage.IsGone;

    public static long BytesOf(CudaBackend owner, int outputs, int inputs) =>
        (long)outputs * inputs * (outputs == 1 ? sizeof(float) : owner.StoredBytes);

    public override void Discard() => Alone().Discard();

    public override void Restore() => Alone().Restore();

    public override void Dispose() => Alone().Dispose();

    private CudaStorage Alone() =>
        _isAlone ? _storage : throw new InvalidOperationException("The weight's memory belongs to its arena.");
}

/// <summary>The weights of one model in one range of addresses, each at an offset of its own.</summary>
internal sealed class CudaWeightArena : WeightArena
{
    private const long Alignment = 256; // for the fastest matmuls and vector loads

    private readonly CudaBackend _owner;
    private readonly CudaStorage _storage;
    private readonly nuint _start;
    private PinnedBuffer? _onHost;

    private CudaWeightArena(CudaBackend owner, CudaStorage storage, IReadOnlyList<Weight> weights)
        : base(weights)
    {
        _owner = owner;
        _storage = storage;
        _start = storage.Pointer;
    }

    public static CudaWeightArena Allocate(CudaBackend owner, IReadOnlyList<(int Outputs, int Inputs)> shapes)
    {
        long[] offsets = new long[shapes.Count + 1];
        for (int i = 0; i < shapes.Count; i++)
        {
            long end = offsets[i] + CudaWeight.BytesOf(owner, shapes[i].Outputs, shapes[i].Inputs);
            offsets[i + 1] = (end + Alignment - 1) / Alignment * Alignment;
        }

        CudaStorage storage = new(owner, offsets[^1]);
        return new CudaWeightArena(
            owner, storage, [.. shapes.Select((shape, i) => new CudaWeight(owner, shape.Outputs, shape.Inputs, storage, offsets[i]))]);
    }

    public override long Bytes => _storage.Bytes;

    internal override CudaBackend Owner => _owner;

    internal override bool IsGone => _storage.IsGone;

    public override bool CanMoveToHost => true;

    public override void MoveToHost()
    {
        ObjectDisposedException.ThrowIf(IsGone, this);
        // Pinning more than the machine has does not fail: it ends another process, or this one.
        if (MachineMemory.AvailableBytes() is long available && Bytes > available)
            throw new OutOfMemoryException($"The host has {available} bytes free, the weights take {Bytes}.");
        PinnedBuffer copy = _owner.Device.AllocatePinned(Bytes);
        try
        {
            _owner.Device.CopyOut(_storage.Pointer, copy);
        }
        catch
        {
            copy.Dispose();
            throw;
        }

        _storage.Discard();
        _onHost = copy;
    }

    public override void Discard()
    {
        _storage.Discard();
        FreeCopy();
    }

    public override void Restore()
    {
        if (!IsGone)
            return;
        _storage.Restore();
        if (_onHost is null)
            return;
        _owner.Device.CopyIn(_onHost, _storage.Pointer);
        FreeCopy();
    }

    public override void Dispose()
    {
        _owner.Forget(_start, _storage.Bytes);
        _storage.Dispose();
        FreeCopy();
    }

    private void FreeCopy()
    {
        _onHost?.Dispose();
        _onHost = null;
    }
}

/// <summary>Layer after layer: its keys, then its values, each [blocks][kvHeads][16 tokens][headDim] in the storage type.</summary>
internal sealed class CudaKvCache : KvCache
{
    private readonly CudaStorage _storage;
    private readonly long[] _start; // of each layer, in bytes; [Layers + 1]
    private readonly int _elementBytes;

    public CudaKvCache(CudaBackend owner, int blocks, IReadOnlyList<KvLayout> layers)
        : base(blocks, layers)
    {
        Owner = owner;
        _elementBytes = owner.StoredBytes;
        _start = new long[layers.Count + 1];
        for (int layer = 0; layer < layers.Count; layer++)
            _start[layer + 1] = _start[layer] + (layers[layer].BlockElements * _elementBytes * blocks);
        _storage = new CudaStorage(owner, _start[^1]);
    }

    /// <summary>Of the keys, or of the values, of one of the layer's blocks.</summary>
    public long BlockBytes(int layer) => Layout(layer).BlockElements * _elementBytes / 2;

    public nuint Keys(int layer) => _storage.Pointer + (nuint)_start[layer];

    public nuint Values(int layer) => Keys(layer) + (nuint)(Blocks * BlockBytes(layer));

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

    public CudaRopeTable(CudaBackend owner, ReadOnlySpan<float> inverseFrequencies, int positions)
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
                row[i] = (float)cos;
                row[half + i] = (float)sin;
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
