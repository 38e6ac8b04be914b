using System.Runtime.InteropServices;

namespace Rollout.Kernels.Tests;

/// <summary>The CPU's memory: zero when allocated, returned to the system when freed, and addressed beyond 32 bits.</summary>
public sealed unsafe class CpuMemoryTests
{
    // Sizes around which the way of allocating changes: 64 KiB from the system, 2 MiB in huge pages.
    public static readonly TheoryData<long> Sizes =
    [
        1, 63, 64, 65, (64 << 10) - 129, (64 << 10) - 128, (64 << 10) - 64, (64 << 10) - 63, 64 << 10, (2 << 20) - 1, 2 << 20,
        (2 << 20) + 1,
    ];

    [Theory]
    [MemberData(nameof(Sizes))]
    public void Memory_of_any_size_is_zero_whenever_it_is_taken(long bytes)
    {
        for (int round = 0; round < 8; round++)
        {
            using NativeBuffer buffer = new(bytes);
            for (int again = 0; again < 3; again++)
            {
                Span<byte> contents = new(buffer.Pointer, (int)bytes);
                Assert.Equal(-1, contents.IndexOfAnyExcept((byte)0));
                contents.Fill(0xEE);
                buffer.Discard();
                buffer.Discard();
                Assert.True(buffer.IsGone);
                buffer.Restore();
                Assert.False(buffer.IsGone);
                Assert.Equal(0, (nint)buffer.Pointer % 64);
            }

            buffer.Restore();
            Assert.Equal(-1, new Span<byte>(buffer.Pointer, (int)bytes).IndexOfAnyExcept((byte)0));
            new Span<byte>(buffer.Pointer, (int)bytes).Fill(0xEE);
        }
    }

    [Theory]
    [InlineData(WeightFormat.BFloat16)]
    [InlineData(WeightFormat.BFloat16Fast)]
    [InlineData(WeightFormat.Int8)]
    public void Every_kind_of_memory_is_given_back_refused_and_zero_when_taken_again(WeightFormat format)
    {
        using CpuBackend backend = new(1, 0, format);
        Bench bench = new(backend);
        Tensor x = bench.Tensor(3, 40), y = bench.Tensor(3, 70), qkv = bench.Tensor(3, 48);
        Weight matrix = bench.Weight(70, 40), vector = bench.Weight(1, 40), bias = bench.Weight(1, 70), table = bench.Weight(5, 40);
        Weight norm = bench.Weight(1, 16);
        KvCache cache = bench.Cache(1, 2, 1, 16);
        RopeTable rope = bench.Rope(16, 32);
        Tensor output = bench.Tensor(3, 16);
        StepLayout step = Bench.Step(1, 1, _ => (0, 3), (_, _) => 0);
        Refused(x, () => backend.MatMul(x, matrix, bias, y, 3));
        Refused(matrix, () => backend.MatMul(x, matrix, bias, y, 3));
        Refused(bias, () => backend.MatMul(x, matrix, bias, y, 3));
        Refused(y, () => backend.MatMul(x, matrix, bias, y, 3));
        Refused(vector, () => backend.RmsNorm(x, vector, 1e-6f, x, 3));
        Refused(table, () => backend.Embed(table, x));
        foreach (DeviceMemory memory in (DeviceMemory[])[cache, rope, output, norm, qkv])
            Refused(memory, () => bench.Attend(qkv, 1, rope, cache, 0, output, 1f, norm, norm, 1e-6f));

        x.Discard();
        Assert.Throws<ObjectDisposedException>(() => x.Read(1, new float[40]));
        Assert.Throws<ObjectDisposedException>(() => x.Write(1, new float[40]));
        x.Restore();
        Assert.Equal(new float[120], Bench.Read(x, 3));
        vector.Discard();
        vector.Restore();
        matrix.Discard();
        matrix.Restore();
        float[] read = new float[40 * 70];
        backend.ReadWeight(vector, 0, read.AsSpan(0, 40));
        Assert.Equal(new float[40], read[..40]);
        if (format != WeightFormat.Int8)
        {
            backend.ReadWeight(matrix, 0, read);
            Assert.Equal(new float[40 * 70], read);
        }

        // Zero keys and values: later rows, whose own values are zeros, attend to nothing else.
        qkv.Write(3, bench.Values(3 * 48));
        bench.Store(qkv, 1, rope, cache, 0);
        cache.Discard();
        cache.Restore();
        qkv.Write(3, [.. bench.Values(3 * 48).Select((value, i) => i % 48 < 32 ? value : 0f)]);
        backend.BeginStep(Bench.Step(1, 2, _ => (16, 19), (_, b) => b));
        bench.Attend(qkv, 1, rope, cache, 0, output);
        Assert.Equal(new float[48], Bench.Read(output, 3));

        void Refused(DeviceMemory memory, Action action)
        {
            long bytes = memory.Bytes;
            backend.BeginStep(step);
            memory.Discard();
            Assert.ThrowsAny<ArgumentException>(action);
            memory.Restore();
            action();
            Assert.Equal(bytes, memory.Bytes);
        }
    }

