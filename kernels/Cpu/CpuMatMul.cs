using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace Rollout.Kernels;

/// <summary>
/// bf16 matrices in <see cref="PanelLayout"/> and fp32 activations: output = one chain of fused multiply-adds over ascending inputs.
/// <para>
/// The scheme is that of Goto and van de Geijn ("Anatomy of high-performance matrix multiplication", 2008) with the outer product in
/// registers: a tile of up to 12 rows by 32 outputs keeps its 24 accumulators in registers while it goes over all inputs, so each output is
/// one chain of fused multiply-adds over ascending k, whatever the tile, the vector width or the thread. Inputs are not blocked: a panel of
/// a few thousand inputs fits the second-level cache, where the next tile of rows finds it again.
/// </para>
/// <para>A unit of work is one panel for all rows: each weight is read from memory once a step.</para>
/// </summary>
internal sealed unsafe class BFloat16Matrices : Matrices
{
    private readonly PackRowsJob _pack = new();
    private readonly MatMulJob _matMul;

    public BFloat16Matrices(int vectorBits) => _matMul = vectorBits switch
    {
        512 => new MatMulJob<Wide512>(),
        256 => new MatMulJob<Wide256>(),
        _ => new MatMulJob<Wide128>(),
    };

    public override string Description => "";

    public override long Bytes(int outputs, int inputs) => PanelLayout.Bytes(outputs, inputs);

    public override long PackedBytes(int rows, int inputs) => (long)rows * inputs * sizeof(float);

    public override void Write(byte* data, int outputs, int inputs, int output, byte* source, long rows, DType type) =>
        PanelLayout.Write((ushort*)data, inputs, output, source, rows, type);

    public override void ReadRow(byte* data, int outputs, int inputs, int output, int first, int count, float* destination) =>
        PanelLayout.ReadRow((ushort*)data, inputs, output, first, count, destination);

    public override void WriteElement(byte* data, int inputs, long element, byte* source, DType type) =>
        PanelLayout.Convert(source, PanelLayout.Element((ushort*)data, inputs, element), 1, type);

    public override void Multiply(Workers workers, in MatMulArguments arguments, byte* packed)
    {
        int rows = arguments.Rows, inputs = arguments.Inputs;
        _matMul.Input = arguments.Input;
        if (rows > 1)
        {
            _matMul.Input = (float*)packed;
            _pack.Input = arguments.Input;
            _pack.Stride = arguments.InputStride;
            _pack.Inputs = inputs;
            _pack.Tiles = new RowTiles(rows, _matMul.TileRows);
            _pack.Packed = (float*)packed;
            workers.Run(_pack, _pack.Tiles.Count * _pack.Chunks, (long)rows * inputs > SmallWork);
        }

        _matMul.Inputs = inputs;
        _matMul.Rows = rows;
        _matMul.Panels = (ushort*)arguments.Matrix;
        _matMul.Output = arguments.Output;
        _matMul.Stride = arguments.OutputStride;
        _matMul.Bias = arguments.Bias;
        _matMul.Add = arguments.Add;
        workers.Run(_matMul, PanelLayout.Count(arguments.Outputs), (long)arguments.Outputs * inputs > SmallWork);
    }
}

/// <summary>The matmul of one vector width. Units: panels.</summary>
internal abstract unsafe class MatMulJob : Job
{
    /// <summary>Rows packed by <see cref="PackRowsJob"/>, or, for a single row, the row itself.</summary>
    public float* Input;
    public int Inputs;
    public int Rows;
    public ushort* Panels;
    public float* Output;
    public int Stride;
    public float* Bias;
    public bool Add;

    /// <summary>Rows of the tallest tile.</summary>
    public abstract int TileRows { get; }
}

