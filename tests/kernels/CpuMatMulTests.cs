using System.Runtime.InteropServices;

namespace Rollout.Kernels.Tests;

/// <summary>The CPU's matmuls to the bit, at the borders of tiles, panels and chunks; and the memory that they may touch.</summary>
public sealed unsafe class CpuMatMulTests
{
    [Fact]
    public void A_matmul_is_one_chain_of_multiply_adds_to_the_bit_on_every_path()
    {
        const int Rows = 27;
        foreach ((int inputs, int outputs) in new[] { (1, 2), (3, 31), (4, 32), (511, 33), (512, 64), (513, 70), (1024, 5), (1031, 65) })
        {
            Bench random = new(new ReferenceBackend(), inputs);
            float[] x = random.Values(Rows * inputs), z = random.Values(Rows * outputs), bias = random.Values(outputs);
            float[] weights = [.. random.Values(outputs * inputs).Select(ReferenceBackend.Round)];
            float[] expected = Reference(x, weights, Rows, inputs, outputs);
            float[] biased = [.. expected.Select((sum, i) => sum + bias[i % outputs])], added = [.. biased.Select((sum, i) => z[i] + sum)];
            foreach (int bits in new[] { 128, 256, 512 }.Where(CpuBackend.IsAccelerated))
            {
                foreach (int threads in new[] { 1, 3 })
                {
                    using CpuBackend backend = new(threads, bits);
                    Bench bench = new(backend);
                    Weight w = backend.AllocateWeight(outputs, inputs), b = backend.AllocateWeight(1, outputs);
                    backend.WriteWeight(w, 0, MemoryMarshal.AsBytes<float>(weights), DType.Float32);
                    backend.WriteWeight(b, 0, MemoryMarshal.AsBytes<float>(bias), DType.Float32);
                    Tensor input = bench.Tensor(inputs, x), y = backend.AllocateTensor(Rows, outputs);
                    for (int rows = Rows; rows > 0; rows--)
                    {
                        string what = $"{backend.Name}, {inputs} inputs, {rows} rows";
                        backend.MatMul(input, w, null, y, rows);
                        Bench.SameBits(expected[..(rows * outputs)], Bench.Read(y, rows), what);
                    }

                    backend.MatMul(input, w, b, y, Rows);
                    Bench.SameBits(biased, Bench.Read(y, Rows), "with a bias");
                    y.Write(Rows, z);
                    backend.MatMulAdd(input, w, b, y, Rows - 1);
                    Bench.SameBits([.. added[..^outputs], .. z[^outputs..]], Bench.Read(y, Rows), "added, and no row more");
                }
            }
        }
    }

    /// <summary>The packed input stays within its scratch, and nothing after it is written.</summary>
    [Theory]
    [InlineData(WeightFormat.BFloat16)]
    [InlineData(WeightFormat.BFloat16Fast)]
    [InlineData(WeightFormat.Int8)]
    public void A_matmul_touches_nothing_beyond_its_room(WeightFormat format)
    {
        const int Guard = 4096;
        const byte Pattern = 0xA7;
        foreach (int bits in new[] { 128, 256, 512 }.Where(CpuBackend.IsAccelerated))
        {
            using Matrices matrices = Matrices.Of(format, bits);
            using Workers workers = new(2);
            foreach (int rows in new[] { 1, 2, 3, 4, 5, 7, 11, 12, 13, 24, 25, 31 })
            {
                foreach (int inputs in new[] { 1, 2, 3, 5, 127, 128, 129, 301, 512, 515 })
                {
                    const int Outputs = 33, Stride = 64;
                    long packedBytes = matrices.PackedBytes(rows, inputs), matrixBytes = matrices.Bytes(Outputs, inputs);
                    int inputStride = PanelLayout.RoundUp(inputs);
                    using NativeBuffer packed = new(packedBytes + Guard), matrix = new(matrixBytes + Guard);
                    using NativeBuffer x = new((long)rows * inputStride * sizeof(float));
                    using NativeBuffer y = new(((long)rows * Stride * sizeof(float)) + Guard);
                    using NativeBuffer source = new(Outputs * inputs * sizeof(float));
                    Fill(packed, packedBytes);
                    Fill(matrix, matrixBytes);
                    Fill(y, (long)rows * Stride * sizeof(float));
                    matrices.Write(matrix.Pointer, Outputs, inputs, 0, source.Pointer, Outputs, DType.Float32);
                    MatMulArguments arguments = new()
                    {
                        Input = x.Floats,
                        InputStride = inputStride,
                        Rows = rows,
                        Matrix = matrix.Pointer,
                        Outputs = Outputs,
                        Inputs = inputs,
                        Output = y.Floats,
                        OutputStride = Stride,
                    };
                    matrices.Multiply(workers, arguments, packed.Pointer);
                    Check(packed, packedBytes, $"input of {rows} rows, {inputs} inputs");
                    Check(matrix, matrixBytes, $"matrix of {inputs} inputs");
                    Check(y, (long)rows * Stride * sizeof(float), $"output of {rows} rows");
                }
            }
        }

        static void Fill(NativeBuffer buffer, long from) => new Span<byte>(buffer.Pointer + from, Guard).Fill(Pattern);

        static void Check(NativeBuffer buffer, long from, string what) =>
            Assert.True(new Span<byte>(buffer.Pointer + from, Guard).IndexOfAnyExcept(Pattern) < 0, $"Beyond the {what}.");
    }

