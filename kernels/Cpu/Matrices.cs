namespace Rollout.Kernels;

/// <summary>
/// One way to store matrices [outputs, inputs] and to multiply by them: a <see cref="WeightFormat"/> on the CPU. Stored data is one block
/// of memory, aligned to cache lines; rows are stored in panels of 32 outputs.
/// </summary>
internal abstract unsafe class Matrices : IDisposable
{
    /// <summary>Elements of a matrix below which waking the other threads costs more than it saves.</summary>
    protected const long SmallWork = 8192;

    public static Matrices Of(WeightFormat format, int vectorBits) => format switch
    {
        WeightFormat.BFloat16 => new BFloat16Matrices(vectorBits),
        WeightFormat.BFloat16Fast => new PairMatrices(vectorBits),
        WeightFormat.Int8 => new Int8Matrices(vectorBits),
        _ => throw new ArgumentOutOfRangeException(nameof(format)),
    };

    /// <summary>The format's part of the backend's name; empty for the default.</summary>
    public abstract string Description { get; }

    /// <summary>Bytes of a stored matrix.</summary>
    public abstract long Bytes(int outputs, int inputs);

    /// <summary>Bytes that a matmul needs for its input in the form its tiles read.</summary>
    public abstract long PackedBytes(int rows, int inputs);

    /// <summary>Stores whole rows from <paramref name="output"/> on. Writers of different rows never touch each other's bytes.</summary>
    public abstract void Write(byte* data, int outputs, int inputs, int output, byte* source, long rows, DType type);

    /// <summary>Part of one row as fp32.</summary>
    public abstract void ReadRow(byte* data, int outputs, int inputs, int output, int first, int count, float* destination);

    /// <summary>Stores one element, exactly as a write of its row would have.</summary>
    /// <exception cref="NotSupportedException">Elements of this format cannot be changed alone.</exception>
    public abstract void WriteElement(byte* data, int inputs, long element, byte* source, DType type);

    /// <summary>output = input x matrix (+ bias), or added to it. Strides in floats; <paramref name="packed"/> is scratch.</summary>
    public abstract void Multiply(Workers workers, in MatMulArguments arguments, byte* packed);

    public virtual void Dispose()
    {
    }

    /// <summary>Elements of the row-major matrix as fp32, from element <paramref name="element"/> on.</summary>
    public void Read(byte* data, int outputs, int inputs, long element, Span<float> destination)
    {
        fixed (float* values = destination)
        {
            for (int done = 0; done < destination.Length;)
            {
                int first = (int)((element + done) % inputs);
                int count = Math.Min(inputs - first, destination.Length - done);
                ReadRow(data, outputs, inputs, (int)((element + done) / inputs), first, count, values + done);
                done += count;
            }
        }
    }
}

/// <summary>One matmul of any format: pointers to fp32 but for the stored matrix, strides in floats.</summary>
internal unsafe struct MatMulArguments
{
    public float* Input;
    public int InputStride;
    public int Rows;
    public byte* Matrix;
    public int Outputs;
    public int Inputs;

    /// <summary>[outputs padded to 32], or null.</summary>
    public float* Bias;

    public float* Output;
    public int OutputStride;

    /// <summary>Added to what the output holds.</summary>
    public bool Add;
}