/// <summary>How rows are divided into tiles: as few tiles as possible, their heights at most one apart, the taller ones first.</summary>
internal readonly struct RowTiles
{
    private readonly int _height;
    private readonly int _taller;

    public RowTiles(int rows, int tallest)
    {
        Count = (rows + tallest - 1) / tallest;
        _height = rows / Count;
        _taller = rows % Count;
    }

    public int Count { get; }

    public int Start(int tile) => (tile * _height) + Math.Min(tile, _taller);

    public int Height(int tile) => tile < _taller ? _height + 1 : _height;

    /// <summary>The tile that holds a row.</summary>
    public int Of(int row)
    {
        int inTaller = _taller * (_height + 1);
        return row < inTaller ? row / (_height + 1) : _taller + ((row - inTaller) / _height);
    }
}

/// <summary>
/// Rows into tiles [tile][inputs][height], so that a matmul tile reads its activations contiguously. Units: tile x chunk.
/// </summary>
internal sealed unsafe class PackRowsJob : Job
{
    public const int Chunk = 512;

    public float* Input;
    public int Stride;
    public int Inputs;
    public RowTiles Tiles;
    public float* Packed;

    public int Chunks => (Inputs + Chunk - 1) / Chunk;

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public override void Execute(int unit, int worker)
    {
        int tile = unit / Chunks;
        int start = unit % Chunks * Chunk;
        int end = Math.Min(Inputs, start + Chunk);
        int height = Tiles.Height(tile);
        float* source = Input + ((long)Tiles.Start(tile) * Stride);
        float* packed = Packed + ((long)Tiles.Start(tile) * Inputs);

        int row = 0;
        if (Sse.IsSupported && height >= 4)
        {
            while (row < height)
            {
                // The last four rows may overlap the four before them: the same values are written twice.
                row = Math.Min(row, height - 4);
                float* s = source + ((long)row * Stride);
                float* p = packed + row;
                int k = start;
                for (; k + 4 <= end; k += 4)
                {
                    Vector128<float> r0 = Vector128.Load(s + k), r1 = Vector128.Load(s + Stride + k);
                    Vector128<float> r2 = Vector128.Load(s + (2L * Stride) + k), r3 = Vector128.Load(s + (3L * Stride) + k);
                    Vector128<float> x0 = Sse.UnpackLow(r0, r1), x1 = Sse.UnpackHigh(r0, r1);
                    Vector128<float> x2 = Sse.UnpackLow(r2, r3), x3 = Sse.UnpackHigh(r2, r3);
                    Sse.MoveLowToHigh(x0, x2).Store(p + ((long)k * height));
                    Sse.MoveHighToLow(x2, x0).Store(p + ((k + 1L) * height));
                    Sse.MoveLowToHigh(x1, x3).Store(p + ((k + 2L) * height));
                    Sse.MoveHighToLow(x3, x1).Store(p + ((k + 3L) * height));
                }

                for (; k < end; k++)
                {
                    for (int r = 0; r < 4; r++)
                        p[((long)k * height) + r] = s[((long)r * Stride) + k];
                }

                row += 4;
            }
        }
        else
        {
            for (; row < height; row++)
            {
                float* s = source + ((long)row * Stride);
                for (int k = start; k < end; k++)
                    packed[((long)k * height) + row] = s[k];
            }
        }
    }
}

