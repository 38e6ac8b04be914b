using System.Runtime.InteropServices;
using CsCheck;

namespace Rollout.Kernels.Tests;

/// <summary>bf16 weights with activations rounded to bf16: stored exactly, and computed with equal bits on every path.</summary>
public sealed class BFloat16FastTests
{
    [Theory]
    [InlineData(DType.BFloat16)]
    [InlineData(DType.Float16)]
    [InlineData(DType.Float32)]
    public void Weights_and_single_elements_are_those_of_plain_bf16(DType type)
    {
        using CpuBackend plain = new(1);
        using CpuBackend fast = new(1, 0, WeightFormat.BFloat16Fast);
        Gen.Select(Gen.Int[2, 100], Gen.Int[1, 100], Gen.Int[0, 1 << 30]).Sample(
            (outputs, inputs, seed) =>
            {
                Bench.SameBits(Written(plain), Written(fast), "weights");

                float[] Written(CpuBackend backend)
                {
                    Random random = new(seed);
                    byte[] bytes = Halves(random, outputs * inputs, type);
                    using Weight weight = backend.AllocateWeight(outputs, inputs), copy = backend.AllocateWeight(outputs, inputs);
                    for (int row = 0; row < outputs;)
                    {
                        int count = Math.Min(random.Next(1, 70), outputs - row), size = inputs * type.Size();
                        backend.WriteWeight(weight, (long)row * inputs, bytes.AsSpan(row * size, count * size), type);
                        row += count;
                    }

                    backend.CopyWeight(weight, copy);
                    uint[] indices = [.. Enumerable.Range(0, outputs * inputs).Where(_ => random.Next(5) == 0).Select(i => (uint)i)];
                    backend.WriteWeightElements(copy, 0, indices, Halves(random, indices.Length, type), type);
                    float[] read = new float[outputs * inputs];
                    backend.ReadWeight(copy, 0, read);
                    return read;
                }
            },
            iter: 40,
            threads: 1);
    }

    [Fact]
    public void A_matmul_is_one_chain_over_rounded_activations_to_the_bit_on_every_path()
    {
        foreach ((int inputs, int outputs) in new[] { (1, 5), (2, 33), (127, 33), (128, 64), (301, 70), (1031, 96) })
        {
            const int Rows = 27;
            float[]? expected = null;
            foreach (int bits in new[] { 128, 256, 512 }.Where(CpuBackend.IsAccelerated))
            {
                foreach (int threads in new[] { 1, 2 })
                {
                    using CpuBackend backend = new(threads, bits, WeightFormat.BFloat16Fast);
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

                    // Added to what is there, after the bias.
                    Tensor z = bench.Tensor(Rows, outputs);
                    float[] sum = [.. Bench.Read(z, Rows).Zip(expected, (a, b) => a + b)];
                    backend.MatMulAdd(x, w, bias, z, Rows);
                    Bench.SameBits(sum, Bench.Read(z, Rows), "added");
                }
            }
        }
    }

    [Fact]
    public unsafe void The_portable_tile_equals_the_one_in_hardware()
    {
        Assert.SkipUnless(PairTileCode.IsSupported, "This machine has no AVX512-BF16.");
        const int Pairs = 61, Width = 32;
        using MachineCode code = new(12, PairTileCode.Assemble);
        foreach (PairTile tile in new[] { 128, 256, 512 }.Where(CpuBackend.IsAccelerated).Select(PairTile.Of))
        {
            for (int height = 1; height <= 12; height++)
            {
                Random random = new(height);
                ushort[] x = Normal(random, Pairs * height * 2), w = Normal(random, Pairs * Width * 2);
                float[] one = new float[height * Width], two = new float[height * Width];
                fixed (ushort* a = x, b = w)
                fixed (float* p = one, q = two)
                {
                    PairTileArguments arguments = new() { Activations = a, Panel = (byte*)b, Sums = p, Pairs = Pairs };
                    code.Run(height, &arguments);
                    arguments.Sums = q;
                    tile.Run(height, arguments);
                }

                Bench.SameBits(one, two, $"{height} rows");
            }
        }

        // Magnitudes from 2^-20 to 2^20, both signs: sums cancel and round in every way.
        static ushort[] Normal(Random random, int count) =>
            [.. Enumerable.Range(0, count).Select(_ => (ushort)((random.Next(2) << 15) | (random.Next(107, 147) << 7) | random.Next(128)))];
    }

    [Theory]
    [InlineData(float.NaN)]
    [InlineData(float.NegativeInfinity)]
    public void What_is_not_finite_does_not_become_a_number(float bad)
    {
        foreach (int bits in new[] { 128, 512 }.Where(CpuBackend.IsAccelerated))
        {
            using CpuBackend backend = new(1, bits, WeightFormat.BFloat16Fast);
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
    }

    [Fact]
    public void Its_name_says_so()
    {
        using CpuBackend backend = new(2, 128, WeightFormat.BFloat16Fast);
        Assert.Equal("cpu 128-bit vectors, 2 threads, bf16 activations by multiply-add", backend.Name);
    }

    /// <summary>One chain of fused multiply-adds, the odd input of a pair before the even one; then the bias.</summary>
    private static float[] Reference(float[] x, Weight w, Weight bias, CpuBackend backend, int rows)
    {
        float[] weights = new float[w.Outputs * w.Inputs], biases = new float[w.Outputs], y = new float[rows * w.Outputs];
        backend.ReadWeight(w, 0, weights);
        backend.ReadWeight(bias, 0, biases);
        for (int row = 0; row < rows; row++)
        {
            for (int output = 0; output < w.Outputs; output++)
            {
                float sum = 0f;
                for (int k = 0; k < w.Inputs; k += 2)
                {
                    if (k + 1 < w.Inputs)
                        sum = Next(sum, k + 1);
                    sum = Next(sum, k);
                }

                y[(row * w.Outputs) + output] = sum + biases[output];

                float Next(float sum, int k) =>
                    MathF.FusedMultiplyAdd(ReferenceBackend.Round(x[(row * w.Inputs) + k]), weights[(output * w.Inputs) + k], sum);
            }
        }

        return y;
    }

    private static byte[] Halves(Random random, int count, DType type)
    {
        byte[] bytes = new byte[count * type.Size()];
        for (int i = 0; i < count; i++)
        {
            float value = random.NextSingle() - 0.5f;
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
