using System.Runtime.InteropServices;

namespace Rollout.Kernels;

/// <summary>Zeroed native memory aligned to cache lines, freed on Dispose or, when that is forgotten, by the finalizer.</summary>
internal sealed unsafe partial class NativeBuffer : SafeHandle
{
    private const nuint Line = 64;
    private const nuint HugePage = 2 << 20;
    private const nuint MapFrom = 64 << 10;
    private const int MadviseHugePage = 14;
    private const int ReadWrite = 3;         // PROT_READ | PROT_WRITE
    private const int PrivateAnonymous = 34; // MAP_PRIVATE | MAP_ANONYMOUS
    private static readonly nint s_mapFailed = -1;

    private readonly nuint _alignment;
    private readonly nuint _size; // alignment included
    private byte* _aligned;

    public NativeBuffer(long bytes)
        : base(0, ownsHandle: true)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(bytes);
        Bytes = bytes;
        _alignment = bytes >= (long)HugePage ? HugePage : Line;
        _size = (((nuint)bytes + Line - 1) / Line * Line) + _alignment;
        Restore();
    }

    public long Bytes { get; }

    public override bool IsInvalid => handle == 0;

    /// <summary>Disposed, or discarded and not restored.</summary>
    public bool IsGone => IsClosed || handle == 0;

    public byte* Pointer => _aligned;

    public float* Floats => (float*)_aligned;

    // Directly from the system: the C library may keep freed memory instead of returning it to the system.
    private bool IsMapped => OperatingSystem.IsLinux() && _size >= MapFrom;

    /// <summary>Returns the memory to the system at once. The contents are lost.</summary>
    public void Discard()
    {
        if (IsGone)
            return;
        ReleaseHandle();
        SetHandle(0);
    }

    /// <summary>
    /// Allocates the memory again. The system zeroes each page when it is first touched, so a large cache costs nothing until it is used.
    /// </summary>
    /// <exception cref="OutOfMemoryException">The machine does not have enough memory.</exception>
    public void Restore()
    {
        ObjectDisposedException.ThrowIf(IsClosed, this);
        if (handle != 0)
            return;
        nint start = IsMapped ? Map(0, _size, ReadWrite, PrivateAnonymous, -1, 0) : (nint)NativeMemory.AllocZeroed(_size);
        if (start == s_mapFailed)
            throw new OutOfMemoryException($"{_size} bytes could not be mapped.");
        SetHandle(start);
        _aligned = (byte*)(((nuint)start + _alignment - 1) / _alignment * _alignment);

        // Streaming weights through 4 KiB pages costs a measurable share of the read bandwidth, above all in virtual machines.
        if (_alignment == HugePage && OperatingSystem.IsLinux())
            _ = Advise(_aligned, _size - _alignment, MadviseHugePage);
    }

    protected override bool ReleaseHandle()
    {
        _aligned = null;
        if (IsMapped)
            return Unmap(handle, _size) == 0;
        NativeMemory.Free((void*)handle);
        return true;
    }

    [LibraryImport("libc", EntryPoint = "mmap")]
    private static partial nint Map(nint address, nuint length, int protection, int flags, int file, nint offset);

    [LibraryImport("libc", EntryPoint = "munmap")]
    private static partial int Unmap(nint address, nuint length);

    /// <summary>madvise(2): advice only, so a refusal is ignored.</summary>
    [LibraryImport("libc", EntryPoint = "madvise")]
    private static partial int Advise(void* address, nuint length, int advice);
}

/// <summary>fp32 rows, each padded with zeros to a multiple of 32 columns so that panels are stored whole.</summary>
internal sealed unsafe class CpuTensor : Tensor
{
    private readonly NativeBuffer _buffer;

    public CpuTensor(CpuBackend owner, int rows, int columns)
        : base(rows, columns)
    {
        Owner = owner;
        Stride = PanelLayout.RoundUp(columns);
        _buffer = new NativeBuffer((long)rows * Stride * sizeof(float));
    }

    internal override CpuBackend Owner { get; }

    /// <summary>Floats from one row to the next.</summary>
    public int Stride { get; }

    internal override bool IsGone => _buffer.IsGone;

    public float* Data => _buffer.Floats;

    public override long Bytes => _buffer.Bytes;

    public float* Row(int row) => _buffer.Floats + ((long)row * Stride);

    public override void Read(int rows, Span<float> destination)
    {
        Check(rows, destination.Length, nameof(destination));
        for (int row = 0; row < rows; row++)
            new ReadOnlySpan<float>(Row(row), Columns).CopyTo(destination[(row * Columns)..]);
    }

    public override void Write(int rows, ReadOnlySpan<float> source)
    {
        Check(rows, source.Length, nameof(source));
        for (int row = 0; row < rows; row++)
            source.Slice(row * Columns, Columns).CopyTo(new Span<float>(Row(row), Columns));
    }

    public override void Discard() => _buffer.Discard();

    public override void Restore() => _buffer.Restore();

    public override void Dispose() => _buffer.Dispose();

    private void Check(int rows, int length, string name)
    {
        ObjectDisposedException.ThrowIf(IsGone, this);
        ArgumentOutOfRangeException.ThrowIfNegative(rows);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(rows, Rows);
        if (length < (long)rows * Columns)
            throw new ArgumentException($"{length} elements, needed {(long)rows * Columns}.", name);
    }
}