internal sealed unsafe class MatMulJob<TVector> : MatMulJob
    where TVector : unmanaged, IVector<TVector>
{
    /// <summary>Lines that a tile prefetches ahead: further than the hardware does, and on into the next panel.</summary>
    private const int Ahead = 32;

    public override int TileRows => TVector.TileRows;

    public override void Execute(int unit, int worker)
    {
        RowTiles tiles = new(Rows, TVector.TileRows);
        ushort* panel = Panels + ((long)unit * Inputs * PanelLayout.Width);
        int column = unit * PanelLayout.Width;
        for (int tile = 0; tile < tiles.Count; tile++)
        {
            int start = tiles.Start(tile);
            float* input = Input + ((long)start * Inputs);
            float* output = Output + ((long)start * Stride) + column;
            for (int part = 0; part < PanelLayout.Width / 2; part += TVector.Width)
            {
                float* bias = Bias == null ? null : Bias + column + part;
                Tile(tiles.Height(tile), input, panel + (2 * part), Inputs, output + part, Stride, bias, Add);
            }
        }
    }

    /// <summary>Every height is its own method, so that no height is slowed by code for another's rows.</summary>
    private static void Tile(int rows, float* input, ushort* panel, int inputs, float* output, int stride, float* bias, bool add)
    {
        switch (rows)
        {
            case 1: Tile<Rows1>(input, panel, inputs, output, stride, bias, add); break;
            case 2: Tile<Rows2>(input, panel, inputs, output, stride, bias, add); break;
            case 3: Tile<Rows3>(input, panel, inputs, output, stride, bias, add); break;
            case 4: Tile<Rows4>(input, panel, inputs, output, stride, bias, add); break;
            case 5: Tile<Rows5>(input, panel, inputs, output, stride, bias, add); break;
            case 6: Tile<Rows6>(input, panel, inputs, output, stride, bias, add); break;
            case 7: Tile<Rows7>(input, panel, inputs, output, stride, bias, add); break;
            case 8: Tile<Rows8>(input, panel, inputs, output, stride, bias, add); break;
            case 9: Tile<Rows9>(input, panel, inputs, output, stride, bias, add); break;
            case 10: Tile<Rows10>(input, panel, inputs, output, stride, bias, add); break;
            case 11: Tile<Rows11>(input, panel, inputs, output, stride, bias, add); break;
            default: Tile<Rows12>(input, panel, inputs, output, stride, bias, add); break;
        }
    }

    /// <summary>
    /// input [inputs][rows], panel [inputs][32 of bf16] from this part's first lane, output [rows][Width and Width more 16 columns on].
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Tile<TRows>(float* input, ushort* panel, int inputs, float* output, long stride, float* bias, bool add)
        where TRows : struct, IRows
    {
        TVector zero = TVector.Create(0f);
        TVector a0 = zero, b0 = zero;
        TVector a1 = zero, b1 = zero;
        TVector a2 = zero, b2 = zero;
        TVector a3 = zero, b3 = zero;
        TVector a4 = zero, b4 = zero;
        TVector a5 = zero, b5 = zero;
        TVector a6 = zero, b6 = zero;
        TVector a7 = zero, b7 = zero;
        TVector a8 = zero, b8 = zero;
        TVector a9 = zero, b9 = zero;
        TVector a10 = zero, b10 = zero;
        TVector a11 = zero, b11 = zero;

        ushort* end = panel + ((long)inputs * PanelLayout.Width);
        while (panel < end)
        {
            if (Sse.IsSupported)
                Sse.Prefetch0(panel + (Ahead * PanelLayout.Width));
            TVector.LoadPair(panel, out TVector even, out TVector odd);
            {
                TVector x = TVector.Create(input[0]);
                a0 = TVector.Fma(x, even, a0);
                b0 = TVector.Fma(x, odd, b0);
            }

            if (TRows.Count > 1)
            {
                TVector x = TVector.Create(input[1]);
                a1 = TVector.Fma(x, even, a1);
                b1 = TVector.Fma(x, odd, b1);
            }

            if (TRows.Count > 2)
            {
                TVector x = TVector.Create(input[2]);
                a2 = TVector.Fma(x, even, a2);
                b2 = TVector.Fma(x, odd, b2);
            }

            if (TRows.Count > 3)
            {
                TVector x = TVector.Create(input[3]);
                a3 = TVector.Fma(x, even, a3);
                b3 = TVector.Fma(x, odd, b3);
            }

            if (TRows.Count > 4)
            {
                TVector x = TVector.Create(input[4]);
                a4 = TVector.Fma(x, even, a4);
                b4 = TVector.Fma(x, odd, b4);
            }

            if (TRows.Count > 5)
            {
                TVector x = TVector.Create(input[5]);
                a5 = TVector.Fma(x, even, a5);
                b5 = TVector.Fma(x, odd, b5);
            }

            if (TRows.Count > 6)
            {
                TVector x = TVector.Create(input[6]);
                a6 = TVector.Fma(x, even, a6);
                b6 = TVector.Fma(x, odd, b6);
            }

            if (TRows.Count > 7)
            {
                TVector x = TVector.Create(input[7]);
                a7 = TVector.Fma(x, even, a7);
                b7 = TVector.Fma(x, odd, b7);
            }

            if (TRows.Count > 8)
            {
                TVector x = TVector.Create(input[8]);
                a8 = TVector.Fma(x, even, a8);
                b8 = TVector.Fma(x, odd, b8);
            }

            if (TRows.Count > 9)
            {
                TVector x = TVector.Create(input[9]);
                a9 = TVector.Fma(x, even, a9);
                b9 = TVector.Fma(x, odd, b9);
            }

            if (TRows.Count > 10)
            {
                TVector x = TVector.Create(input[10]);
                a10 = TVector.Fma(x, even, a10);
                b10 = TVector.Fma(x, odd, b10);
            }

            if (TRows.Count > 11)
            {
                TVector x = TVector.Create(input[11]);
                a11 = TVector.Fma(x, even, a11);
                b11 = TVector.Fma(x, odd, b11);
            }

            panel += PanelLayout.Width;
            input += TRows.Count;
        }

        Finish(a0, b0, output + (0 * stride), bias, add);
        if (TRows.Count > 1)
            Finish(a1, b1, output + (1 * stride), bias, add);
        if (TRows.Count > 2)
            Finish(a2, b2, output + (2 * stride), bias, add);
        if (TRows.Count > 3)
            Finish(a3, b3, output + (3 * stride), bias, add);
        if (TRows.Count > 4)
            Finish(a4, b4, output + (4 * stride), bias, add);
        if (TRows.Count > 5)
            Finish(a5, b5, output + (5 * stride), bias, add);
        if (TRows.Count > 6)
            Finish(a6, b6, output + (6 * stride), bias, add);
        if (TRows.Count > 7)
            Finish(a7, b7, output + (7 * stride), bias, add);
        if (TRows.Count > 8)
            Finish(a8, b8, output + (8 * stride), bias, add);
        if (TRows.Count > 9)
            Finish(a9, b9, output + (9 * stride), bias, add);
        if (TRows.Count > 10)
            Finish(a10, b10, output + (10 * stride), bias, add);
        if (TRows.Count > 11)
            Finish(a11, b11, output + (11 * stride), bias, add);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Finish(TVector a, TVector b, float* output, float* bias, bool add)
    {
        if (bias != null)
        {
            a += TVector.Load(bias);
            b += TVector.Load(bias + 16);
        }

        if (add)
        {
            a = TVector.Load(output) + a;
            b = TVector.Load(output + 16) + b;
        }

        TVector.Store(output, a);
        TVector.Store(output + 16, b);
    }

    private interface IRows
    {
        static abstract int Count { get; }
    }

    private readonly struct Rows1 : IRows
    {
        public static int Count => 1;
    }

    private readonly struct Rows2 : IRows
    {
        public static int Count => 2;
    }

    private readonly struct Rows3 : IRows
    {
        public static int Count => 3;
    }

    private readonly struct Rows4 : IRows
    {
        public static int Count => 4;
    }

    private readonly struct Rows5 : IRows
    {
        public static int Count => 5;
    }

    private readonly struct Rows6 : IRows
    {
        public static int Count => 6;
    }

    private readonly struct Rows7 : IRows
    {
        public static int Count => 7;
    }

    private readonly struct Rows8 : IRows
    {
        public static int Count => 8;
    }

    private readonly struct Rows9 : IRows
    {
        public static int Count => 9;
    }

    private readonly struct Rows10 : IRows
    {
        public static int Count => 10;
    }

    private readonly struct Rows11 : IRows
    {
        public static int Count => 11;
    }

    private readonly struct Rows12 : IRows
    {
        public static int Count => 12;
    }
}
