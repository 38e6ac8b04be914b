using System.Runtime.InteropServices;

namespace Rollout.Kernels;

/// <summary>Zeroed native memory aligned to cache lines, given back on Dispose or, when that is forgotten, by the finalizer.</summary>
internal sealed unsafe partial class NativeBuffer : SafeHandle
{
    private const nuint Line = 64;
    private const nuint HugePage = 2 << 20;
    private const int MadviseHugePage = 14;

    private byte* _aligned;

    public NativeBuffer(long bytes)
        : base(0, ownsHandle: true)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(bytes);
        Bytes = bytes;

        // Zeroed by the system, page by page, when first touched: a large cache costs nothing until it is used.
        nuint alignment = bytes >= (long)HugePage ? HugePage : Line;
        nuint size = ((nuint)bytes + Line - 1) / Line * Line;
        SetHandle((nint)NativeMemory.AllocZeroed(size + alignment));
        _aligned = (byte*)(((nuint)handle + alignment - 1) / alignment * alignment);

        // Streaming weights through 4 KiB pages costs a measurable share of the read bandwidth, above all in virtual machines.
        if (alignment == HugePage && OperatingSystem.IsLinux())
            _ = Advise(_aligned, size, MadviseHugePage);
    }

    public long Bytes { get; }

    public override bool IsInvalid => handle == 0;

    public byte* Pointer => _aligned;

    public float* Floats => (float*)_aligned;

    protected override bool ReleaseHandle()
    {
        NativeMemory.Free((void*)handle);
        _aligned = null;
        return true;
    }

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

    public CpuBackend Owner { get; }

    /// <summary>Floats from one row to the next.</summary>
    public int Stride { get; }

    public bool IsDisposed => _buffer.IsClosed;

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

    public override void Dispose() => _buffer.Dispose();

    private void Check(int rows, int length, string name)
    {
        ObjectDisposedException.ThrowIf(IsDisposed, this);
        ArgumentOutOfRangeException.ThrowIfNegative(rows);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(rows, Rows);
        if (length < (long)rows * Columns)
            throw new ArgumentException($"{length} elements, needed {(long)rows * Columns}.", name);
    }
}

/// <summary>A matrix in panels (<see cref="PanelLayout"/>), or a vector in fp32 padded with zeros.</summary>
internal sealed unsafe class CpuWeight : Weight
{
    private readonly NativeBuffer _buffer;

    public CpuWeight(CpuBackend owner, int outputs, int inputs)
        : base(outputs, inputs)
    {
        Owner = owner;
        _buffer = new NativeBuffer(IsVector ? (long)PanelLayout.RoundUp(inputs) * 4 : PanelLayout.Bytes(outputs, inputs));
    }

    public CpuBackend Owner { get; }

    public bool IsDisposed => _buffer.IsClosed;

    /// <summary>Of a matrix.</summary>
    public ushort* Panels => (ushort*)_buffer.Pointer;

    /// <summary>Of a vector.</summary>
    public float* Vector => _buffer.Floats;

    public override long Bytes => _buffer.Bytes;

    public override void Dispose() => _buffer.Dispose();
}

/// <summary>
/// fp32 keys and values, [layer][block][kvHead], each a key tile [headDim][16 tokens], so that the scores of 16 tokens are one chain of
/// fused multiply-adds over headDim, followed by a value tile [16 tokens][headDim padded to 16].
/// </summary>
internal sealed unsafe class CpuKvCache : KvCache
{
    private readonly NativeBuffer _buffer;

    public CpuKvCache(CpuBackend owner, int layers, int blocks, int kvHeads, int headDim)
        : base(layers, blocks, kvHeads, headDim)
    {
        Owner = owner;
        ValueStride = (headDim + 15) / 16 * 16;
        TileFloats = BlockTokens * (headDim + ValueStride);
        _buffer = new NativeBuffer((long)layers * blocks * kvHeads * TileFloats * sizeof(float));
    }

    public CpuBackend Owner { get; }

    public int ValueStride { get; }

    /// <summary>Floats of one block of one head: keys, then values.</summary>
    public int TileFloats { get; }

    public bool IsDisposed => _buffer.IsClosed;

    public override long Bytes => _buffer.Bytes;

    public float* Keys(int layer, int block, int kvHead) =>
        _buffer.Floats + (((((long)layer * Blocks) + block) * KvHeads) + kvHead) * TileFloats;

    public float* Values(int layer, int block, int kvHead) => Keys(layer, block, kvHead) + (BlockTokens * HeadDim);

    public override void Dispose() => _buffer.Dispose();
}

/// <summary>cos [positions, headDim / 2], then sin of the same shape.</summary>
internal sealed unsafe class CpuRopeTable : RopeTable
{
    private readonly NativeBuffer _buffer;

    public CpuRopeTable(CpuBackend owner, ReadOnlySpan<float> inverseFrequencies, int positions, float scale)
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
                cos[i] = (float)c * scale;
                sin[i] = (float)s * scale;
            }
        }
    }

    public CpuBackend Owner { get; }

    public bool IsDisposed => _buffer.IsClosed;

    public override long Bytes => _buffer.Bytes;

    public float* Cos(int position) => _buffer.Floats + ((long)position * (HeadDim / 2));

    public float* Sin(int position) => Cos(position) + ((long)Positions * (HeadDim / 2));

    public override void Dispose() => _buffer.Dispose();
}