/// <summary>
/// A matrix as the backend's <see cref="Matrices"/> store it, or a vector in fp32 padded with zeros.
/// </summary>
internal sealed unsafe class CpuWeight : Weight
{
    private readonly NativeBuffer _buffer;

    public CpuWeight(CpuBackend owner, int outputs, int inputs)
        : base(outputs, inputs)
    {
        Owner = owner;
        _buffer = new NativeBuffer(
            IsVector ? (long)PanelLayout.RoundUp(inputs) * sizeof(float) : owner.Matrices.Bytes(outputs, inputs));
    }

    internal override CpuBackend Owner { get; }

    internal override bool IsGone => _buffer.IsGone;

    /// <summary>Of a matrix.</summary>
    public byte* Data => _buffer.Pointer;

    /// <summary>Of a vector.</summary>
    public float* Vector => _buffer.Floats;

    public override long Bytes => _buffer.Bytes;

    public override void Discard() => _buffer.Discard();

    public override void Restore() => _buffer.Restore();

    public override void Dispose() => _buffer.Dispose();
}

/// <summary>
/// fp32 keys and values, [layer][block][kvHead], each a key tile [keyDim][16 tokens], so that the scores of 16 tokens are one chain of
/// fused multiply-adds over keyDim, followed by a value tile [16 tokens][valueDim padded to 16].
/// </summary>
internal sealed unsafe class CpuKvCache : KvCache
{
    private readonly NativeBuffer _buffer;
    private readonly long[] _start; // of each layer, in floats; [Layers + 1]

    public CpuKvCache(CpuBackend owner, int blocks, IReadOnlyList<KvLayout> layers)
        : base(blocks, layers)
    {
        Owner = owner;
        _start = new long[layers.Count + 1];
        for (int layer = 0; layer < layers.Count; layer++)
            _start[layer + 1] = _start[layer] + ((long)blocks * layers[layer].KvHeads * CpuKvLayer.TileFloatsOf(layers[layer]));
        _buffer = new NativeBuffer(_start[^1] * sizeof(float));
    }

    internal override CpuBackend Owner { get; }

    internal override bool IsGone => _buffer.IsGone;

    public override long Bytes => _buffer.Bytes;

    public CpuKvLayer Layer(int layer) => new(_buffer.Floats + _start[layer], Layout(layer));

    public override void Discard() => _buffer.Discard();

    public override void Restore() => _buffer.Restore();

    public override void Dispose() => _buffer.Dispose();
}

/// <summary>Keys and values of one layer.</summary>
internal readonly unsafe struct CpuKvLayer(float* start, KvLayout layout)
{
    private readonly float* _start = start;

    public int KvHeads { get; } = layout.KvHeads;

    public int KeyDim { get; } = layout.KeyDim;

    public int ValueDim { get; } = layout.ValueDim;

    /// <summary>Floats from one token's value to the next.</summary>
    public int ValueStride { get; } = ValueStrideOf(layout);

    /// <summary>Floats of one block of one head: keys, then values.</summary>
    public int TileFloats { get; } = TileFloatsOf(layout);

    public static int ValueStrideOf(KvLayout layout) => (layout.ValueDim + 15) / 16 * 16;

    public static int TileFloatsOf(KvLayout layout) => KvCache.BlockTokens * (layout.KeyDim + ValueStrideOf(layout));

    /// <summary>[keyDim][16 tokens].</summary>
    public float* Keys(int block, int kvHead) => _start + ((((long)block * KvHeads) + kvHead) * TileFloats);

    /// <summary>[16 tokens][ValueStride].</summary>
    public float* Values(int block, int kvHead) => Keys(block, kvHead) + (KvCache.BlockTokens * KeyDim);
}

/// <summary>cos [positions, headDim / 2], then sin of the same shape.</summary>
internal sealed unsafe class CpuRopeTable : RopeTable
{
    private readonly NativeBuffer _buffer;

    public CpuRopeTable(CpuBackend owner, ReadOnlySpan<float> inverseFrequencies, int positions)
        : base(positions, inverseFrequencies.Length * 2)
    {
        Owner = owner;
        int half = inverseFrequencies.Length;
        _buffer = new NativeBuffer((long)positions * half * 2 * sizeof(float));
        for (int position = 0; position < positions; position++)
        {
            float* cos = Cos(position), sin = Sin(position);
            for (int i = 0; i < half; i++)
            {
                float angle = position * inverseFrequencies[i];
                (double s, double c) = VectorMath.SinCos(angle);
                cos[i] = (float)c;
                sin[i] = (float)s;
            }
        }
    }

    internal override CpuBackend Owner { get; }

    internal override bool IsGone => _buffer.IsGone;

    public override long Bytes => _buffer.Bytes;

    public float* Cos(int position) => _buffer.Floats + ((long)position * (HeadDim / 2));

    public float* Sin(int position) => Cos(position) + ((long)Positions * (HeadDim / 2));

    public override void Discard() => _buffer.Discard();

    public override void Restore() => _buffer.Restore();

    public override void Dispose() => _buffer.Dispose();
}
