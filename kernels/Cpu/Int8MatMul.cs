using System.Runtime.InteropServices;

namespace Rollout.Kernels;

/// <summary>
/// Rows of fp32 activations into what an int8 tile reads: bytes [tile][group of 4 inputs][height][4], and per tile and block of 128 inputs
/// a scale and a correction for every row, [tile][block][height]. Units: tile x block.
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

            // Weights are stored 128 too high: the lane starts at minus what that adds.
            Quantised.Corrections[entry + r] = -128 * sum;
        }
    }
}

/// <summary>Where the three parts of quantised rows are in one buffer.</summary>
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
/// int8 matrices and activations quantised per row and block of 128 inputs. Within a block products are summed in integers, which is exact
/// in any order; the blocks' sums, times the activations' scale, are one chain of fused multiply-adds over ascending blocks; the weight's
/// scale comes last. So the bits depend on the row alone here too.
/// </summary>
internal sealed unsafe class Int8Matrices(int vectorBits) : Matrices
{
    private readonly QuantiseRowsJob _quantise = new();
    private readonly Int8MatMulJob _matMul = new(vectorBits);

    public override string Description => $"int8 weights by {(_matMul.Code != null ? "avx512-vnni" : "multiply-add")}";

    public override long Bytes(int outputs, int inputs) => Int8Layout.Bytes(outputs, inputs);

    public override long PackedBytes(int rows, int inputs) => QuantisedRows.BytesFor(rows, inputs);

    public override void Write(byte* data, int outputs, int inputs, int output, byte* source, long rows, DType type) =>
        Int8Layout.Write(data, outputs, inputs, output, source, rows, type);

    public override void ReadRow(byte* data, int outputs, int inputs, int output, int first, int count, float* destination) =>
        Int8Layout.ReadRow(data, outputs, inputs, output, first, count, destination);

    public override void WriteElement(byte* data, int inputs, long element, byte* source, DType type) =>
        throw new NotSupportedException("Single elements of an int8 matrix cannot be changed: they share a scale with their row.");

    public override void Multiply(Workers workers, in MatMulArguments arguments, byte* packed)
    {
        int rows = arguments.Rows, inputs = arguments.Inputs;
        _quantise.Input = arguments.Input;
        _quantise.Stride = arguments.InputStride;
        _quantise.Inputs = inputs;
        _quantise.Tiles = new RowTiles(rows, Int8MatMulJob.TileRows);
        _quantise.Quantised = new QuantisedRows(packed, rows, inputs);
        workers.Run(_quantise, _quantise.Tiles.Count * Int8Layout.Blocks(inputs), (long)rows * inputs > SmallWork);

        _matMul.Arguments = arguments;
        _matMul.Input = _quantise.Quantised;
        workers.Run(_matMul, PanelLayout.Count(arguments.Outputs), (long)arguments.Outputs * inputs > SmallWork);
    }

    public override void Dispose() => _matMul.Code?.Dispose();
}

/// <summary>The int8 matmul. Units: panels, for all rows.</summary>
internal sealed unsafe class Int8MatMulJob : Job
{
    /// <summary>Two accumulators a row, two weights and a broadcast fit 32 registers.</summary>
    public const int TileRows = 12;

    private const int Width = PanelLayout.Width;

    private readonly Int8Tile _tile;

    public MatMulArguments Arguments;
    public QuantisedRows Input;

    /// <param name="vectorBits">Of the code path; 512 uses the machine's own dot product where it has one.</param>
    public Int8MatMulJob(int vectorBits)
    {
        if (vectorBits == 512 && VnniTile.IsSupported)
            Code = new MachineCode(TileRows, VnniTile.Assemble);
        _tile = Int8Tile.Of(vectorBits);
    }

    public MachineCode? Code { get; }

    public override void Execute(int unit, int worker)
    {
        int inputs = Arguments.Inputs;
        RowTiles tiles = new(Arguments.Rows, TileRows);
        int blocks = Int8Layout.Blocks(inputs);
        int whole = inputs / Int8Layout.Block;
        int rest = Int8Layout.Groups(inputs) - (whole * (Int8Layout.Block / Int8Layout.Group));
        float* weightScales = Int8Layout.Scales(Arguments.Matrix, Arguments.Outputs, inputs) + (unit * Width);
        float* sums = stackalloc float[TileRows * Width];
        for (int t = 0; t < tiles.Count; t++)
        {
            int start = tiles.Start(t), height = tiles.Height(t);
            new Span<float>(sums, height * Width).Clear();
            Int8TileArguments tile;
            tile.Activations = Input.Bytes(start, inputs);
            tile.Panel = Arguments.Matrix + (unit * Int8Layout.PanelBytes(inputs));
            tile.Corrections = Input.Corrections + ((long)start * blocks);
            tile.Scales = Input.Scales + ((long)start * blocks);
            tile.Sums = sums;
            if (whole > 0)
            {
                tile.Blocks = whole;
                tile.GroupsPerBlock = Int8Layout.Block / Int8Layout.Group;
                Run(height, ref tile);
            }

            if (rest > 0)
            {
                tile.Activations += (long)whole * Int8Layout.Block * height;
                tile.Panel += (long)whole * Int8Layout.Block * Width;
                tile.Corrections += (long)whole * height;
                tile.Scales += (long)whole * height;
                tile.Blocks = 1;
                tile.GroupsPerBlock = rest;
                Run(height, ref tile);
            }

            PanelSums.Finish(sums, height, weightScales, Arguments, start, unit * Width);
        }
    }

    private void Run(int height, ref Int8TileArguments tile)
    {
        if (Code == null)
        {
            _tile.Run(height, ref tile);
            return;
        }

        fixed (Int8TileArguments* arguments = &tile)
            Code.Run(height, arguments);
    }
}
