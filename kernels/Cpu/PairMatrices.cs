using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;

namespace Rollout.Kernels;

/// <summary>
/// bf16 matrices whose matmul rounds activations to bf16 and sums in fp32: output = one chain of fused multiply-adds over the inputs in the
/// order 1, 0, 3, 2, 5, 4 ... (the order of the instruction that <see cref="PairTileCode"/> uses). Subnormal products count as zero where
/// that instruction computes them.
/// </summary>
internal sealed unsafe class PairMatrices : Matrices
{
    private readonly RoundRowsJob _round = new();
    private readonly PairMatMulJob _matMul;

    /// <param name="vectorBits">Of the code path; 512 uses the machine's own dot product where it has one.</param>
    public PairMatrices(int vectorBits) => _matMul = new PairMatMulJob(vectorBits);

    public override string Description => $"bf16 activations by {(_matMul.Code != null ? "avx512-bf16" : "multiply-add")}";

    public override long Bytes(int outputs, int inputs) => PanelLayout.Count(outputs) * LanePanels.PanelBytes(Pairs(inputs));

    public override long PackedBytes(int rows, int inputs) => (long)rows * Pairs(inputs) * sizeof(uint);

    public override void Write(byte* data, int outputs, int inputs, int output, byte* source, long rows, DType type)
    {
        int pairs = Pairs(inputs);
        LanePanels.Scratch scratch = new(inputs, pairs);
        while (rows > 0)
        {
            int first = output % LanePanels.Width;
            int count = (int)Math.Min(LanePanels.Width - first, rows);
            for (int r = first; r < first + count; r++, source += (long)inputs * type.Size())
            {
                scratch.Row(r)[pairs - 1] = 0; // the last pair of an odd number of inputs
                PanelLayout.Convert(source, (ushort*)scratch.Row(r), inputs, type);
            }

            LanePanels.Store(scratch, pairs, first, first + count, data + (output / LanePanels.Width * LanePanels.PanelBytes(pairs)));
            output += count;
            rows -= count;
        }

        LanePanels.Fence();
    }

    public override void ReadRow(byte* data, int outputs, int inputs, int output, int first, int count, float* destination)
    {
        for (int k = first; k < first + count; k++)
            destination[k - first] = PanelLayout.ToSingle(*Element(data, inputs, output, k));
    }

    public override void WriteElement(byte* data, int inputs, long element, byte* source, DType type) =>
        PanelLayout.Convert(source, Element(data, inputs, (int)(element / inputs), (int)(element % inputs)), 1, type);

    public override void Multiply(Workers workers, in MatMulArguments arguments, byte* packed)
    {
        _round.Input = arguments.Input;
        _round.Stride = arguments.InputStride;
        _round.Inputs = arguments.Inputs;
        _round.Tiles = new RowTiles(arguments.Rows, PairMatMulJob.TileRows);
        _round.Rounded = (uint*)packed;
        workers.Run(_round, arguments.Rows, (long)arguments.Rows * arguments.Inputs > SmallWork);

        _matMul.Arguments = arguments;
        _matMul.Activations = (uint*)packed;
        workers.Run(_matMul, PanelLayout.Count(arguments.Outputs), (long)arguments.Outputs * arguments.Inputs > SmallWork);
    }

    public override void Dispose() => _matMul.Code?.Dispose();

    private static int Pairs(int inputs) => (inputs + 1) / 2;

    private static ushort* Element(byte* data, int inputs, int output, int input) =>
        (ushort*)(data + (output / LanePanels.Width * LanePanels.PanelBytes(Pairs(inputs))) + ((long)(input / 2) * LanePanels.LineBytes)
            + (output % LanePanels.Width * sizeof(uint))) + (input % 2);

    /// <summary>Rows of fp32 to bf16 pairs [tile][pairs][height]. Units: rows.</summary>
    private sealed class RoundRowsJob : Job
    {
        public float* Input;
        public int Stride;
        public int Inputs;
        public RowTiles Tiles;
        public uint* Rounded;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public override void Execute(int unit, int worker)
        {
            int tile = Tiles.Of(unit);
            int start = Tiles.Start(tile), height = Tiles.Height(tile), pairs = Pairs(Inputs);
            float* x = Input + ((long)unit * Stride);
            uint* rounded = Rounded + ((long)start * pairs) + (unit - start);
            int k = 0;
            for (; k + 8 <= Inputs; k += 8)
            {
                // Rounds to nearest, ties to even, each half placed where its pair needs it; NaN stays NaN.
                Vector256<uint> bits = Vector256.Load((uint*)(x + k));
                Vector256<uint> up = bits + Vector256.Create(0x7FFFu) + ((bits >>> 16) & Vector256<uint>.One);
                Vector256<uint> nan = ~Vector256.Equals(bits.AsSingle(), bits.AsSingle()).AsUInt32();
                Vector256<uint> high =
                    Vector256.ConditionalSelect(nan, bits | Vector256.Create(0x400000u), up) & Vector256.Create(0xFFFF0000u);
                Vector256<ulong> pair = high.AsUInt64();
                Vector256<uint> both = ((pair >>> 32) | ((pair << 32) >>> 48)).AsUInt32();
                uint* to = rounded + ((long)(k / 2) * height);
                to[0] = both[0];
                to[height] = both[2];
                to[2 * height] = both[4];
                to[3 * height] = both[6];
            }

            for (; k < Inputs; k += 2)
            {
                uint even = PanelLayout.ToBFloat16(x[k]), odd = k + 1 < Inputs ? PanelLayout.ToBFloat16(x[k + 1]) : 0u;
                rounded[(long)(k / 2) * height] = even | (odd << 16);
            }
        }
    }

    /// <summary>Units: panels, for all rows.</summary>
    private sealed class PairMatMulJob : Job
    {
        /// <summary>Two accumulators a row, two weights and a broadcast fit 32 registers.</summary>
        public const int TileRows = 12;

        public MatMulArguments Arguments;
        public uint* Activations;

        private readonly PairTile _tile;

        public PairMatMulJob(int vectorBits)
        {
            if (vectorBits == 512 && PairTileCode.IsSupported)
                Code = new MachineCode(TileRows, PairTileCode.Assemble);
            _tile = PairTile.Of(vectorBits);
        }

        public MachineCode? Code { get; }

        public override void Execute(int unit, int worker)
        {
            RowTiles tiles = new(Arguments.Rows, TileRows);
            float* sums = stackalloc float[TileRows * PanelLayout.Width];
            PairTileArguments tile;
            tile.Pairs = Pairs(Arguments.Inputs);
            tile.Panel = Arguments.Matrix + (unit * LanePanels.PanelBytes((int)tile.Pairs));
            tile.Sums = sums;
            for (int t = 0; t < tiles.Count; t++)
            {
                int start = tiles.Start(t), height = tiles.Height(t);
                tile.Activations = (ushort*)(Activations + (start * tile.Pairs));
                if (Code != null)
                    Code.Run(height, &tile);
                else
                    _tile.Run(height, tile);
                PanelSums.Finish(sums, height, weightScales: null, Arguments, start, unit * PanelLayout.Width);
            }
        }
    }
}
