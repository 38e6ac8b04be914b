using CsCheck;
using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>How a step's attention is cut into items, and that nothing depends on it.</summary>
public sealed class CudaAttentionTests
{
    /// <summary>
    /// Every row has every chunk of its context in one item, the longest are cut where there is room, and long items come first.
    /// </summary>
    [Fact]
    public void A_plan_covers_every_chunk_of_every_row_once()
    {
        Gen.Select(
            Gen.Int[0, 1 << 30], Gen.Int[1, 40], Gen.Int[1, 16], Gen.Int[0, 60], Gen.Bool)
        .Sample((seed, sequences, rowsPerItem, slots, shared) =>
        {
            Random random = new(seed);
            int[] starts = [.. Enumerable.Range(0, sequences).Select(_ => random.Next(1, 1500))];
            int[] rows = [.. Enumerable.Range(0, sequences).Select(_ => random.Next(4) == 0 ? random.Next(1, 40) : 1)];
            int common = shared ? (8 * random.Next(1, 5)) - random.Next(3) : 0; // blocks that all share: whole chunks, or one or two less
            StepLayout step = Bench.Step(sequences, 128, s => (starts[s], starts[s] + rows[s]), (s, b) => b < common ? b : (s * 128) + b);
            CudaAttentionPlan plan = new();
            plan.Build(step, rowsPerItem, slots);
            Assert.InRange(plan.Slots, 0, slots);
            Assert.InRange(plan.ItemCount, 0, CudaAttentionPlan.MostItems(step));
            Dictionary<(int Row, int Chunk), bool> covered = [];
            HashSet<int> places = [];
            int chunksBefore = int.MaxValue;
            for (int i = 0; i < plan.ItemCount; i++)
            {
                int[] item = plan.Items[(i * CudaAttentionPlan.ItemNumbers)..((i + 1) * CudaAttentionPlan.ItemNumbers)];
                (int first, int count, int chunk, int chunks, bool split, int sequence, int last) =
                    (item[0], item[1], item[2], item[3], item[4] != 0, item[5], item[6]);
                Assert.InRange(count, 1, Math.Min(rowsPerItem, plan.MostRows));
                Assert.InRange(chunks, 1, chunksBefore);
                chunksBefore = chunks;
                Assert.InRange(first, step.RowStart[sequence], step.RowStart[sequence + 1] - 1);
                Assert.Equal(Enumerable.Range(first, count).Max(row => step.Positions[row]), last);
                for (int row = first; row < first + count; row++)
                {
                    if (split)
                        Assert.Equal(Blocks(first, chunk), Blocks(row, chunk));
                    for (int c = chunk; c < chunk + chunks && c * CudaAttentionPlan.Chunk <= step.Positions[row]; c++)
                    {
                        Assert.True(covered.TryAdd((row, c), split), $"row {row} has chunk {c} twice");
                        if (split)
                            Assert.True(places.Add(plan.RowSlots[row] + c), $"row {row} shares the place of chunk {c}");
                    }
                }
            }

            Assert.Equal(step.Positions.Sum(position => (position / CudaAttentionPlan.Chunk) + 1), covered.Count);
            Assert.All(places, place => Assert.InRange(place, 0, plan.Slots - 1));

            // Rows that are not cut although they could be are no longer than the remaining room.
            int[] single = [.. Enumerable.Range(0, sequences).Where(s => rows[s] == 1).Select(s => step.RowStart[s])];
            int[] whole = [.. single.Where(row => !covered[(row, 0)] && covered.ContainsKey((row, 1))).Select(Chunks)];
            Assert.All(whole, chunks => Assert.True(chunks > slots - plan.Slots));
            int[] cut = [.. single.Where(row => covered[(row, 0)]).Select(Chunks)];
            if (whole.Length > 0 && cut.Length > 0 && whole.Max() <= slots)
                Assert.True(cut.Max() >= whole.Max(), "a longer one was left whole");

            int Chunks(int row) => (step.Positions[row] / CudaAttentionPlan.Chunk) + 1;

            // The blocks of a chunk that a row sees.
            int[] Blocks(int row, int chunk)
            {
                const int ChunkBlocks = CudaAttentionPlan.Chunk / KvCache.BlockTokens;
                int s = Enumerable.Range(0, sequences).Last(i => step.RowStart[i] <= row);
                int seen = Math.Min(ChunkBlocks, (step.Positions[row] / KvCache.BlockTokens) + 1 - (chunk * ChunkBlocks));
                return step.BlockTables.AsSpan((s * 128) + (chunk * ChunkBlocks), seen).ToArray();
            }
        }, iter: 400);
    }

