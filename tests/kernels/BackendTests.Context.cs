using CsCheck;

namespace Rollout.Kernels.Tests;

/// <summary>
/// Keys and values: contexts longer than a chunk, shared and scattered blocks, far positions, blocks that were used before.
/// </summary>
public abstract partial class BackendTests
{
    [Theory]
    [InlineData(16, 4, 2)]
    [InlineData(10, 3, 1)]
    public void Attention_over_any_length_of_context_equals_the_reference(int headDim, int heads, int kvHeads)
    {
        // One before, at and one after the borders of blocks, of pairs of blocks, and of chunks, all in one step with much longer ones.
        int[] lengths = IsSlow
            ? [1, 17, 64, 65, 129]
            : [1, 15, 16, 17, 4099, 32, 33, 63, 64, 65, 66, 127, 128, 129, 300, 1023, 1024, 1025, 2];
        Compare(New(), headDim, 2e-5, bench =>
        {
            int needed = lengths.Sum(Blocks), next = 0, columns = (heads + (2 * kvHeads)) * headDim;
            KvCache cache = bench.Cache(2, needed, kvHeads, headDim);
            RopeTable rope = bench.Rope(headDim, lengths.Max());
            int[] scattered = [.. Enumerable.Range(0, needed).OrderBy(b => b * 7919L % 1009).ThenBy(b => b)];
            int[][] tables = [.. lengths.Select(length => scattered[next..(next += Blocks(length))])];

            // The context before the last rows of each; after it, values that a failed sequence would have left there.
            float[] before = bench.Values(needed * KvCache.BlockTokens * columns);
            for (int s = 0, first = 0; s < lengths.Length; first += Blocks(lengths[s++]) * KvCache.BlockTokens)
            {
                int from = first + lengths[s] - Last(s), to = first + (Blocks(lengths[s]) * KvCache.BlockTokens);
                before.AsSpan(from * columns, (to - from) * columns).Fill(float.NaN);
            }

            bench.StoreBlocks(scattered, bench.Tensor(columns, before), heads, rope, cache, 1);
            bench.Backend.BeginStep(Bench.Step(
                lengths.Max(Blocks), [.. lengths.Select((length, s) => Enumerable.Range(length - Last(s), Last(s)).ToArray())], tables));
            int rows = Enumerable.Range(0, lengths.Length).Sum(Last);
            Tensor output = bench.Backend.AllocateTensor(rows, heads * headDim);
            bench.Attend(bench.Tensor(rows, columns), heads, rope, cache, 1, output, 0.3f);
            return Bench.Read(output, rows);

            int Last(int s) => Math.Min(lengths[s], 1 + (s % 3));
        });

        static int Blocks(int length) => (length + KvCache.BlockTokens - 1) / KvCache.BlockTokens;
    }

    /// <summary>
    /// Sequences of one prompt that share any number of blocks, at any lengths: results are those of the reference, and of a step with the
    /// row alone.
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
        Random random = new(seed);
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

