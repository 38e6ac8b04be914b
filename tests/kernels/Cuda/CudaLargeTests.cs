using System.Runtime.InteropServices;
using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>Models and caches of a real size: offsets past 2^31 elements, 2^32 bytes and the size of the staging buffer.</summary>
public sealed class CudaLargeTests
{
    private const int Staged = 8 << 20; // bytes of a weight that are staged at a time

    /// <summary>
    /// Tokens of a prompt and of decoding sequences, in the first and last blocks of 18 GB of keys and values, and in copies of such
    /// blocks.
    /// </summary>
    [Fact]
    public void Keys_and_values_past_four_gigabytes_are_those_of_a_small_cache()
    {
        SimulatedDevice.RequireSimulated();
        using IDisposable room = SimulatedDevice.WithBytes(24L << 30);
        using CudaBackend backend = new(0);
        const int KvHeads = 8, HeadDim = 128, Large = 140_000, Columns = 3 * KvHeads * HeadDim;
        Bench bench = new(backend, 2);
        RopeTable rope = bench.Rope(HeadDim, 32);
        float[] values = bench.Values(20 * Columns);
        float[]? expected = null;
        foreach (int[] blocks in (int[][])[[0, 1, 2, 3], [Large - 1, Large - 2, 65_536, 131_072], [131_071, 5, Large - 1, 70_000]])
        {
            using KvCache cache = bench.Cache(1, blocks.Max() < 4 ? 4 : Large, KvHeads, HeadDim);
            List<float> results = [.. Run(0, 17, blocks[0], blocks[1])];
            backend.CopyBlock(cache, blocks[0], blocks[2]);
            backend.CopyBlock(cache, blocks[1], blocks[3]);
            results.AddRange(Run(17, 18, blocks[2], blocks[3]));
            results.AddRange(Run(18, 20, blocks[2], blocks[3]));
            expected ??= [.. results];
            Bench.SameBits(expected, [.. results], $"blocks from {blocks[0]} on");

            float[] Run(int from, int to, int first, int second)
            {
                backend.BeginStep(Bench.Step(1, 2, _ => (from, to), (_, b) => b == 0 ? first : second));
                using Tensor x = bench.Tensor(Columns, values[(from * Columns)..(to * Columns)]);
                using Tensor output = backend.AllocateTensor(to - from, KvHeads * HeadDim);
                bench.Attend(x, KvHeads, rope, cache, 0, output, 0.1f);
                return Bench.Read(output, to - from);
            }
        }
    }

    /// <summary>The last rows of a table of 5 GB, and single elements further back than 2^31.</summary>
    [Fact]
    public void Rows_past_four_gigabytes_of_a_table_are_written_read_and_embedded()
    {
        SimulatedDevice.RequireSimulated();
        using IDisposable room = SimulatedDevice.WithBytes(24L << 30);
        using CudaBackend backend = new(0);
        const int Vocabulary = 300_000, Hidden = 8192;
        using Weight table = backend.AllocateWeight(Vocabulary, Hidden);
        int[] tokens = [0, 131_071, 131_072, 262_143, 262_144, Vocabulary - 1]; // around 2^31 and 2^32 bytes, and 2^31 elements
        foreach (int token in tokens)
        {
            float[] row = [.. Enumerable.Range(0, Hidden).Select(i => (float)(token % 251))];
            backend.WriteWeight(table, (long)token * Hidden, MemoryMarshal.AsBytes<float>(row), DType.Float32);
        }

        uint[] indices = [7, 131_072u * Hidden, 262_144u * Hidden, ((Vocabulary - 1u) * Hidden) + 9];
        backend.WriteWeightElements(table, 0, indices, MemoryMarshal.AsBytes<float>([1000f, 1000f, 1000f, 1000f]), DType.Float32);
        StepLayout step = Bench.Step(1, 1, _ => (0, tokens.Length), (_, _) => 0);
        tokens.CopyTo(step.TokenIds, 0);
        backend.BeginStep(step);
        using Tensor output = backend.AllocateTensor(tokens.Length, Hidden);
        backend.Embed(table, output);
        float[] found = Bench.Read(output, tokens.Length), read = new float[Hidden];
        for (int t = 0; t < tokens.Length; t++)
        {
            float[] expected =
            [
                .. Enumerable.Range(0, Hidden)
                    .Select(i => indices.Contains((uint)((tokens[t] * (long)Hidden) + i)) ? 1000f : tokens[t] % 251),
            ];
            Bench.SameBits(expected, Bench.Row(found, Hidden, t), $"token {tokens[t]}");
            backend.ReadWeight(table, (long)tokens[t] * Hidden, read);
            Bench.SameBits(expected, read, $"row {tokens[t]}");
        }
    }

    /// <summary>Real tensors are larger than the staging buffer: they are written in pieces, each to its own place.</summary>
    [Theory]
    [InlineData(DType.BFloat16)]
    [InlineData(DType.Float32)]
    public void A_write_of_more_than_is_staged_at_a_time_reaches_every_row(DType type)
    {
        SimulatedDevice.Require();
        using CudaBackend backend = new(0);
        const int Inputs = 8192;
        int outputs = (Staged / type.Size() / Inputs) + 2, first = 1;
        using Weight weight = backend.AllocateWeight(outputs + first, Inputs);
        ushort[] values =
            [.. Enumerable.Range(0, outputs * Inputs).Select(i => (ushort)(0x3F80 + ((i / Inputs) + (i % Inputs % 7)) % 128))];
        byte[] source = type == DType.BFloat16
            ? MemoryMarshal.AsBytes<ushort>(values).ToArray()
            : MemoryMarshal.AsBytes<float>([.. values.Select(value => BitConverter.UInt32BitsToSingle((uint)value << 16))]).ToArray();
        backend.WriteWeight(weight, first * Inputs, source, type);
        float[] read = new float[(outputs + first) * Inputs];
        backend.ReadWeight(weight, 0, read);
        Assert.All(read[..Inputs], value => Assert.Equal(0f, value));
        Bench.SameBits([.. values.Select(value => BitConverter.UInt32BitsToSingle((uint)value << 16))], read[(first * Inputs)..], "rows");
    }

    [Fact]
    public void Single_elements_of_more_than_is_staged_at_a_time_all_reach_their_places()
    {
        SimulatedDevice.Require();
        using CudaBackend backend = new(0);
        const int Count = (Staged / sizeof(uint)) + 300, Inputs = 1 << 12;
        using Weight weight = backend.AllocateWeight((Count / Inputs) + 2, Inputs);
        uint[] indices = [.. Enumerable.Range(0, Count).Select(i => (uint)(Count - 1 - i))];
        ushort[] values = [.. Enumerable.Range(0, Count).Select(i => (ushort)(i % 0x7F00))];
        backend.WriteWeightElements(weight, 5, indices, MemoryMarshal.AsBytes<ushort>(values), DType.BFloat16);
        float[] read = new float[Count];
        backend.ReadWeight(weight, 5, read);
        Array.Reverse(read);
        Bench.SameBits([.. values.Select(value => BitConverter.UInt32BitsToSingle((uint)value << 16))], read, "elements");
    }
}
