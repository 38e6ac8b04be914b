using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Runtime.Intrinsics;

namespace Rollout.Kernels;

/// <summary>
/// Rows of fp32 activations into what an int8 tile reads: bytes [tile][group of 4 inputs][height][4], and per tile and block of 128 inputs a
/// scale and a correction for every row, [tile][block][height]. Units: tile x block.
/// </summary>
internal sealed unsafe class QuantiseRowsJob : Job
{
    public float* Input;
    public int Stride;
    public int Inputs;
    public RowTiles Tiles;
    public QuantisedRows Quantised;

    public override void Execute(int unit, int worker)
    {
        int blocks = Int8Layout.Blocks(Inputs);
        int tile = unit / blocks, block = unit % blocks;
        int start = Tiles.Start(tile), height = Tiles.Height(tile);
        int first = block * Int8Layout.Block;
        int count = Math.Min(Int8Layout.Block, Inputs - first);
        sbyte* bytes = Quantised.Bytes(start, Inputs) + (first * height);
        long entry = ((long)start * blocks) + ((long)block * height);
        for (int r = 0; r < height; r++)
        {
            float* x = Input + ((long)(start + r) * Stride) + first;
            Quantised.Scales[entry + r] =
                Int8Layout.QuantiseBlock(x, count, bytes + (r * Int8Layout.Group), height * Int8Layout.Group, out int sum);

            // Weights are stored 128 too high: what that adds to the lane is where the lane begins, below zero.
            Quantised.Corrections[entry + r] = -128 * sum;
        }
    }
}

/// <summary>Where the three parts of quantised rows lie in one buffer.</summary>
internal readonly unsafe struct QuantisedRows(byte* buffer, int rows, int inputs)
{
    private readonly byte* _buffer = buffer;

    public float* Scales { get; } = (float*)(buffer + ByteCount(rows, inputs));

    public int* Corrections { get; } = (int*)(buffer + ByteCount(rows, inputs)) + ((long)rows * Int8Layout.Blocks(inputs));

    public static long BytesFor(int rows, int inputs) => ByteCount(rows, inputs) + ((long)rows * Int8Layout.Blocks(inputs) * 8);

    public sbyte* Bytes(int firstRow, int inputs) => (sbyte*)_buffer + ((long)firstRow * Int8Layout.Groups(inputs) * Int8Layout.Group);

    private static long ByteCount(int rows, int inputs) => ((long)rows * Int8Layout.Groups(inputs) * Int8Layout.Group + 63) / 64 * 64;
}

/// <summary>What one tile works on. Its layout is known to <see cref="VnniTile"/>.</summary>
[StructLayout(LayoutKind.Sequential)]
internal unsafe struct Int8TileArguments
{
    /// <summary>[groups][height][4].</summary>
    public sbyte* Activations;

    /// <summary>[groups][32][4], 128 too high.</summary>
    public byte* Panel;

    /// <summary>[blocks][height].</summary>
    public int* Corrections;

    /// <summary>[blocks][height].</summary>
    public float* Scales;

    /// <summary>[height][32], added to.</summary>
    public float* Sums;

    public long Blocks;

    /// <summary>Groups of each of these blocks.</summary>
    public long GroupsPerBlock;
}

/// <summary>
/// output [rows, outputs] = input [rows, inputs], quantised per row and block of 128 inputs, x int8 weight [outputs, inputs].
/// Within a block products are summed in integers, which is exact in any order; the blocks' sums, times the activations' scale, are one chain of
/// fused multiply-adds over ascending blocks; the weight's scale comes last. So bits depend on the row alone here too.
/// <para>A unit of work is one panel for all rows.</para>
/// </summary>
internal sealed unsafe class Int8MatMulJob : Job, IDisposable
{
    private const int Width = PanelLayout.Width;

    /// <summary>Two accumulators a row, two weights and a broadcast fit 32 registers.</summary>
    public const int TileRows = 12;

    private readonly VnniTile? _vnni;
    private readonly Int8Tile _tile;

    public int Inputs;
    public int Outputs;
    public int Rows;
    public byte* Panels;
    public QuantisedRows Input;
    public float* Output;
    public int Stride;
    public float* Bias;
    public bool Add;

    /// <param name="vectorBits">Of the code path; 512 uses the machine's own dot product where it has one.</param>
    public Int8MatMulJob(int vectorBits)
    {
        if (vectorBits == 512 && VnniTile.IsSupported)
            _vnni = new VnniTile(TileRows);
        _tile = Int8Tile.Of(vectorBits);
    }

    public string Instructions => _vnni != null ? "avx512-vnni" : "multiply-add";

    public override void Execute(int unit, int worker)
    {
        RowTiles tiles = new(Rows, TileRows);
        int blocks = Int8Layout.Blocks(Inputs);
        int whole = Inputs / Int8Layout.Block;
        int rest = Int8Layout.Groups(Inputs) - (whole * (Int8Layout.Block / Int8Layout.Group));
        float* weightScales = Int8Layout.Scales(Panels, Outputs, Inputs) + (unit * Width);
        float* sums = stackalloc float[TileRows * Width];
        for (int tile = 0; tile < tiles.Count; tile++)
        {
            int start = tiles.Start(tile), height = tiles.Height(tile);
            new Span<float>(sums, height * Width).Clear();
            Int8TileArguments arguments;
            arguments.Activations = Input.Bytes(start, Inputs);
            arguments.Panel = Panels + (unit * Int8Layout.PanelBytes(Inputs));
            arguments.Corrections = Input.Corrections + ((long)start * blocks);
            arguments.Scales = Input.Scales + ((long)start * blocks);
            arguments.Sums = sums;
            if (whole > 0)
            {
                arguments.Blocks = whole;
                arguments.GroupsPerBlock = Int8Layout.Block / Int8Layout.Group;
                Run(height, ref arguments);
            }

            if (rest > 0)
            {
                arguments.Activations += (long)whole * Int8Layout.Block * height;
                arguments.Panel += (long)whole * Int8Layout.Block * Width;
                arguments.Corrections += (long)whole * height;
                arguments.Scales += (long)whole * height;
                arguments.Blocks = 1;
                arguments.GroupsPerBlock = rest;
                Run(height, ref arguments);
            }

            Finish(height, sums, weightScales, start, unit * Width);
        }
    }

    public void Dispose() => _vnni?.Dispose();

    private void Run(int height, ref Int8TileArguments arguments)
    {
        if (_vnni != null)
            _vnni.Run(height, ref arguments);
        else
            _tile.Run(height, ref arguments);
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private void Finish(int height, float* sums, float* weightScales, int firstRow, int column)
    {
        for (int r = 0; r < height; r++)
        {
            float* output = Output + ((long)(firstRow + r) * Stride) + column;
            for (int o = 0; o < Width; o += 4)
            {
                Vector128<float> value = Vector128.Load(sums + (r * Width) + o) * Vector128.Load(weightScales + o);
                if (Bias != null)
                    value += Vector128.Load(Bias + column + o);
                if (Add)
                    value = Vector128.Load(output + o) + value;
                value.Store(output + o);
            }
        }
    }
}