            // The last tokens, or any: a sequence may also attend from the middle of another's context.
            asked[s] = random.Next(2) == 0
                ? [.. stored[s][^random.Next(1, Math.Min(own, 24) + 1)..]]
                : [.. Enumerable.Range(0, length - 1).Where(_ => random.Next(9) == 0), length - 1];
            if (shared > 0 && random.Next(3) == 0)
            {
                // The same blocks except for one.
                int other = random.Next(shared);
                tables[s][other] = order[next++];
                stored[s] = [.. Enumerable.Range(other * 16, 16), .. stored[s]];
            }
        }

        KvCache cache = bench.Cache(1, order.Length, kvHeads, headDim);
        RopeTable rope = bench.Rope(headDim, 300);
        bench.Soil(cache, 0);

        // Keys and values depend on the block: a row that is computed again, or by another sequence, stores the same values.
        int width = heads * headDim, kvWidth = 2 * kvHeads * headDim;
        float[] contents = bench.Values(order.Length * KvCache.BlockTokens * kvWidth);
        if (trunk > 0)
            Attend([[.. Enumerable.Range(0, trunk * 16)]], [order[..trunk]], new float[trunk * 16 * width]);
        Attend(stored, tables, new float[stored.Sum(rows => rows.Length) * width]);

        float[] queries = bench.Values(asked.Sum(rows => rows.Length) * width);
        float[] whole = Attend(asked, tables, queries);
        for (int s = 0, at = 0; alone && s < sequences; s++)
        {
            for (int i = 0; i < asked[s].Length; i++, at += width)
            {
                float[] one = Attend([[asked[s][i]]], [tables[s]], queries.AsSpan(at, width).ToArray());
                Bench.SameBits(one, whole.AsSpan(at, width).ToArray(), $"sequence {s}, position {asked[s][i]}");
            }
        }

        return whole;

        float[] Attend(int[][] positions, int[][] blocks, float[] queries)
        {
            StepLayout step = Bench.Step(24, positions, blocks);
            bench.Backend.BeginStep(step);
            List<float> rows = [];
            for (int s = 0, at = 0; s < positions.Length; s++)
            {
                foreach (int position in positions[s])
                {
                    int slot = (blocks[s][position / KvCache.BlockTokens] * KvCache.BlockTokens) + (position % KvCache.BlockTokens);
                    rows.AddRange([.. queries.AsSpan(at, width), .. contents.AsSpan(slot * kvWidth, kvWidth)]);
                    at += width;
                }
            }

            using Tensor qkv = bench.Tensor(width + kvWidth, [.. rows]), output = bench.Backend.AllocateTensor(step.RowCount, width);
            bench.Attend(qkv, heads, rope, cache, 0, output, 0.3f);
            return Bench.Read(output, step.RowCount);
        }
    }

    [Fact]
    public void A_row_in_the_middle_of_filled_blocks_sees_only_what_is_before_it()
    {
        Compare(New(), 12, 2e-5, bench =>
        {
            const int HeadDim = 16, Heads = 4, KvHeads = 2, Tokens = 160;
            int[] table = [4, 9, 0, 7, 2, 8, 1, 6, 3, 5], positions = [159, 70, 127, 64, 128, 63, 159, 143, 0];
            const int Width = Heads * HeadDim, KvWidth = 2 * KvHeads * HeadDim;
            KvCache cache = bench.Cache(1, 10, KvHeads, HeadDim);
            RopeTable rope = bench.Rope(HeadDim, Tokens);
            bench.Backend.BeginStep(Bench.Step(10, [[.. Enumerable.Range(0, Tokens)]], [table]));
            float[] values = bench.Values(Tokens * (Width + KvWidth));
            bench.Store(bench.Tensor(Width + KvWidth, values), Heads, rope, cache, 0);

            // Other queries, with the keys and values that the other rows have stored there.
            float[] queries = bench.Values(positions.Length * Width);
            float[] mine = [.. positions.SelectMany((position, row) =>
                queries[(row * Width)..((row + 1) * Width)].Concat(Bench.Row(values, Width + KvWidth, position)[Width..]))];
            int[][] rows = [.. positions.Select(position => new[] { position })];
            bench.Backend.BeginStep(Bench.Step(10, rows, [.. rows.Select(_ => table)]));
            Tensor output = bench.Backend.AllocateTensor(rows.Length, Width);
            bench.Attend(bench.Tensor(Width + KvWidth, mine), Heads, rope, cache, 0, output, 0.3f);
            return Bench.Read(output, positions.Length);
        });
    }

    /// <summary>
    /// Sixteen keys from each of several far positions on, attended by queries at near ones: angles are products rounded to fp32.
    /// </summary>
    [Fact]
    public void Keys_at_far_positions_are_rotated_as_the_reference_does()
    {
        Assert.SkipWhen(Rounding > 0, "The angles' rounding is lost in that of the keys.");
        Compare(New(), 9, 3e-5, bench =>
        {
            const int HeadDim = 32, MaxBlocks = 131072 / KvCache.BlockTokens;
            int[] far = [4096, 65520, 65536, 100000, 131056];
            KvCache cache = bench.Cache(1, 2 * far.Length, 1, HeadDim);
            RopeTable rope = bench.Rope(HeadDim, 131072);
            int[][] tables = [.. far.Select((first, s) =>
            {
                int[] table = new int[MaxBlocks];
                table[first / KvCache.BlockTokens] = s;
                return table;
            })];
            bench.Backend.BeginStep(Bench.Step(MaxBlocks, [.. far.Select(first => Enumerable.Range(first, 16).ToArray())], tables));
            bench.Store(bench.Tensor(16 * far.Length, 3 * HeadDim), 1, rope, cache, 0);

            // The far keys are the first block of each; the near rows' own are in a second.
            int[][] near = [.. far.Select(_ => new[] { 16, 19, 31 })];
            bench.Backend.BeginStep(Bench.Step(2, near, [.. far.Select((_, s) => new[] { s, far.Length + s })]));
            Tensor output = bench.Backend.AllocateTensor(3 * far.Length, HeadDim);
            bench.Attend(bench.Tensor(3 * far.Length, 3 * HeadDim), 1, rope, cache, 0, output, 0.5f);
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
                KvCache cache = bench.Cache(1, 2, KvHeads, HeadDim);
                RopeTable rope = bench.Rope(HeadDim, 32);
                Weight queryNorm = bench.Weight(1, HeadDim), keyNorm = bench.Weight(1, HeadDim);
                bench.Backend.BeginStep(Bench.Step(1, 2, _ => (0, Tokens), (_, b) => 1 - b));
                Tensor first = bench.Tensor(Tokens, 8 * HeadDim), qkv = bench.Tensor(Tokens, 8 * HeadDim, 2e-3f);
                Tensor output = bench.Backend.AllocateTensor(Tokens, Heads * HeadDim);
                float scale = ofQueries && ofKeys ? 9f : ofQueries || ofKeys ? 3000f : 1e6f;
                bench.Attend(first, Heads, rope, cache, 0, output, 1f, queryNorm, keyNorm, 1e-6f);
                bench.Attend(qkv, Heads, rope, cache, 0, output, scale, ofQueries ? queryNorm : null, ofKeys ? keyNorm : null, 1e-5f);
                return [.. Bench.Read(output, Tokens).Select(v => v * 500)];
            });
        }
    }

    /// <summary>Scores whose exponentials overflow, rising, falling and equal: only their differences count.</summary>
    [Theory]
    [InlineData(-2100f, 15f)]
    [InlineData(2100f, -15f)]
    [InlineData(-100f, -15f)]
    [InlineData(-3000f, 0f)]
    public void Scores_of_any_size_have_weights(float first, float rise)
    {
        Compare(New(), 8, 2e-5, bench =>
        {
            // Without rotation a query with a single 1 picks the first number of every key.
            const int HeadDim = 16, Tokens = 130;
            KvCache cache = bench.Cache(1, 9, 1, HeadDim);
            RopeTable still = bench.Backend.AllocateRopeTable(new float[HeadDim / 2], Tokens);
            float[] rows = bench.Values(Tokens * 3 * HeadDim);
            for (int t = 0; t < Tokens; t++)
            {
                rows.AsSpan(t * 3 * HeadDim, 2 * HeadDim).Clear();
                (rows[t * 3 * HeadDim], rows[(t * 3 * HeadDim) + HeadDim]) = (1f, first + (t * rise));
            }

            bench.Backend.BeginStep(Bench.Step(9, [[.. Enumerable.Range(0, Tokens)]], [[.. Enumerable.Range(0, 9)]]));
            Tensor qkv = bench.Tensor(3 * HeadDim, rows), output = bench.Backend.AllocateTensor(Tokens, HeadDim);
            bench.Attend(qkv, 1, still, cache, 0, output);
            return Bench.Read(output, Tokens);
        });
    }

    [Fact]
    public void Caches_with_other_heads_are_attended_to_in_one_step()
    {
        Compare(New(), 6, 2e-5, bench =>
        {
            // Groups of 1, 8 and 20 heads, and of 80, which exceed a tile.
            const int HeadDim = 16, Tokens = 70;
            RopeTable rope = bench.Rope(HeadDim, Tokens);
            List<float> results = [];
            bench.Backend.BeginStep(Bench.Step(1, 5, _ => (0, Tokens), (_, b) => b));
            foreach ((int heads, int kvHeads) in new[] { (8, 8), (8, 1), (20, 1), (80, 1), (2, 2) })
            {
                KvCache cache = bench.Cache(1, 5, kvHeads, HeadDim);
                Tensor qkv = bench.Tensor(Tokens, (heads + (2 * kvHeads)) * HeadDim);
                Tensor output = bench.Backend.AllocateTensor(Tokens, heads * HeadDim);
                bench.Attend(qkv, heads, rope, cache, 0, output, 0.3f);
                results.AddRange(Bench.Read(output, Tokens));
            }

            return [.. results];
        });
    }
}
