using CsCheck;

namespace Rollout.Kernels.Tests;

/// <summary>Keys and values: contexts longer than a chunk, shared and scattered blocks, far positions, what others left behind.</summary>
public abstract partial class BackendTests
{
    [Theory]
    [InlineData(16, 4, 2)]
    [InlineData(10, 3, 1)]
    public void Attention_over_any_length_of_context_equals_the_reference(int headDim, int heads, int kvHeads)
    {
        // One before, at and one after the borders of blocks, of a pair of them, and of chunks, all in one step beside much longer ones.
        int[] lengths = IsSlow
            ? [1, 17, 64, 65, 129]
            : [1, 15, 16, 17, 4099, 32, 33, 63, 64, 65, 66, 127, 128, 129, 300, 1023, 1024, 1025, 2];
        Compare(New(), headDim, 2e-5, bench =>
        {
            int needed = lengths.Sum(Blocks), next = 0;
            KvCache cache = bench.Backend.AllocateKvCache(2, needed, kvHeads, headDim);
            RopeTable rope = bench.Rope(headDim, lengths.Max());
            int[] scattered = [.. Enumerable.Range(0, needed).OrderBy(b => b * 7919L % 1009).ThenBy(b => b)];
            int[][] tables = [.. lengths.Select(length => scattered[next..(next += Blocks(length))])];
            bench.Soil(cache, 1);
            List<float> results = [];
            foreach (bool last in new[] { false, true })
            {
                StepLayout step = Bench.Step(
                    lengths.Max(Blocks),
                    [.. lengths.Select((length, s) => last
                        ? Enumerable.Range(length - Last(s), Last(s)).ToArray()
                        : Enumerable.Range(0, length - Last(s)).ToArray())],
                    tables);
                bench.Backend.BeginStep(step);
                using Tensor qkv = bench.Tensor(step.RowCount, (heads + (2 * kvHeads)) * headDim);
                bench.Backend.RopeStoreKv(qkv, heads, null, null, 0f, rope, cache, 1);
                if (!last)
                    continue;
                using Tensor output = bench.Backend.AllocateTensor(step.RowCount, heads * headDim);
                bench.Backend.Attend(qkv, heads, 0.3f, cache, 1, output);
                results.AddRange(Bench.Read(output, step.RowCount));
            }

            return [.. results];

            int Last(int s) => Math.Min(lengths[s], 1 + (s % 3));
        });

        static int Blocks(int length) => (length + KvCache.BlockTokens - 1) / KvCache.BlockTokens;
    }

    /// <summary>
    /// Sequences of one prompt, of which each shares as many blocks as it likes, at any lengths: tokens are those of the reference, and of
    /// a step that holds the row alone.
    /// </summary>
    [Fact]
    public void Rows_of_sequences_that_share_blocks_have_the_bits_they_have_alone()
    {
        Bench subject = New();
        Gen.Int[0, 1 << 30].Sample(
            seed => Compare(subject, seed, 3e-5, bench => SharedBlocks(bench, seed, ReferenceEquals(bench.Backend, subject.Backend))),
            iter: IsSlow ? 2 : 25,
            threads: 1);
    }

