namespace Rollout.Kernels.Tests;

/// <summary>Its memory: arrays of float64, and of the type that weights are rounded to.</summary>
public sealed partial class ReferenceBackend
{
    private sealed class RefTensor(ReferenceBackend owner, int rows, int columns) : Tensor(rows, columns)
    {
        private readonly double[] _data = new double[rows * columns];
        private bool _isGone;

        internal override Backend Owner => owner;

        internal override bool IsGone => _isGone;

        public override long Bytes => _data.Length * sizeof(double);

        public double this[int row, int column]
        {
            get => _data[(row * Columns) + column];
            set => _data[(row * Columns) + column] = value;
        }

        public Span<double> Row(int row) => _data.AsSpan(row * Columns, Columns);

        public override void Read(int rows, Span<float> destination)
        {
            for (int i = 0; i < rows * Columns; i++)
                destination[i] = (float)_data[i];
        }

        public override void Write(int rows, ReadOnlySpan<float> source)
        {
            for (int i = 0; i < rows * Columns; i++)
                _data[i] = source[i];
        }

        public override void Discard() => _isGone = true;

        public override void Restore()
        {
            _isGone = false;
            Array.Clear(_data);
        }

        public override void Dispose() => _isGone = true;
    }

    private sealed class RefWeight(ReferenceBackend owner, int outputs, int inputs) : Weight(outputs, inputs)
    {
        private bool _isGone;

        internal override Backend Owner => owner;

        internal override bool IsGone => _isGone;

        public float[] Data { get; } = new float[outputs * inputs];

        public override long Bytes => Data.Length * sizeof(float);

        public float this[int output, int input] => Data[(output * Inputs) + input];

        public override void Discard() => _isGone = true;

        public override void Restore()
        {
            _isGone = false;
            Array.Clear(Data);
        }

        public override void Dispose() => _isGone = true;
    }

    /// <summary>Of each layer keys [blocks, kvHeads, BlockTokens, keyDim] and values [blocks, kvHeads, BlockTokens, valueDim].</summary>
    private sealed class RefCache(ReferenceBackend owner, int blocks, IReadOnlyList<KvLayout> layers) : KvCache(blocks, layers)
    {
        private readonly double[][] _keys = [.. layers.Select(of => new double[blocks * of.KvHeads * BlockTokens * of.KeyDim])];
        private readonly double[][] _values = [.. layers.Select(of => new double[blocks * of.KvHeads * BlockTokens * of.ValueDim])];
        private bool _isGone;

        internal override Backend Owner => owner;

        internal override bool IsGone => _isGone;

        public override long Bytes => _keys.Concat(_values).Sum(array => (long)array.Length) * sizeof(double);

        public Span<double> Key(int layer, int block, int head, int slot) =>
            Vector(_keys[layer], Layout(layer).KvHeads, Layout(layer).KeyDim, block, head, slot);

        public Span<double> Value(int layer, int block, int head, int slot) =>
            Vector(_values[layer], Layout(layer).KvHeads, Layout(layer).ValueDim, block, head, slot);

        private static Span<double> Vector(double[] array, int heads, int width, int block, int head, int slot) =>
            array.AsSpan(((((block * heads) + head) * BlockTokens) + slot) * width, width);

        public override void Discard() => _isGone = true;

        public override void Restore()
        {
            _isGone = false;
            foreach (double[] array in _keys.Concat(_values))
                Array.Clear(array);
        }

        public override void Dispose() => _isGone = true;
    }

    private sealed class RefRope(ReferenceBackend owner, int positions, int headDim) : RopeTable(positions, headDim)
    {
        private bool _isGone;

        internal override Backend Owner => owner;

        internal override bool IsGone => _isGone;

        public double[,] Cos { get; } = new double[positions, headDim / 2];

        public double[,] Sin { get; } = new double[positions, headDim / 2];

        public override long Bytes => Cos.Length * 2L * sizeof(double);

        public override void Discard() => _isGone = true;

        public override void Restore()
        {
            _isGone = false;
            Array.Clear(Cos);
            Array.Clear(Sin);
        }

        public override void Dispose() => _isGone = true;
    }
}