    [Fact]
    public void What_is_discarded_or_disposed_is_the_machines_again()
    {
        using CpuBackend backend = new(1);
        const long Size = 128 << 20;
        Tensor tensor = backend.AllocateTensor(1 << 10, 1 << 15);
        Assert.Equal(Size, tensor.Bytes);
        long before = backend.HeldBytes;
        Fill();
        Assert.InRange(backend.HeldBytes - before, Size / 2, 3 * Size);
        tensor.Discard();
        Assert.InRange(backend.HeldBytes - before, -3 * Size, Size / 2);
        tensor.Restore();
        Fill();
        tensor.Dispose();
        Assert.InRange(backend.HeldBytes - before, -3 * Size, Size / 2);
        Assert.Throws<ObjectDisposedException>(tensor.Restore);

        void Fill() => new Span<byte>(((CpuTensor)tensor).Data, (int)Size).Fill(1);
    }

    // ---- Offsets beyond 32 bits. Untouched pages cost nothing.

    [Fact]
    public void A_cache_of_more_than_two_thousand_million_numbers_is_addressed_to_its_end()
    {
        using CpuBackend backend = new(2);
        Bench bench = new(backend);
        const int HeadDim = 128, Heads = 8, Blocks = 70000, Tokens = 40;
        KvLayout[] layouts = [new(8, HeadDim, HeadDim), new(1, HeadDim, HeadDim)]; // the first layer has this many, and the second follows
        using KvCache huge = Huge(() => backend.AllocateKvCache(Blocks, layouts));
        using KvCache small = backend.AllocateKvCache(4, layouts);
        using RopeTable rope = bench.Rope(HeadDim, Tokens);
        float[] values = bench.Values(Tokens * 3 * Heads * HeadDim);
        Assert.Equal((8L + 1) * Blocks * 2 * HeadDim * 16 * sizeof(float), huge.Bytes);
        float[] expected = Attend(small, [2, 0, 1]);
        Bench.SameBits(expected, Attend(huge, [Blocks - 1, 25537, 0]), "far blocks");
        backend.CopyBlock(huge, Blocks - 1, 25538);

        // Rows after the copied block, which none of them writes.
        Bench.SameBits(Attend(small, [2, 0, 1], 16), Attend(huge, [25538, 25537, 0], 16), "a copy");

        float[] Attend(KvCache cache, int[] table, int first = 0)
        {
            int rows = Tokens - first;
            List<float> all = [];
            backend.BeginStep(Bench.Step(3, [[.. Enumerable.Range(first, rows)]], [table]));
            for (int layer = 0; layer < 2; layer++)
            {
                int columns = Bench.Columns(Heads, layouts[layer]);
                using Tensor qkv = bench.Tensor(columns, values[(first * columns)..(Tokens * columns)]);
                using Tensor output = backend.AllocateTensor(rows, Heads * HeadDim);
                bench.Attend(qkv, Heads, rope, cache, layer, output, 0.1f);
                all.AddRange(Bench.Read(output, rows));
            }

            return [.. all];
        }
    }

    [Fact]
    public void Layers_of_different_layouts_take_what_each_needs()
    {
        using CpuBackend backend = new(1);
        const int Blocks = 7;
        using KvCache cache = backend.AllocateKvCache(Blocks, new KvLayout(2, 24, 16), new KvLayout(1, 16, 40), new KvLayout(3, 10, 10));

        // Values are padded to 16.
        Assert.Equal(Blocks * 16L * sizeof(float) * ((2 * (24 + 16)) + (16 + 48) + (3 * (10 + 16))), cache.Bytes);
    }