    /// <summary>
    /// Rows that decode, cut when there is room for their parts: for none, for the longest, for some, for all; with parts that several
    /// share. Their bits equal those of the same rows as the last of sequences with two rows, which are never cut.
    /// </summary>
    [Theory]
    [InlineData(WeightFormat.BFloat16, 16, 2)]
    [InlineData(WeightFormat.BFloat16, 128, 1)]
    [InlineData(WeightFormat.BFloat16, 10, 1)]
    [InlineData(WeightFormat.Float32, 16, 2)]
    public void A_row_has_the_same_bits_however_many_are_cut(WeightFormat format, int headDim, int heads)
    {
        SimulatedDevice.Require();
        const int MaxBlocks = 48;
        int[] lengths = [700, 701, 140, 129, 128, 30, 257];
        int columns = (heads + 2) * headDim;
        float[]? expected = null;
        foreach (int slots in headDim == 128 ? (int[])[0, 1000] : [0, 6, 9, 1000])
        {
            using CudaBackend backend = new(0, format) { MostPartBytes = slots * CudaAttentionPlan.PartBytes(heads, headDim) };
            Bench bench = new(backend);
            KvCache cache = bench.Cache(1, lengths.Length * MaxBlocks, 1, headDim);
            RopeTable rope = bench.Rope(headDim, 800);
            float[] prompts = bench.Values((lengths.Max() + KvCache.BlockTokens) * columns);
            float[] rows = bench.Values(2 * lengths.Length * columns);

            // The first two share all blocks of three chunks, and all but the last of the fourth.
            int Block(int s, int b) => s == 1 && b < 31 ? b : (s * MaxBlocks) + b;
            for (int s = 0; s < lengths.Length; s++)
            {
                int blocks = (lengths[s] - 2 + KvCache.BlockTokens - 1) / KvCache.BlockTokens;
                using Tensor prompt = bench.Tensor(columns, prompts[..(blocks * KvCache.BlockTokens * columns)]);
                bench.StoreBlocks([.. Enumerable.Range(0, blocks).Select(b => Block(s, b))], prompt, heads, rope, cache, 0);
            }

            float[] two = Run(lengths.Length, s => (lengths[s] - 2, lengths[s]), Block, rows);
            float[] last = Run(lengths.Length, s => (lengths[s] - 1, lengths[s]), Block,
                [.. Enumerable.Range(0, lengths.Length).SelectMany(s => rows[(((2 * s) + 1) * columns)..(((2 * s) + 2) * columns)])]);
            for (int s = 0; s < lengths.Length; s++)
            {
                Bench.SameBits(
                    Bench.Row(two, heads * headDim, (2 * s) + 1), Bench.Row(last, heads * headDim, s),
                    $"sequence {s}, {slots} slots");
            }

            expected ??= last;
            Bench.SameBits(expected, last, $"{slots} slots");

            float[] Run(int sequences, Func<int, (int Start, int End)> positions, Func<int, int, int> block, float[] qkv)
            {
                StepLayout step = Bench.Step(sequences, MaxBlocks, positions, block);
                backend.BeginStep(step);
                using Tensor x = bench.Tensor(columns, qkv), output = backend.AllocateTensor(step.RowCount, heads * headDim);
                bench.Attend(x, heads, rope, cache, 0, output, 0.2f);
                return Bench.Read(output, step.RowCount);
            }
        }
    }

