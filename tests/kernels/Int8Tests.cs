using System.Runtime.InteropServices;
using CsCheck;

namespace Rollout.Kernels.Tests;

/// <summary>int8 weights: what is stored and computed, to the bit, on every path; and the error against the original weights.</summary>
public sealed class Int8Tests
{
    private const int Block = 128;

    [Theory]
    [InlineData(DType.BFloat16)]
    [InlineData(DType.Float16)]
    [InlineData(DType.Float32)]
    public void Rows_written_in_any_order_read_back_rounded_to_their_scale(DType type)
    {
        using CpuBackend backend = new(1, 0, WeightFormat.Int8);
        Gen.Select(Gen.Int[2, 100], Gen.Int[1, 300], Gen.Int[0, 1 << 30]).Sample(
            (outputs, inputs, seed) =>
            {
                Random random = new(seed);
                float[] values = [.. Enumerable.Range(0, outputs * inputs).Select(_ => Random(random))];
                using Weight weight = backend.AllocateWeight(outputs, inputs);
                List<(int First, int Count)> pieces = [];
                for (int first = 0; first < outputs;)
                {
                    int count = Math.Min(random.Next(1, 70), outputs - first);
                    pieces.Add((first, count));
                    first += count;
                }

                foreach ((int first, int count) in pieces.OrderBy(_ => random.Next()))
                    backend.WriteWeight(weight, (long)first * inputs, Bytes(values.AsSpan(first * inputs, count * inputs), type), type);
                float[] read = new float[outputs * inputs];
                backend.ReadWeight(weight, 0, read);
                for (int output = 0; output < outputs; output++)
                {
                    float[] row = [.. values.AsSpan(output * inputs, inputs).ToArray().Select(ReferenceBackend.Round)];
                    Bench.SameBits(Stored(row, out _), Bench.Row(read, inputs, output), $"row {output}");
                }
            },
            iter: 40,
            threads: 1);
    }

    [Fact]
    public void A_matmul_is_the_quantised_sum_to_the_bit_on_every_path()
    {
        foreach ((int inputs, int outputs) in new[] { (1, 5), (127, 33), (128, 64), (301, 70), (1030, 96) })
        {
            const int Rows = 27;
            float[]? expected = null;
            foreach (int bits in new[] { 128, 256, 512 }.Where(CpuBackend.IsAccelerated))
            {
                foreach (int threads in new[] { 1, 2 })
                {
                    using CpuBackend backend = new(threads, bits, WeightFormat.Int8);
                    Bench bench = new(backend, inputs);
                    Weight w = bench.Weight(outputs, inputs), bias = bench.Weight(1, outputs);
                    Tensor x = bench.Tensor(Rows, inputs), y = backend.AllocateTensor(Rows, outputs);
                    expected ??= Reference(Bench.Read(x, Rows), w, bias, backend, Rows);
                    for (int rows = Rows; rows > 0; rows--)
                    {
                        backend.MatMul(x, w, bias, y, rows);
                        Bench.SameBits(
                            expected[..(rows * outputs)], Bench.Read(y, rows), $"{backend.Name}, {inputs} inputs, {rows} rows");
                    }
                }
            }
        }
    }

    /// <summary>The tile in C# that machines without the dot product in hardware run, at the widths this machine has.</summary>
    [Theory]
    [InlineData(128)]
    [InlineData(256)]
    [InlineData(512)]
    public unsafe void The_portable_tile_equals_a_scalar_one(int vectorBits)
    {
        Assert.SkipUnless(CpuBackend.IsAccelerated(vectorBits), $"This machine has no {vectorBits}-bit vectors.");
        const int Blocks = 3, Groups = 7, Width = 32;
        Int8Tile tile = Int8Tile.Of(vectorBits);
        for (int height = 1; height <= Int8MatMulJob.TileRows; height++)
        {
            Random random = new(height);
            sbyte[] activations = [.. Enumerable.Range(0, Blocks * Groups * height * 4).Select(_ => (sbyte)random.Next(-128, 128))];
            byte[] panel = [.. Enumerable.Range(0, Blocks * Groups * Width * 4).Select(_ => (byte)random.Next(256))];
            int[] corrections = [.. Enumerable.Range(0, Blocks * height).Select(_ => random.Next(-100_000, 100_000))];
            float[] scales = [.. Enumerable.Range(0, Blocks * height).Select(_ => random.NextSingle())];
            float[] sums = new float[height * Width], expected = new float[height * Width];
            for (int block = 0; block < Blocks; block++)
            {
                for (int row = 0; row < height; row++)
                {
                    for (int o = 0; o < Width; o++)
                    {
                        int sum = corrections[(block * height) + row];
                        for (int g = block * Groups; g < (block + 1) * Groups; g++)
                        {
                            for (int i = 0; i < 4; i++)
                                sum += activations[(((g * height) + row) * 4) + i] * panel[(((g * Width) + o) * 4) + i];
                        }

                        ref float into = ref expected[(row * Width) + o];
                        into = MathF.FusedMultiplyAdd(sum, scales[(block * height) + row], into);
                    }
                }
            }

            fixed (sbyte* a = activations)
            fixed (byte* p = panel)
            fixed (int* c = corrections)
            fixed (float* s = scales, y = sums)
            {
                Int8TileArguments arguments = new()
                {
                    Activations = a,
                    Panel = p,
                    Corrections = c,
                    Scales = s,
                    Sums = y,
                    Blocks = Blocks,
                    GroupsPerBlock = Groups,
                };
                tile.Run(height, ref arguments);
            }

            Bench.SameBits(expected, sums, $"{height} rows");
        }
    }