    private static float[] SharedBlocks(Bench bench, int seed, bool alone)
    {
        var random = new Random(seed);
        int headDim = random.Next(3) switch { 0 => 10, 1 => 16, _ => 32 }, kvHeads = random.Next(1, 3);
        int heads = kvHeads * (random.Next(3) switch { 0 => 1, 1 => 3, _ => 8 });
        int trunk = random.Next(0, 10), sequences = random.Next(1, 7);
        int[] order = [.. Enumerable.Range(0, trunk + (sequences * 11)).OrderBy(_ => random.Next())];
        int next = trunk;
        int[][] stored = new int[sequences][], asked = new int[sequences][], tables = new int[sequences][];
        for (int s = 0; s < sequences; s++)
        {
            int shared = random.Next(2) == 0 ? trunk : random.Next(trunk + 1), own = random.Next(1, 140);
            int length = (shared * 16) + own;
            tables[s] = [.. order[..shared], .. order[next..(next += (own + 15) / 16)]];
            stored[s] = [.. Enumerable.Range(shared * 16, own)];

            // The last tokens, or any: a sequence may look back from the middle of what another holds as well.
            asked[s] = random.Next(2) == 0
                ? [.. stored[s][^random.Next(1, Math.Min(own, 24) + 1)..]]
                : [.. Enumerable.Range(0, length - 1).Where(_ => random.Next(9) == 0), length - 1];
            if (shared > 0 && random.Next(3) == 0)
            {
                // The same blocks but for one of them.
                int other = random.Next(shared);
                tables[s][other] = order[next++];
                stored[s] = [.. Enumerable.Range(other * 16, 16), .. stored[s]];
            }
        }

        KvCache cache = bench.Backend.AllocateKvCache(1, order.Length, kvHeads, headDim);
        RopeTable rope = bench.Rope(headDim, 300);
        bench.Soil(cache, 0);
        if (trunk > 0)
            Store([[.. Enumerable.Range(0, trunk * 16)]], [order[..trunk]]);
        Store(stored, tables);

        float[] queries = bench.Values(asked.Sum(rows => rows.Length) * heads * headDim);
        float[] whole = Attend(asked, tables, queries);
        for (int s = 0, at = 0; alone && s < sequences; s++)
        {
            for (int i = 0; i < asked[s].Length; i++, at += heads * headDim)
            {
                float[] one = Attend([[asked[s][i]]], [tables[s]], queries.AsSpan(at, heads * headDim).ToArray());
                Bench.SameBits(one, whole.AsSpan(at, heads * headDim).ToArray(), $"sequence {s}, position {asked[s][i]}");
            }
        }

        return whole;

        void Store(int[][] positions, int[][] blocks)
        {
            StepLayout step = Bench.Step(24, positions, blocks);
            bench.Backend.BeginStep(step);
            using Tensor qkv = bench.Tensor(step.RowCount, (heads + (2 * kvHeads)) * headDim);
            bench.Backend.RopeStoreKv(qkv, heads, null, null, 0f, rope, cache, 0);
        }

        float[] Attend(int[][] positions, int[][] blocks, float[] rows)
        {
            StepLayout step = Bench.Step(24, positions, blocks);
            bench.Backend.BeginStep(step);
            using Tensor q = bench.Tensor(heads * headDim, rows), output = bench.Backend.AllocateTensor(step.RowCount, heads * headDim);
            bench.Backend.Attend(q, heads, 0.3f, cache, 0, output);
            return Bench.Read(output, step.RowCount);
        }
    }

    [Fact]
    public void A_row_in_the_middle_of_blocks_that_others_have_filled_sees_only_what_lies_before_it()
    {
        Compare(New(), 12, 2e-5, bench =>
        {
            const int HeadDim = 16, Heads = 4, KvHeads = 2, Tokens = 160;
            int[] table = [4, 9, 0, 7, 2, 8, 1, 6, 3, 5], positions = [159, 70, 127, 64, 128, 63, 159, 143, 0];
            KvCache cache = bench.Backend.AllocateKvCache(1, 10, KvHeads, HeadDim);
            RopeTable rope = bench.Rope(HeadDim, Tokens);
            bench.Backend.BeginStep(Bench.Step(10, [[.. Enumerable.Range(0, Tokens)]], [table]));
            bench.Backend.RopeStoreKv(bench.Tensor(Tokens, 8 * HeadDim), Heads, null, null, 0f, rope, cache, 0);
            int[][] rows = [.. positions.Select(position => new[] { position })];
            bench.Backend.BeginStep(Bench.Step(10, rows, [.. rows.Select(_ => table)]));
            Tensor queries = bench.Tensor(rows.Length, Heads * HeadDim), output = bench.Backend.AllocateTensor(rows.Length, Heads * HeadDim);
            bench.Backend.Attend(queries, Heads, 0.3f, cache, 0, output);
            return Bench.Read(output, positions.Length);
        });
    }

