using System.Runtime.InteropServices;
using CsCheck;

namespace Rollout.Kernels.Tests;

/// <summary>Weights: written in any pieces, read back, copied, discarded.</summary>
public abstract partial class BackendTests
{
    [Theory]
    [InlineData(DType.BFloat16)]
    [InlineData(DType.Float16)]
    [InlineData(DType.Float32)]
    public void Weights_written_in_any_rows_read_back_rounded_to_nearest_even(DType type)
    {
        Bench bench = New();
        Gen.Select(Gen.Int[2, 100], Gen.Frequency((5, Gen.Int[1, 100]), (1, Gen.Int[250, 600])), Gen.Int[0, 1 << 30]).Sample(
            (outputs, inputs, seed) =>
            {
                Random random = new(seed);
                byte[] bytes = Elements(random, outputs * inputs, type);
                float[] expected = new float[outputs * inputs], actual = new float[outputs * inputs];
                using ReferenceBackend reference = new(Format);
                Weight wanted = reference.AllocateWeight(outputs, inputs);
                reference.WriteWeight(wanted, 0, bytes, type);
                reference.ReadWeight(wanted, 0, expected);

                using Weight weight = bench.Backend.AllocateWeight(outputs, inputs);
                for (int element = 0; element < outputs * inputs;)
                {
                    int count = Math.Min(random.Next(1, 70) * inputs, (outputs * inputs) - element);
                    bench.Backend.WriteWeight(weight, element, bytes.AsSpan(element * type.Size(), count * type.Size()), type);
                    element += count;
                }

                bench.Backend.ReadWeight(weight, 0, actual);
                Bench.SameBits(expected, actual, "whole");
                int from = random.Next(outputs * inputs);
                float[] part = new float[random.Next((outputs * inputs) - from + 1)];
                bench.Backend.ReadWeight(weight, from, part);
                Bench.SameBits(expected.AsSpan(from, part.Length).ToArray(), part, "part");
            },
            iter: 60,
            threads: 1);
    }

    [Theory]
    [InlineData(DType.BFloat16)]
    [InlineData(DType.Float16)]
    [InlineData(DType.Float32)]
    public void Single_elements_written_into_a_copy_are_those_of_a_write_of_the_whole(DType type)
    {
        Bench bench = New();
        Gen.Select(Gen.Int[1, 70], Gen.Int[1, 70], Gen.Int[0, 1 << 30]).Sample(
            (outputs, inputs, seed) =>
            {
                Random random = new(seed);
                int elements = outputs * inputs, size = type.Size();
                byte[] old = Elements(random, elements, type), changed = (byte[])old.Clone();
                int first = random.Next(elements);
                uint[] indices = [.. Enumerable.Range(0, elements - first).Where(_ => random.Next(4) == 0).Select(i => (uint)i)];
                byte[] values = Elements(random, indices.Length, type);
                for (int i = 0; i < indices.Length; i++)
                    values.AsSpan(i * size, size).CopyTo(changed.AsSpan((first + (int)indices[i]) * size));

                using Weight live = bench.Backend.AllocateWeight(outputs, inputs), copy = bench.Backend.AllocateWeight(outputs, inputs);
                using Weight wanted = bench.Backend.AllocateWeight(outputs, inputs);
                bench.Backend.WriteWeight(live, 0, old, type);
                bench.Backend.WriteWeight(wanted, 0, changed, type);
                bench.Backend.CopyWeight(live, copy);
                bench.Backend.WriteWeightElements(copy, first, indices, values, type);
                Bench.SameBits(Read(wanted), Read(copy), "sparse");

                float[] Read(Weight weight)
                {
                    float[] read = new float[elements];
                    bench.Backend.ReadWeight(weight, 0, read);
                    return read;
                }
            },
            iter: 60,
            threads: 1);
    }

    [Fact]
    public void Discarded_memory_is_refused_until_restored_and_then_zero()
    {
        Bench bench = New();
        Backend backend = bench.Backend;
        Weight weight = bench.Weight(64, 1024);
        KvCache cache = bench.Cache(2, 64, 2, 16);
        float[] read = new float[64 * 1024];
        weight.Discard();
        weight.Discard();
        cache.Discard();
        Assert.ThrowsAny<ArgumentException>(() => backend.ReadWeight(weight, 0, read));
        Assert.ThrowsAny<ArgumentException>(() => backend.WriteWeight(weight, 0, new byte[4], DType.Float32));
        Assert.ThrowsAny<ArgumentException>(() => backend.CopyBlock(cache, 0, 1));
        weight.Restore();
        weight.Restore();
        cache.Restore();
        backend.ReadWeight(weight, 0, read);
        Assert.All(read, value => Assert.Equal(0f, value));
        backend.CopyBlock(cache, 0, 1);
    }