    /// <summary>
    /// The largest heads; more query heads for a key head than an item holds; and numbers that do not fill an item. As single rows, and as
    /// rows of a prompt.
    /// </summary>
    [Theory]
    [InlineData(256, 4, 2)]
    [InlineData(256, 35, 1)]
    [InlineData(16, 65, 1)]
    public void Heads_of_any_size_and_number_equal_the_reference(int headDim, int heads, int kvHeads)
    {
        SimulatedDevice.Require();
        int tokens = headDim == 16 ? 150 : 21, columns = (heads + (2 * kvHeads)) * headDim;
        using CudaBackend backend = new(0, WeightFormat.Float32);
        using ReferenceBackend reference = new(WeightFormat.Float32);
        Bench.Close(Results(reference), Results(backend), 2e-5);

        float[] Results(Backend on)
        {
            Bench bench = new(on, headDim);
            KvCache cache = bench.Cache(1, 10, kvHeads, headDim);
            RopeTable rope = bench.Rope(headDim, tokens);
            float[] values = bench.Values(tokens * columns);

            // Single rows before any larger step: the counters of such steps then have room for one row. Unwritten parts are zero.
            int[] single = [0, 3, tokens / 2, tokens - 10, tokens - 1];
            return
            [
                .. single.SelectMany(at => Run(at, at + 1)), .. Run(0, tokens - 1), .. Run(tokens - 1, tokens),
                .. Run(tokens - 3, tokens - 1),
            ];

            float[] Run(int from, int to)
            {
                on.BeginStep(Bench.Step(1, 10, _ => (from, to), (_, b) => 9 - b));
                Tensor x = bench.Tensor(columns, values[(from * columns)..(to * columns)]);
                Tensor output = on.AllocateTensor(to - from, heads * headDim);
                bench.Attend(x, heads, rope, cache, 0, output, 0.1f);
                return Bench.Read(output, to - from);
            }
        }
    }

    /// <summary>As many rows as sequences, but not a decode step.</summary>
    [Fact]
    public void Two_rows_beside_a_sequence_without_any_equal_the_reference()
    {
        SimulatedDevice.Require();
        const int HeadDim = 16;
        using CudaBackend backend = new(0, WeightFormat.Float32);
        using ReferenceBackend reference = new(WeightFormat.Float32);
        Bench.Close(Results(reference), Results(backend), 2e-5);

        static float[] Results(Backend on)
        {
            Bench bench = new(on, 2);
            KvCache cache = bench.Cache(1, 2, 1, HeadDim);
            RopeTable rope = bench.Rope(HeadDim, 4);
            on.BeginStep(Bench.Step(2, 1, s => (0, 2 * s), (s, _) => s));
            Tensor x = bench.Tensor(2, 3 * HeadDim), output = on.AllocateTensor(2, HeadDim);
            bench.Attend(x, 1, rope, cache, 0, output);
            return Bench.Read(output, 2);
        }
    }

    /// <summary>
    /// A token after 131,071 others, which are the same sixteen over and over: cut by chunks, and as the last of two rows, which are not
    /// cut.
    /// </summary>
    [Fact]
    public void The_last_token_of_a_context_of_131_072_equals_the_reference()
    {
        SimulatedDevice.Require();
        const int Context = 131_072, Blocks = Context / KvCache.BlockTokens, HeadDim = 16, Columns = 3 * HeadDim;
        using CudaBackend backend = new(0, WeightFormat.Float32);
        using ReferenceBackend reference = new(WeightFormat.Float32);
        foreach (int rows in (int[])[1, 2])
            Bench.Close(Results(reference, rows), Results(backend, rows), 3e-4); // sums of 1,024 equal chunks

        float[] Results(Backend on, int rows)
        {
            Bench bench = new(on, 5);
            KvCache cache = bench.Cache(1, 2, 1, HeadDim);
            RopeTable rope = bench.Rope(HeadDim, Context);
            float[] values = bench.Values(KvCache.BlockTokens * Columns);
            Tensor first = bench.Tensor(Columns, values), again = bench.Tensor(Columns, values), last = bench.Tensor(rows, Columns);
            Tensor output = on.AllocateTensor(rows, HeadDim);
            on.BeginStep(Bench.Step(1, Blocks, _ => (0, KvCache.BlockTokens), (_, _) => 0));
            bench.Store(first, 1, rope, cache, 0);
            on.BeginStep(Bench.Step(1, Blocks, _ => (Context - KvCache.BlockTokens, Context - 1), (_, _) => 1));
            bench.Store(again, 1, rope, cache, 0);
            on.BeginStep(Bench.Step(1, Blocks, _ => (Context - rows, Context), (_, b) => b == Blocks - 1 ? 1 : 0));
            bench.Attend(last, 1, rope, cache, 0, output);
            return Bench.Row(Bench.Read(output, rows), HeadDim, rows - 1);
        }
    }