    /// <summary>Sixteen keys from each of some far positions on, looked at by queries at near ones: angles are products rounded to fp32.</summary>
    [Fact]
    public void Keys_at_far_positions_are_rotated_as_the_reference_does()
    {
        Assert.SkipWhen(Rounding > 0, "The angles' rounding is lost in that of the keys.");
        Compare(New(), 9, 3e-5, bench =>
        {
            const int HeadDim = 32, MaxBlocks = 131072 / KvCache.BlockTokens;
            int[] far = [4096, 65520, 65536, 100000, 131056];
            KvCache cache = bench.Backend.AllocateKvCache(1, far.Length, 1, HeadDim);
            RopeTable rope = bench.Rope(HeadDim, 131072);
            int[][] tables = [.. far.Select((first, s) =>
            {
                int[] table = new int[MaxBlocks];
                table[first / KvCache.BlockTokens] = s;
                return table;
            })];
            bench.Backend.BeginStep(Bench.Step(MaxBlocks, [.. far.Select(first => Enumerable.Range(first, 16).ToArray())], tables));
            bench.Backend.RopeStoreKv(bench.Tensor(16 * far.Length, 3 * HeadDim), 1, null, null, 0f, rope, cache, 0);
            bench.Backend.BeginStep(Bench.Step(1, [.. far.Select(_ => new[] { 3, 11, 15 })], [.. far.Select((_, s) => new[] { s })]));
            Tensor queries = bench.Tensor(3 * far.Length, HeadDim), output = bench.Backend.AllocateTensor(3 * far.Length, HeadDim);
            bench.Backend.Attend(queries, 1, 0.5f, cache, 0, output);
            return Bench.Read(output, 3 * far.Length);
        });
    }

    [Fact]
    public void Queries_and_keys_have_norms_of_their_own()
    {
        Assert.SkipWhen(Rounding > 0, "Scores this large are lost in the rounding of the keys.");
        Bench subject = New();
        foreach ((bool ofQueries, bool ofKeys) in new[] { (true, true), (true, false), (false, true), (false, false) })
        {
            Compare(subject, 5, 2e-5, bench =>
            {
                // So small that epsilon decides, after a call that had both norms.
                const int HeadDim = 16, Heads = 4, KvHeads = 2, Tokens = 21;
                KvCache cache = bench.Backend.AllocateKvCache(1, 2, KvHeads, HeadDim);
                RopeTable rope = bench.Rope(HeadDim, 32);
                Weight queryNorm = bench.Weight(1, HeadDim), keyNorm = bench.Weight(1, HeadDim);
                bench.Backend.BeginStep(Bench.Step(1, 2, _ => (0, Tokens), (_, b) => 1 - b));
                bench.Backend.RopeStoreKv(bench.Tensor(Tokens, 8 * HeadDim), Heads, queryNorm, keyNorm, 1e-6f, rope, cache, 0);
                Tensor qkv = bench.Tensor(Tokens, 8 * HeadDim, 2e-3f), output = bench.Backend.AllocateTensor(Tokens, Heads * HeadDim);
                bench.Backend.RopeStoreKv(qkv, Heads, ofQueries ? queryNorm : null, ofKeys ? keyNorm : null, 1e-5f, rope, cache, 0);
                bench.Backend.Attend(qkv, Heads, ofQueries && ofKeys ? 9f : ofQueries || ofKeys ? 3000f : 1e6f, cache, 0, output);
                return [.. Bench.Read(output, Tokens).Select(v => v * 500)];
            });
        }
    }