    [Theory]
    [InlineData(WeightFormat.BFloat16)]
    [InlineData(WeightFormat.BFloat16Fast)]
    [InlineData(WeightFormat.Int8)]
    public void A_matrix_of_more_than_four_billion_elements_is_written_and_read_to_its_end(WeightFormat format)
    {
        using CpuBackend backend = new(1, 0, format);
        const int Inputs = 32768, Outputs = 131136, Rows = 40;
        using Weight huge = Huge(() => backend.AllocateWeight(Outputs, Inputs));
        Bench bench = new(backend);
        float[] values = [.. bench.Values(Rows * Inputs).Select(ReferenceBackend.Round)], read = new float[values.Length];
        foreach (int first in new[] { 3, 65520, Outputs - Rows })
        {
            backend.WriteWeight(huge, (long)first * Inputs, MemoryMarshal.AsBytes<float>(values), DType.Float32);
            backend.ReadWeight(huge, (long)first * Inputs, read);
            if (format != WeightFormat.Int8)
                Bench.SameBits(values, read, $"from row {first}");
            else
                Bench.Close(values, read, 1 / 127.0 / 2);
        }

        // The last token's embedding.
        StepLayout step = Bench.Step(1, 1, _ => (0, 2), (_, _) => 0);
        (step.TokenIds[0], step.TokenIds[1]) = (Outputs - 1, 65521);
        using Tensor embedded = backend.AllocateTensor(2, Inputs);
        backend.BeginStep(step);
        backend.Embed(huge, embedded);
        Bench.SameBits(Bench.Row(read, Inputs, Rows - 1), Bench.Row(Bench.Read(embedded, 2), Inputs, 0), "last token");
        Bench.SameBits(Bench.Row(read, Inputs, 1), Bench.Row(Bench.Read(embedded, 2), Inputs, 1), "token 65521");

        long elements = (long)Outputs * Inputs;
        Assert.Throws<ArgumentException>(() => backend.ReadWeight(huge, elements - 1, new float[2]));
        Assert.Throws<ArgumentOutOfRangeException>(() => backend.ReadWeight(huge, elements + 1, []));
        if (format == WeightFormat.Int8)
            return;

        // Single elements, with an index up to the end of 32 bits.
        long[] places = [5L, 1L << 31, uint.MaxValue, 1L << 32, elements - 1];
        foreach (long place in places)
        {
            long element = Math.Max(0, place - uint.MaxValue);
            ReadOnlySpan<byte> value = MemoryMarshal.AsBytes<float>([place % 251]);
            backend.WriteWeightElements(huge, element, [(uint)(place - element)], value, DType.Float32);
        }

        foreach (long place in places)
        {
            backend.ReadWeight(huge, place, read.AsSpan(0, 1));
            Assert.Equal(place % 251, read[0]);
        }

        Assert.Throws<ArgumentException>(() => backend.WriteWeightElements(huge, elements - 1, [1], new byte[4], DType.Float32));
    }

    [Theory]
    [InlineData(WeightFormat.BFloat16)]
    [InlineData(WeightFormat.BFloat16Fast)]
    [InlineData(WeightFormat.Int8)]
    public void A_matmul_reads_a_matrix_of_more_than_two_thousand_million_elements_to_its_end(WeightFormat format)
    {
        using CpuBackend backend = new(2, 0, format);
        const int Inputs = 32768, Outputs = 65600, Rows = 33;
        using Weight huge = Huge(() => backend.AllocateWeight(Outputs, Inputs)), last = backend.AllocateWeight(Rows, Inputs);
        Bench bench = new(backend);
        byte[] values = MemoryMarshal.AsBytes<float>(bench.Values(Rows * Inputs)).ToArray();
        backend.WriteWeight(huge, (long)(Outputs - Rows) * Inputs, values, DType.Float32);
        backend.WriteWeight(last, 0, values, DType.Float32);
        using Tensor x = bench.Tensor(1, Inputs), y = bench.Tensor(1, Outputs), expected = backend.AllocateTensor(1, Rows);
        backend.MatMul(x, huge, null, y, 1);
        backend.MatMul(x, last, null, expected, 1);
        float[] read = Bench.Read(y, 1);
        Assert.Equal(-1, read.AsSpan(0, Outputs - Rows).IndexOfAnyExcept(0f));
        Bench.SameBits(Bench.Read(expected, 1), read[^Rows..], "last rows");
    }