    /// <summary>Random bits without infinities and NaN: NaN has many bit patterns, which only bfloat16 keeps.</summary>
    private static byte[] Elements(Random random, int count, DType type)
    {
        byte[] bytes = new byte[count * type.Size()];
        random.NextBytes(bytes);
        for (int i = 0; i < count; i++)
        {
            int top = (i * type.Size()) + type.Size() - 1;
            if ((bytes[top] & 0x7C) == 0x7C)
                bytes[top] &= 0xBF;
        }

        return bytes;
    }

    [Fact]
    public void Weights_round_ties_to_even_keep_infinities_and_nan()
    {
        Bench bench = New();
        float[] source =
        [
            Bits(0x3F808000), Bits(0x3F818000), Bits(0x3F808001), Bits(0x3F807FFF), float.PositiveInfinity, float.NegativeInfinity,
            float.NaN, Bits(0x7F7FFFFF), -0f, float.Epsilon, Bits(0x7F800001),
        ];
        Weight weight = bench.Backend.AllocateWeight(2, source.Length);
        bench.Backend.WriteWeight(weight, source.Length, MemoryMarshal.AsBytes<float>(source), DType.Float32);
        float[] read = new float[source.Length];
        bench.Backend.ReadWeight(weight, source.Length, read);
        float[] expected = Format == WeightFormat.Float32 ? source :
        [
            Bits(0x3F800000), Bits(0x3F820000), Bits(0x3F810000), Bits(0x3F800000), float.PositiveInfinity, float.NegativeInfinity,
            float.NaN, float.PositiveInfinity, -0f, 0f, float.NaN,
        ];
        for (int i = 0; i < expected.Length; i++)
            Assert.True(float.IsNaN(expected[i]) ? float.IsNaN(read[i]) : Same(expected[i], read[i]), $"{i}: {read[i]:R}");

        static float Bits(uint bits) => BitConverter.UInt32BitsToSingle(bits);

        static bool Same(float a, float b) => BitConverter.SingleToInt32Bits(a) == BitConverter.SingleToInt32Bits(b);
    }

    [Theory]
    [InlineData(DType.BFloat16, 0x7F81u, 0xFFFFu)]
    [InlineData(DType.Float16, 0x7C01u, 0xFFFFu)]
    [InlineData(DType.Float32, 0x7F800001u, 0xFFFFFFFFu)]
    [InlineData(DType.Float32, 0xFF800001u, 0x7FFFFFFFu)]
    public void A_weight_that_is_no_number_stays_none_wherever_it_lies(DType type, uint even, uint odd)
    {
        Bench bench = New();
        const int Inputs = 41;
        foreach (int outputs in new[] { 3, 32, 35 })
        {
            byte[] bytes = new byte[outputs * Inputs * type.Size()];
            for (int i = 0; i < outputs * Inputs; i++)
            {
                uint bits = i % 3 == 2 ? 0 : i % 2 == 0 ? even : odd;
                BitConverter.GetBytes(bits).AsSpan(0, type.Size()).CopyTo(bytes.AsSpan(i * type.Size()));
            }

            float[] read = new float[outputs * Inputs];
            using Weight weight = bench.Backend.AllocateWeight(outputs, Inputs);
            bench.Backend.WriteWeight(weight, 0, bytes, type);
            bench.Backend.ReadWeight(weight, 0, read);
            for (int i = 0; i < read.Length; i++)
                Assert.True(i % 3 == 2 ? read[i] == 0f : float.IsNaN(read[i]), $"Element {i} of {outputs} rows: {read[i]}.");
        }
    }

    [Fact]
    public void Weights_take_disjoint_rows_from_several_threads_at_once()
    {
        Bench bench = New();
        const int Outputs = 96, Inputs = 61;
        float[] values = bench.Values(Outputs * Inputs).Select(ReferenceBackend.Round).ToArray();
        for (int round = 0; round < 20; round++)
        {
            Weight weight = bench.Backend.AllocateWeight(Outputs, Inputs);
            int piece = (1 + (round * 2)) * Inputs;
            Thread[] threads = Enumerable.Range(0, 4).Select(t => new Thread(() =>
            {
                for (int start = t * piece; start < values.Length; start += 4 * piece)
                {
                    ReadOnlySpan<float> part = values.AsSpan(start, Math.Min(piece, values.Length - start));
                    bench.Backend.WriteWeight(weight, start, MemoryMarshal.AsBytes(part), DType.Float32);
                }
            })).ToArray();
            Array.ForEach(threads, t => t.Start());
            Array.ForEach(threads, t => t.Join());
            float[] read = new float[values.Length];
            bench.Backend.ReadWeight(weight, 0, read);
            Bench.SameBits(values, read, "weights");
        }
    }

    [Fact]
    public void Vectors_are_kept_in_fp32()
    {
        Bench bench = New();
        float[] values = bench.Values(77), read = new float[77];
        Weight weight = bench.Backend.AllocateWeight(1, 77);
        bench.Backend.WriteWeight(weight, 0, MemoryMarshal.AsBytes<float>(values), DType.Float32);
        bench.Backend.ReadWeight(weight, 0, read);
        Bench.SameBits(values, read, "vector");
    }
}