    /// <summary>Scores that no exponential holds, rising, falling and equal: only their differences count.</summary>
    [Theory]
    [InlineData(-2100f, 15f)]
    [InlineData(2100f, -15f)]
    [InlineData(-100f, -15f)]
    [InlineData(-3000f, 0f)]
    public void Scores_of_any_size_have_weights(float first, float rise)
    {
        Compare(New(), 8, 2e-5, bench =>
        {
            // Without rotation a query of one 1 picks the first number of every key.
            const int HeadDim = 16, Tokens = 130;
            KvCache cache = bench.Backend.AllocateKvCache(1, 9, 1, HeadDim);
            RopeTable still = bench.Backend.AllocateRopeTable(new float[HeadDim / 2], Tokens, 1f);
            float[] rows = bench.Values(Tokens * 3 * HeadDim);
            for (int t = 0; t < Tokens; t++)
            {
                rows.AsSpan(t * 3 * HeadDim, 2 * HeadDim).Clear();
                (rows[t * 3 * HeadDim], rows[(t * 3 * HeadDim) + HeadDim]) = (1f, first + (t * rise));
            }

            bench.Backend.BeginStep(Bench.Step(9, [[.. Enumerable.Range(0, Tokens)]], [[.. Enumerable.Range(0, 9)]]));
            Tensor qkv = bench.Tensor(3 * HeadDim, rows), output = bench.Backend.AllocateTensor(Tokens, HeadDim);
            bench.Backend.RopeStoreKv(qkv, 1, null, null, 0f, still, cache, 0);
            bench.Backend.Attend(qkv, 1, 1f, cache, 0, output);
            return Bench.Read(output, Tokens);
        });
    }

    [Fact]
    public void Caches_with_other_heads_are_attended_to_in_one_step()
    {
        Compare(New(), 6, 2e-5, bench =>
        {
            // Groups of 1, 8 and 20 heads, and of 80, which no tile holds.
            const int HeadDim = 16, Tokens = 70;
            RopeTable rope = bench.Rope(HeadDim, Tokens);
            List<float> results = [];
            bench.Backend.BeginStep(Bench.Step(1, 5, _ => (0, Tokens), (_, b) => b));
            foreach ((int heads, int kvHeads) in new[] { (8, 8), (8, 1), (20, 1), (80, 1), (2, 2) })
            {
                KvCache cache = bench.Backend.AllocateKvCache(1, 5, kvHeads, HeadDim);
                Tensor qkv = bench.Tensor(Tokens, (heads + (2 * kvHeads)) * HeadDim);
                Tensor output = bench.Backend.AllocateTensor(Tokens, heads * HeadDim);
                bench.Backend.RopeStoreKv(qkv, heads, null, null, 0f, rope, cache, 0);
                bench.Backend.Attend(qkv, heads, 0.3f, cache, 0, output);
                results.AddRange(Bench.Read(output, Tokens));
            }

            return [.. results];
        });
    }

    [Fact]
    public void A_copied_block_holds_every_layer_and_head_and_no_other_block_changes()
    {
        Bench bench = New();
        const int HeadDim = 16, Layers = 3, KvHeads = 3, Blocks = 4;
        KvCache cache = bench.Backend.AllocateKvCache(Layers, Blocks, KvHeads, HeadDim);
        RopeTable rope = bench.Rope(HeadDim, 16);
        for (int layer = 0; layer < Layers; layer++)
        {
            for (int block = 0; block < Blocks; block++)
            {
                bench.Backend.BeginStep(Bench.Step(1, [[.. Enumerable.Range(0, 16)]], [[block]]));
                bench.Backend.RopeStoreKv(bench.Tensor(16, 3 * KvHeads * HeadDim), KvHeads, null, null, 0f, rope, cache, layer);
            }
        }

        Tensor queries = bench.Tensor(1, KvHeads * HeadDim), output = bench.Backend.AllocateTensor(1, KvHeads * HeadDim);
        float[][] before = [.. Enumerable.Range(0, Blocks).Select(Contents)];
        bench.Backend.CopyBlock(cache, 3, 1);
        bench.Backend.CopyBlock(cache, 2, 2);
        int[] now = [0, 3, 2, 3];
        for (int block = 0; block < Blocks; block++)
            Bench.SameBits(before[now[block]], Contents(block), $"block {block}");

        float[] Contents(int block)
        {
            bench.Backend.BeginStep(Bench.Step(1, [[15]], [[block]]));
            List<float> all = [];
            for (int layer = 0; layer < Layers; layer++)
            {
                bench.Backend.Attend(queries, KvHeads, 1f, cache, layer, output);
                all.AddRange(Bench.Read(output, 1));
            }

            return [.. all];
        }
    }
}