    [Fact]
    public void Rows_of_a_tensor_of_more_than_two_thousand_million_numbers_are_found()
    {
        using CpuBackend backend = new(1);
        const int Rows = 66000, Columns = 32768;
        using Tensor huge = Huge(() => backend.AllocateTensor(Rows, Columns)), gathered = backend.AllocateTensor(2, Columns);
        float[] row = new Bench(backend).Values(Columns);
        row.CopyTo(new Span<float>(((CpuTensor)huge).Data + ((Rows - 1L) * Columns), Columns));
        StepLayout step = new(Rows, 1, (Rows + 15) / 16, 1, 0, 0) { SequenceCount = 1, OutputCount = Rows, QueryCount = 1 };
        step.RowStart[1] = Rows;
        for (int r = 0; r < Rows; r++)
            (step.Positions[r], step.OutputRows[r]) = (r, r);
        step.Queries[0] = Bench.Query(Rows - 1, temperature: 0f);
        backend.BeginStep(step);
        backend.GatherRows(huge, Rows - 2, 2, gathered);
        Bench.SameBits([.. new float[Columns], .. row], Bench.Read(gathered, 2), "gathered");
        backend.Sample(huge, 0, Rows);
        Assert.Equal(Array.IndexOf(row, row.Max()), step.Results[0].Token);
    }

    [Fact]
    public void Weights_of_which_the_last_does_not_fit_leave_nothing_taken()
    {
        using Backend backend = new CpuBackend(1);
        long before = Virtual();
        Assert.Throws<OutOfMemoryException>(() => backend.AllocateWeights([(1 << 15, 1 << 15), (1 << 15, 1 << 15), (1 << 28, 1 << 24)]));
        Assert.InRange(Virtual() - before, long.MinValue, 1L << 30);

        using WeightArena arena = backend.AllocateWeights([(40, 33), (1, 77), (1, 1), (65, 64)]);
        Assert.Equal([(40, 33), (1, 77), (1, 1), (65, 64)], arena.Weights.Select(weight => (weight.Outputs, weight.Inputs)));
        Assert.Equal(arena.Weights.Sum(weight => weight.Bytes), arena.Bytes);
        arena.Discard();
        Assert.All(arena.Weights, weight => Assert.ThrowsAny<ArgumentException>(() => backend.ReadWeight(weight, 0, new float[1])));
        arena.Restore();
        Assert.All(arena.Weights, weight => backend.ReadWeight(weight, 0, new float[1]));
        arena.Dispose();
        Assert.All(arena.Weights, weight => Assert.Throws<ObjectDisposedException>(weight.Restore));

        static long Virtual() => long.Parse(File.ReadAllText("/proc/self/statm").Split(' ')[0]) * Environment.SystemPageSize;
    }

    [Fact]
    public void An_arena_that_comes_back_in_part_holds_nothing()
    {
        FullWeight[] weights = [.. Enumerable.Range(0, 4).Select(i => new FullWeight { IsFull = i == 2 })];
        WeightArena arena = new(weights);
        arena.Discard();
        Assert.All(weights, weight => Assert.False(weight.IsHeld));
        Assert.Throws<OutOfMemoryException>(arena.Restore);
        Assert.All(weights, weight => Assert.False(weight.IsHeld));
        weights[2].IsFull = false;
        arena.Restore();
        Assert.All(weights, weight => Assert.True(weight.IsHeld));
    }

    /// <summary>Skips where the system does not provide so much address space.</summary>
    private static T Huge<T>(Func<T> allocate)
        where T : DeviceMemory
    {
        try
        {
            return allocate();
        }
        catch (OutOfMemoryException error)
        {
            Assert.Skip($"This machine does not allocate untouched memory: {error.Message}");
            throw;
        }
    }

    /// <summary>A weight of a device that has, or does not have, enough memory.</summary>
    private sealed class FullWeight() : Weight(1, 1)
    {
        public bool IsFull { get; set; }

        public bool IsHeld { get; private set; } = true;

        public override long Bytes => sizeof(float);

        public override void Discard() => IsHeld = false;

        public override void Restore() => IsHeld = IsFull ? throw new OutOfMemoryException() : true;

        public override void Dispose() => Discard();
    }
}
