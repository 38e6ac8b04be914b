namespace Rollout.Kernels.Tests;

/// <summary>Its memory: arrays of float64, and of what weights are rounded to.</summary>
public sealed partial class ReferenceBackend
{
    private interface IOwned
    {
        ReferenceBackend? Maker { get; }

        bool Alive { get; }
    }

    private sealed class RefTensor(int rows, int columns) : Tensor(rows, columns), IOwned
    {
        private readonly double[] _data = new double[rows * columns];

        public ReferenceBackend? Maker { get; init; }

        public bool Alive { get; private set; } = true;

        public override long Bytes => _data.Length * sizeof(double);

        public double this[int row, int column]
        {
            get => _data[(row * Columns) + column];
            set => _data[(row * Columns) + column] = value;
        }

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

        public override void Discard() => Alive = false;

        public override void Restore()
        {
            Alive = true;
            Array.Clear(_data);
        }

        public override void Dispose() => Alive = false;
    }

    private sealed class RefWeight(int outputs, int inputs) : Weight(outputs, inputs), IOwned
    {
        public float[] Data { get; } = new float[outputs * inputs];

        public ReferenceBackend? Maker { get; init; }

        public bool Alive { get; private set; } = true;

        public override long Bytes => Data.Length * sizeof(float);

        public float this[int output, int input] => Data[(output * Inputs) + input];

        public override void Discard() => Alive = false;

        public override void Restore()
        {
            Alive = true;
            Array.Clear(Data);
        }

        public override void Dispose() => Alive = false;
    }

    private sealed class RefCache(int layers, int blocks, int kvHeads, int headDim) : KvCache(layers, blocks, kvHeads, headDim), IOwned
    {
        public double[,,,,] Keys { get; } = new double[layers, blocks, kvHeads, BlockTokens, headDim];

        public double[,,,,] Values { get; } = new double[layers, blocks, kvHeads, BlockTokens, headDim];

        public ReferenceBackend? Maker { get; init; }

        public bool Alive { get; private set; } = true;

        public override long Bytes => Keys.Length * 2L * sizeof(double);

        public override void Discard() => Alive = false;

        public override void Restore()
        {
            Alive = true;
            Array.Clear(Keys);
            Array.Clear(Values);
        }

        public override void Dispose() => Alive = false;
    }

    private sealed class RefRope(int positions, int headDim) : RopeTable(positions, headDim), IOwned
    {
        public double[,] Cos { get; } = new double[positions, headDim / 2];

        public double[,] Sin { get; } = new double[positions, headDim / 2];

        public ReferenceBackend? Maker { get; init; }

        public bool Alive { get; private set; } = true;

        public override long Bytes => Cos.Length * 2L * sizeof(double);

        public override void Discard() => Alive = false;

        public override void Restore()
        {
            Alive = true;
            Array.Clear(Cos);
            Array.Clear(Sin);
        }

        public override void Dispose() => Alive = false;
    }
}