    /// <summary>As many chunks as are merged together, 64, and more.</summary>
    [Theory]
    [InlineData(WeightFormat.BFloat16, 64 * CudaAttentionPlan.Chunk)]
    [InlineData(WeightFormat.BFloat16, (66 * CudaAttentionPlan.Chunk) + 5)]
    [InlineData(WeightFormat.Float32, (64 * CudaAttentionPlan.Chunk) + 1)]
    public void A_long_context_has_the_same_bits_cut_and_whole(WeightFormat format, int tokens)
    {
        SimulatedDevice.Require();
        const int HeadDim = 16, Columns = 3 * HeadDim;
        float[][] results = new float[2][];
        for (int cut = 0; cut < 2; cut++)
        {
            using CudaBackend backend = new(0, format) { MostPartBytes = cut << 20 };
            Bench bench = new(backend);
            int blocks = (tokens / KvCache.BlockTokens) + 1;
            KvCache cache = bench.Cache(1, blocks, 1, HeadDim);
            RopeTable rope = bench.Rope(HeadDim, tokens);
            int[] table = [.. Enumerable.Range(0, blocks).Reverse()];
            bench.StoreBlocks(table, bench.Tensor(blocks * KvCache.BlockTokens, Columns), 1, rope, cache, 0);
            backend.BeginStep(Bench.Step(blocks, [[tokens - 1]], [table]));
            Tensor x = bench.Tensor(1, Columns), output = backend.AllocateTensor(1, HeadDim);
            bench.Attend(x, 1, rope, cache, 0, output, 2f);
            results[cut] = Bench.Read(output, 1);
        }

        Bench.SameBits(results[0], results[1], "cut and whole");
    }

    /// <summary>Steps that decode equally many rows have equal launches, however long their contexts: the graph of one rehearsal.</summary>
    [Fact]
    public void A_step_that_decodes_is_launched_alike_for_all_contexts()
    {
        SimulatedDevice.Require();
        const int HeadDim = 16, Rows = 3, MaxBlocks = 64;
        using CudaBackend backend = new(0);
        Bench bench = new(backend);
        KvCache cache = bench.Cache(1, Rows * MaxBlocks, 1, HeadDim);
        RopeTable rope = bench.Rope(HeadDim, MaxBlocks * KvCache.BlockTokens);
        Tensor qkv = bench.Tensor(Rows, 3 * HeadDim), output = backend.AllocateTensor(Rows, HeadDim), logits = bench.Tensor(Rows, 8);
        StepLayout first = Step(5);
        Run(first); // allocates memory
        backend.FinishStep(first);
        foreach (StepLayout rehearsal in backend.Rehearsals(first))
            Run(rehearsal);
        foreach (int length in (int[])[5, 120, 129, 1000, 40, 513])
        {
            long graphs = backend.GraphLaunches;
            StepLayout step = Step(length);
            Run(step);
            backend.FinishStep(step);
            Assert.Equal(1, backend.GraphLaunches - graphs);
        }

        void Run(StepLayout step)
        {
            backend.BeginStep(step);
            bench.Attend(qkv, 1, rope, cache, 0, output, 0.2f);
            backend.Sample(logits, 0, step.OutputCount);
        }

        StepLayout Step(int length)
        {
            StepLayout step = new(Rows, Rows, MaxBlocks, Rows, 0, 0) { SequenceCount = Rows, OutputCount = Rows, QueryCount = Rows };
            for (int s = 0; s < Rows; s++)
            {
                (step.RowStart[s + 1], step.Positions[s], step.OutputRows[s], step.Queries[s]) = (s + 1, length + s - 1, s, Bench.Query(s));
                for (int b = 0; b < MaxBlocks; b++)
                    step.BlockTables[(s * MaxBlocks) + b] = (s * MaxBlocks) + b;
            }

            return step;
        }
    }
}