    [Fact]
    public void A_matmul_stays_within_the_error_of_eight_bits()
    {
        // Each factor is off by at most half a step of 1/127 of the largest of its row or block; errors of 896 products add up like noise.
        const int Rows = 12, Inputs = 896, Outputs = 64;
        using CpuBackend backend = new(2, 0, WeightFormat.Int8);
        Bench bench = new(backend);
        using ReferenceBackend reference = new();
        Bench wanted = new(reference);
        float[] expected = Run(wanted), actual = Run(bench);
        double scale = Math.Sqrt(expected.Average(v => v * v));
        double error = Math.Sqrt(expected.Zip(actual, (a, b) => (a - b) * (a - b)).Average());
        Assert.InRange(error / scale, 1e-4, 0.01);

        static float[] Run(Bench bench)
        {
            Weight w = bench.Weight(Outputs, Inputs);
            Tensor x = bench.Tensor(Rows, Inputs), y = bench.Backend.AllocateTensor(Rows, Outputs);
            bench.Backend.MatMul(x, w, null, y, Rows);
            return Bench.Read(y, Rows);
        }
    }

    [Theory]
    [InlineData(float.NaN)]
    [InlineData(float.PositiveInfinity)]
    public void What_is_not_finite_does_not_become_a_number(float bad)
    {
        using CpuBackend backend = new(1, 0, WeightFormat.Int8);
        Bench bench = new(backend);
        Weight w = bench.Weight(40, 200);
        float[] values = bench.Values(3 * 200);
        values[200 + 150] = bad;
        Tensor x = bench.Tensor(200, values), y = backend.AllocateTensor(3, 40);
        backend.MatMul(x, w, null, y, 3);
        float[] read = Bench.Read(y, 3);
        Assert.All(Bench.Row(read, 40, 0), value => Assert.True(float.IsFinite(value)));
        Assert.All(Bench.Row(read, 40, 1), value => Assert.False(float.IsFinite(value)));
        Assert.All(Bench.Row(read, 40, 2), value => Assert.True(float.IsFinite(value)));
    }

    [Fact]
    public void Rows_of_zeros_and_of_the_smallest_numbers_are_zero()
    {
        using CpuBackend backend = new(1, 0, WeightFormat.Int8);
        Bench bench = new(backend);
        Weight w = backend.AllocateWeight(2, 200);
        backend.WriteWeight(
            w, 0, MemoryMarshal.AsBytes<float>([.. new float[200], .. Enumerable.Repeat(float.Epsilon, 200)]), DType.Float32);
        Tensor x = bench.Tensor(200, [.. bench.Values(200), .. Enumerable.Repeat(float.Epsilon, 200)]), y = backend.AllocateTensor(2, 2);
        backend.MatMul(x, w, null, y, 2);
        Assert.All(Bench.Read(y, 2), value => Assert.Equal(0f, value));
    }