    /// <summary>The scratch for a matmul's input grows with the tensors; memory allocated before and after it is unchanged.</summary>
    [Theory]
    [InlineData(WeightFormat.BFloat16)]
    [InlineData(WeightFormat.BFloat16Fast)]
    [InlineData(WeightFormat.Int8)]
    public void A_matmul_of_the_largest_tensor_changes_no_other(WeightFormat format)
    {
        const int Outputs = 40;
        using CpuBackend backend = new(2, 0, format);
        Bench bench = new(backend);
        List<(Tensor Tensor, float[] Values)> others = [];
        foreach (int inputs in new[] { 64, 2048, 2500, 3000 })
        {
            const int Rows = 500;
            float[] values = bench.Values(Rows * inputs);
            for (int i = 0; i < 3; i++)
                others.Add((bench.Tensor(inputs, values), values));
            Weight w = bench.Weight(Outputs, inputs);
            backend.MatMul(others[^1].Tensor, w, null, backend.AllocateTensor(Rows, Outputs), Rows);
            foreach ((Tensor tensor, float[] expected) in others)
                Assert.Equal(expected, Bench.Read(tensor, Rows));
        }
    }

    /// <summary>Packing uses scratch that the thread keeps: nothing of one matrix may get into the next.</summary>
    [Theory]
    [InlineData(WeightFormat.BFloat16)]
    [InlineData(WeightFormat.BFloat16Fast)]
    [InlineData(WeightFormat.Int8)]
    public void A_matrix_of_infinities_leaves_nothing_in_the_next(WeightFormat format)
    {
        using CpuBackend backend = new(1, 0, format);
        Bench bench = new(backend);
        float[] bad = [.. Enumerable.Repeat(float.PositiveInfinity, 64 * 700)];
        foreach (int inputs in new[] { 1, 3, 33, 129, 131, 257 })
        {
            backend.WriteWeight(backend.AllocateWeight(64, 700), 0, MemoryMarshal.AsBytes<float>(bad), DType.Float32);
            Weight w = bench.Weight(37, inputs);
            Tensor y = backend.AllocateTensor(5, 37);
            backend.MatMul(bench.Tensor(5, inputs), w, null, y, 5);
            Assert.All(Bench.Read(y, 5), value => Assert.True(float.IsFinite(value), $"{inputs} inputs: {value}"));
        }
    }

    [Theory]
    [InlineData(0x7F800001u)]
    [InlineData(0xFF800001u)]
    [InlineData(0x7FFFFFFFu)]
    [InlineData(0xFFFFFFFFu)]
    [InlineData(0x7FC00000u)]
    public void An_activation_that_is_no_number_is_in_every_output_of_its_row_in_every_format(uint poison)
    {
        const int Inputs = 277;
        foreach (WeightFormat format in new[] { WeightFormat.BFloat16, WeightFormat.BFloat16Fast, WeightFormat.Int8 })
        {
            foreach (int bits in new[] { 128, 256, 512 }.Where(CpuBackend.IsAccelerated))
            {
                using CpuBackend backend = new(1, bits, format);
                Bench bench = new(backend);
                Weight w = bench.Weight(40, Inputs);
                float[] x = bench.Values(3 * Inputs);
                Tensor y = backend.AllocateTensor(3, 40);
                foreach (int at in new[] { 0, 1, 7, 8, 15, 16, 127, 128, 130, 255, 256, 271, 272, 275, 276 })
                {
                    float kept = x[Inputs + at];
                    x[Inputs + at] = BitConverter.UInt32BitsToSingle(poison);
                    using Tensor input = bench.Tensor(Inputs, x);
                    x[Inputs + at] = kept;
                    backend.MatMul(input, w, null, y, 3);
                    float[] read = Bench.Read(y, 3);
                    Assert.All(Bench.Row(read, 40, 1), value => Assert.True(float.IsNaN(value), $"{format}, input {at}"));
                    Assert.All([.. read[..40], .. read[80..]], value => Assert.True(float.IsFinite(value), $"{format}, input {at}"));
                }
            }
        }
    }

    [Fact]
    public void Activations_half_way_between_two_of_bf16_are_rounded_to_the_even_one()
    {
        const int Inputs = 29;
        foreach (int bits in new[] { 128, 256, 512 }.Where(CpuBackend.IsAccelerated))
        {
            using CpuBackend backend = new(1, bits, WeightFormat.BFloat16Fast);
            Bench bench = new(backend);
            Weight unit = backend.AllocateWeight(Inputs, Inputs);
            float[] ones = [.. Enumerable.Range(0, Inputs * Inputs).Select(i => i % (Inputs + 1) == 0 ? 1f : 0f)];
            backend.WriteWeight(unit, 0, MemoryMarshal.AsBytes<float>(ones), DType.Float32);
            foreach (uint low in new[] { 0x7FFFu, 0x8000u, 0x8001u })
            {
                IEnumerable<uint> high = Enumerable.Range(0, Inputs).Select(i => (uint)(0x3F00 + i + (i % 3 << 15)));
                float[] x = [.. high.Select(bits => BitConverter.UInt32BitsToSingle(bits << 16 | low))];
                Tensor y = backend.AllocateTensor(1, Inputs);
                backend.MatMul(bench.Tensor(Inputs, x), unit, null, y, 1);
                Bench.SameBits([.. x.Select(ReferenceBackend.Round)], Bench.Read(y, 1), $"{low:X}");
            }
        }
    }

    /// <summary>One chain of fused multiply-adds over ascending inputs.</summary>
    private static float[] Reference(float[] x, float[] weights, int rows, int inputs, int outputs)
    {
        float[] y = new float[rows * outputs];
        for (int row = 0; row < rows; row++)
        {
            for (int output = 0; output < outputs; output++)
            {
                float sum = 0f;
                for (int k = 0; k < inputs; k++)
                    sum = MathF.FusedMultiplyAdd(x[(row * inputs) + k], weights[(output * inputs) + k], sum);
                y[(row * outputs) + output] = sum;
            }
        }

        return y;
    }
}