    [Fact]
    public void Embeddings_copies_and_names_are_those_of_int8()
    {
        using CpuBackend backend = new(2, 128, WeightFormat.Int8);
        Bench bench = new(backend);
        Weight table = bench.Weight(50, 90), copy = backend.AllocateWeight(50, 90);
        backend.CopyWeight(table, copy);
        StepLayout step = Bench.Step(1, 1, _ => (0, 3), (_, _) => 0);
        (step.TokenIds[0], step.TokenIds[1], step.TokenIds[2]) = (49, 0, 31);
        Tensor output = backend.AllocateTensor(3, 90);
        float[] row = new float[90];
        backend.BeginStep(step);
        backend.Embed(copy, output);
        for (int i = 0; i < 3; i++)
        {
            backend.ReadWeight(table, step.TokenIds[i] * 90, row);
            Bench.SameBits(row, Bench.Row(Bench.Read(output, 3), 90, i), $"row {i}");
        }

        Assert.Equal(WeightFormat.Int8, backend.WeightFormat);
        Assert.Equal("cpu 128-bit vectors, 2 threads, int8 weights by multiply-add", backend.Name);
        Assert.Throws<NotSupportedException>(() => backend.WriteWeightElements(table, 0, [1], new byte[2], DType.BFloat16));
        Assert.InRange(backend.AllocateWeight(3200, 1024).Bytes, 3200 * 1024, 3200 * 1024 * 1.01);
    }

    [Theory]
    [InlineData(WeightFormat.BFloat16Fast)]
    [InlineData(WeightFormat.Int8)]
    public void A_matmul_allocates_nothing_managed(WeightFormat format)
    {
        using CpuBackend backend = new(2, 0, format);
        Bench bench = new(backend);
        Weight w = bench.Weight(200, 300), bias = bench.Weight(1, 200);
        Tensor x = bench.Tensor(30, 300), y = backend.AllocateTensor(30, 200);
        for (int i = 0; i < 100; i++)
            backend.MatMul(x, w, bias, y, 1 + (i % 30));
        long before = GC.GetAllocatedBytesForCurrentThread();
        for (int rows = 1; rows <= 30; rows++)
            backend.MatMul(x, w, bias, y, rows);
        Assert.Equal(before, GC.GetAllocatedBytesForCurrentThread());
    }

    /// <summary>Scalar arithmetic after the definition: block sums in integers, one chain of multiply-adds, scale, bias.</summary>
    private static float[] Reference(float[] x, Weight w, Weight bias, CpuBackend backend, int rows)
    {
        float[] weights = new float[w.Outputs * w.Inputs], biases = new float[w.Outputs], y = new float[rows * w.Outputs];
        backend.ReadWeight(w, 0, weights);
        backend.ReadWeight(bias, 0, biases);
        for (int row = 0; row < rows; row++)
        {
            for (int output = 0; output < w.Outputs; output++)
            {
                int[] q = Quantised(Bench.Row(weights, w.Inputs, output), out float weightScale);
                float sum = 0f;
                for (int first = 0; first < w.Inputs; first += Block)
                {
                    int count = Math.Min(Block, w.Inputs - first);
                    int[] a = Quantised(x.AsSpan((row * w.Inputs) + first, count).ToArray(), out float scale);
                    sum = MathF.FusedMultiplyAdd(Enumerable.Range(0, count).Sum(k => a[k] * q[first + k]), scale, sum);
                }

                y[(row * w.Outputs) + output] = (sum * weightScale) + biases[output];
            }
        }

        return y;
    }

    private static float[] Stored(float[] row, out float scale)
    {
        int[] q = Quantised(row, out float s);
        scale = s;
        return [.. q.Select(v => v * s)];
    }

    private static int[] Quantised(float[] values, out float scale)
    {
        float largest = values.Max(MathF.Abs);
        scale = largest / 127f;
        float inverse = largest > 1e-36f ? 127f / largest : 0f;
        return [.. values.Select(v => (int)MathF.Round(v * inverse, MidpointRounding.ToEven))];
    }

    private static float Random(Random random) => (random.NextSingle() - 0.5f) * MathF.Pow(2f, random.Next(-6, 3));

    private static byte[] Bytes(ReadOnlySpan<float> values, DType type)
    {
        byte[] bytes = new byte[values.Length * type.Size()];
        for (int i = 0; i < values.Length; i++)
        {
            // Numbers that all three types have.
            float value = ReferenceBackend.Round(values[i]);
            Span<byte> element = bytes.AsSpan(i * type.Size());
            if (type == DType.BFloat16)
                MemoryMarshal.Write(element, (ushort)(BitConverter.SingleToUInt32Bits(value) >> 16));
            else if (type == DType.Float16)
                MemoryMarshal.Write(element, (Half)value);
            else
                MemoryMarshal.Write(element, value);
        }

        return bytes;
    }
}
