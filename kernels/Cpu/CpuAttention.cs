using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics.X86;

namespace Rollout.Kernels;

/// <summary>
/// The step's rows in tiles that read keys and values together: rows of one sequence, or of sequences whose tables begin with the same
/// blocks (samples of one prompt). Chunks that all rows of a tile see whole are read once for the tile.
/// </summary>
internal sealed class AttentionTiles
{
    private int[] _start = [];
    private int[] _shared = [];

    public int Count { get; private set; }

    public int Start(int tile) => _start[tile];

    public int End(int tile) => _start[tile + 1];

    /// <summary>Leading chunks that are the same and complete for every row of the tile.</summary>
    public int SharedChunks(int tile) => _shared[tile] / AttentionJob.ChunkBlocks;

    public void Build(StepLayout step, int[] rowSequence, int rowsPerTile)
    {
        if (_start.Length < step.TokenIds.Length + 1)
        {
            _start = new int[step.TokenIds.Length + 1];
            _shared = new int[step.TokenIds.Length + 1];
        }

        Count = 0;
        for (int row = 0; row < step.RowCount;)
        {
            int first = row;
            for (row++; row < step.RowCount; row++)
            {
                // Sequences that share nothing are not worth a coarser unit of work.
                int a = rowSequence[row - 1], b = rowSequence[row];
                int whole = Math.Min(WholeBlocks(step, row - 1), WholeBlocks(step, row));
                if (a != b && Common(step, a, b, whole) < AttentionJob.ChunkBlocks)
                    break;
            }

            RowTiles tiles = new(row - first, rowsPerTile);
            for (int tile = 0; tile < tiles.Count; tile++)
                Add(step, rowSequence, first + tiles.Start(tile), tiles.Height(tile));
        }

        _start[Count] = step.RowCount;
    }

    private void Add(StepLayout step, int[] rowSequence, int first, int rows)
    {
        int shared = WholeBlocks(step, first);
        for (int row = first + 1; row < first + rows; row++)
            shared = Common(step, rowSequence[row - 1], rowSequence[row], Math.Min(shared, WholeBlocks(step, row)));
        _start[Count] = first;
        _shared[Count++] = shared;
    }

    private static int WholeBlocks(StepLayout step, int row) => (step.Positions[row] + 1) / KvCache.BlockTokens;

    private static int Common(StepLayout step, int a, int b, int limit)
    {
        if (a == b)
            return limit;
        int n = 0;
        while (n < limit && step.BlockTables[(a * step.MaxBlocks) + n] == step.BlockTables[(b * step.MaxBlocks) + n])
            n++;
        return n;
    }
}

/// <summary>
/// Causal attention with grouped queries over paged keys and values, with the running maximum of Milakov and Gimelshein ("Online normalizer
/// calculation for softmax", 2018) and Dao et al. ("FlashAttention", 2022). The context is walked in chunks of 64 tokens from position 0,
/// as many queries at a time as registers hold: a chunk's scores, then its maximum, weights and sum, then its values.
/// Every query has its own maximum, sum (16 lanes, token mod 16) and weighted values, and sees the same operations in the same order
/// whichever other queries share its tile, so its bits depend on its own sequence up to its position only.
/// <para>Units: tile of rows x key-value head; later rows, which have more to read, first.</para>
/// </summary>
internal abstract unsafe class AttentionJob : Job, IDisposable
{
    /// <summary>Queries of a tile: rows x query heads of one key-value head.</summary>
    public const int TileQueries = 64;

    /// <summary>
    /// Blocks after which a maximum is looked for and sums are written back: often enough to stay in the first-level cache, seldom enough
    /// to cost little.
    /// </summary>
    public const int ChunkBlocks = 4;

    public const int ChunkTokens = ChunkBlocks * KvCache.BlockTokens;

    /// <summary>Floats from one query's vector to the next; fixed, so that eight of them need one address register.</summary>
    public const int HeadStride = MostHeadDim + 16;

    /// <summary>Elements of a key or a value.</summary>
    public const int MostHeadDim = 512;

    public float* Qkv;
    public int Stride;
    public int Group;
    public float Scale;
    public CpuKvLayer Cache;
    public float* Output;
    public int OutputStride;
    public StepLayout Step = null!;
    public int[] RowSequence = [];
    public AttentionTiles Tiles = null!;

    private NativeBuffer? _scratch;
    private int _queries;
    private int _workers;

    public int Units => Tiles.Count * Cache.KvHeads;

    /// <summary>Takes each worker's scratch; native, and only when a larger group of heads than ever before appears.</summary>
    public void Reserve(int workers, int queries)
    {
        queries = Math.Max(queries, TileQueries) + 8;
        if (queries <= _queries && workers <= _workers)
            return;
        _scratch?.Dispose();
        _queries = queries;
        _workers = workers;
        _scratch = new NativeBuffer((long)workers * ((queries * FloatsPerQuery) + (8 * ChunkTokens)) * sizeof(float));
    }

    public void Dispose() => _scratch?.Dispose();

    private const int FloatsPerQuery = (2 * HeadStride) + KvCache.BlockTokens + 16;

    protected Scratch ScratchOf(int worker)
    {
        Scratch s;
        s.Weights = _scratch!.Floats + ((long)worker * ((_queries * FloatsPerQuery) + (8 * ChunkTokens)));
        s.Queries = s.Weights + (8 * ChunkTokens);
        s.Values = s.Queries + (_queries * HeadStride);
        s.Sums = s.Values + (_queries * HeadStride);
        s.Maxima = s.Sums + (_queries * KvCache.BlockTokens);
        return s;
    }

    /// <summary>
    /// Scores, then weights, of the queries in registers: [8][ChunkTokens]. Per query of the tile: [HeadStride] query, [HeadStride]
    /// weighted values, [16] sums, maximum.
    /// </summary>
    protected struct Scratch
    {
        public float* Weights;
        public float* Queries;
        public float* Values;
        public float* Sums;
        public float* Maxima;
    }
}

internal sealed unsafe class AttentionJob<TLanes> : AttentionJob
    where TLanes : unmanaged, ILanes<TLanes>
{
    public override void Execute(int unit, int worker)
    {
        int tile = Tiles.Count - 1 - (unit / Cache.KvHeads);
        int kvHead = unit % Cache.KvHeads;
        int keyDim = Cache.KeyDim, valueDim = Cache.ValueDim;
        int start = Tiles.Start(tile), end = Tiles.End(tile);
        Scratch scratch = ScratchOf(worker);

        int queries = (end - start) * Group;
        for (int q = 0; q < queries; q++)
        {
            float* source = Qkv + ((long)(start + (q / Group)) * Stride) + (((kvHead * Group) + (q % Group)) * keyDim);
            new ReadOnlySpan<float>(source, keyDim).CopyTo(new Span<float>(scratch.Queries + (q * HeadStride), keyDim));
            new Span<float>(scratch.Values + (q * HeadStride), Cache.ValueStride).Clear();
            new Span<float>(scratch.Sums + (q * KvCache.BlockTokens), KvCache.BlockTokens).Clear();
            scratch.Maxima[q] = float.NegativeInfinity;
        }

        ReadOnlySpan<int> blocks = BlocksOf(start);
        int shared = Tiles.SharedChunks(tile);
        for (int chunk = 0; chunk < shared; chunk++)
            Chunk(scratch, 0, queries, blocks[(chunk * ChunkBlocks)..], kvHead, ChunkTokens);

        for (int row = start; row < end; row++)
        {
            blocks = BlocksOf(row);
            for (int chunk = shared; chunk * ChunkTokens <= Step.Positions[row]; chunk++)
            {
                int tokens = Math.Min(ChunkTokens, Step.Positions[row] + 1 - (chunk * ChunkTokens));
                Chunk(scratch, (row - start) * Group, Group, blocks[(chunk * ChunkBlocks)..], kvHead, tokens);
            }
        }

        for (int q = 0; q < queries; q++)
        {
            float* output = Output + ((long)(start + (q / Group)) * OutputStride) + (((kvHead * Group) + (q % Group)) * valueDim);
            Finish(scratch.Values + (q * HeadStride), scratch.Sums + (q * KvCache.BlockTokens), output, valueDim);
        }
    }

    /// <summary>The blocks of a row's sequence that it sees, in order.</summary>
    private ReadOnlySpan<int> BlocksOf(int row) =>
        Step.BlockTables.AsSpan(RowSequence[row] * Step.MaxBlocks, (Step.Positions[row] / KvCache.BlockTokens) + 1);

    /// <summary>
    /// Takes the first <paramref name="tokens"/> tokens of the chunk that <paramref name="blocks"/> begin with into <paramref name="count"/>
    /// queries, and asks for the block after each: blocks lie anywhere, so the hardware cannot guess it.
    /// </summary>
    private void Chunk(in Scratch scratch, int first, int count, ReadOnlySpan<int> blocks, int kvHead, int tokens)
    {
        int blockCount = (tokens + KvCache.BlockTokens - 1) / KvCache.BlockTokens;
        float** keys = stackalloc float*[ChunkBlocks];
        float** values = stackalloc float*[ChunkBlocks];
        long* ahead = stackalloc long[ChunkBlocks];
        for (int b = 0; b < blockCount; b++)
        {
            keys[b] = Cache.Keys(blocks[b], kvHead);
            values[b] = Cache.Values(blocks[b], kvHead);
            ahead[b] = Cache.Keys(blocks[Math.Min(b + 1, blocks.Length - 1)], kvHead) - keys[b];
        }

        for (int q = 0; q < count; q += TLanes.Queries)
        {
            int together = Math.Min(TLanes.Queries, count - q);
            float* queries = scratch.Queries + ((first + q) * HeadStride);
            int b = 0;
            for (; b + 1 < blockCount && TLanes.Columns > 1; b += 2)
                Scores<Columns2>(together, queries, keys + b, ahead + b, Cache.KeyDim, scratch.Weights + (b * KvCache.BlockTokens));
            for (; b < blockCount; b++)
                Scores<Columns1>(together, queries, keys + b, ahead + b, Cache.KeyDim, scratch.Weights + (b * KvCache.BlockTokens));
            Weigh(scratch, first + q, together, tokens);
            AddValues(together, scratch.Weights, values, ahead, Cache.ValueStride, tokens, scratch.Values + ((first + q) * HeadStride));
            new Span<long>(ahead, ChunkBlocks).Clear(); // asked for once is enough
        }
    }

    /// <summary>Scores become weights relative to the running maximum; what was summed before is rescaled when the maximum moves.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private void Weigh(in Scratch scratch, int first, int count, int tokens)
    {
        TLanes scale = TLanes.Create(Scale);
        int end = (tokens + KvCache.BlockTokens - 1) / KvCache.BlockTokens * KvCache.BlockTokens;
        int rest = tokens % KvCache.BlockTokens;
        TLanes seen = TLanes.Create(0f);
        if (rest > 0)
        {
            float* index = stackalloc float[KvCache.BlockTokens];
            for (int t = 0; t < KvCache.BlockTokens; t++)
                index[t] = t;
            seen = TLanes.Less(TLanes.Load(index), TLanes.Create(rest));
        }

        for (int q = 0; q < count; q++)
        {
            float* weights = scratch.Weights + (q * ChunkTokens);
            TLanes most = TLanes.Create(float.NegativeInfinity);
            for (int t = 0; t < end; t += KvCache.BlockTokens)
            {
                TLanes scores = TLanes.Load(weights + t) * scale;
                if (t + KvCache.BlockTokens > tokens)
                    scores = TLanes.Select(seen, scores, TLanes.Create(float.NegativeInfinity));
                TLanes.Store(weights + t, scores);
                most = TLanes.Max(most, scores);
            }

            float* sums = scratch.Sums + ((first + q) * KvCache.BlockTokens);
            TLanes sum = TLanes.Load(sums);
            float largest = TLanes.Largest(most);
            if (largest > scratch.Maxima[first + q])
            {
                TLanes factor = VectorMath.Exp(TLanes.Create(scratch.Maxima[first + q] - largest));
                scratch.Maxima[first + q] = largest;
                sum *= factor;
                float* values = scratch.Values + ((first + q) * HeadStride);
                for (int d = 0; d < Cache.ValueStride; d += LaneMemory.Count)
                    TLanes.Store(values + d, TLanes.Load(values + d) * factor);
            }

            TLanes maximum = TLanes.Create(scratch.Maxima[first + q]);
            for (int t = 0; t < end; t += KvCache.BlockTokens)
            {
                TLanes weight = VectorMath.Exp(TLanes.Load(weights + t) - maximum);
                TLanes.Store(weights + t, weight);
                sum += weight;
            }

            TLanes.Store(sums, sum);
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Finish(float* values, float* sums, float* output, int valueDim)
    {
        // Adding zero turns -0 into +0: the sign of an underflow is the one thing that rescaling could change.
        float inverse = 1f / TLanes.Sum(TLanes.Load(sums));
        TLanes factor = TLanes.Create(inverse);
        int d = 0;
        for (; d + LaneMemory.Count <= valueDim; d += LaneMemory.Count)
            TLanes.Store(output + d, (TLanes.Load(values + d) * factor) + TLanes.Create(0f));
        for (; d < valueDim; d++)
            output[d] = (values[d] * inverse) + 0f;
    }

    private static void Scores<TColumns>(int count, float* queries, float** keys, long* ahead, int headDim, float* scores)
        where TColumns : struct, ICount
    {
        switch (count)
        {
            case 1: Scores<Queries1, TColumns>(queries, keys, ahead, headDim, scores); break;
            case 2: Scores<Queries2, TColumns>(queries, keys, ahead, headDim, scores); break;
            case 3: Scores<Queries3, TColumns>(queries, keys, ahead, headDim, scores); break;
            case 4: Scores<Queries4, TColumns>(queries, keys, ahead, headDim, scores); break;
            case 5: Scores<Queries5, TColumns>(queries, keys, ahead, headDim, scores); break;
            case 6: Scores<Queries6, TColumns>(queries, keys, ahead, headDim, scores); break;
            case 7: Scores<Queries7, TColumns>(queries, keys, ahead, headDim, scores); break;
            default: Scores<Queries8, TColumns>(queries, keys, ahead, headDim, scores); break;
        }
    }

    /// <summary>
    /// scores [queries][ChunkTokens], 16 of them a column, = queries [queries][headDim] x a block's keys [headDim][16 tokens] a column: one
    /// chain over headDim a lane. What is broadcast of a query serves both columns: broadcasts would take longer than the products.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Scores<TQueries, TColumns>(float* queries, float** keys, long* ahead, int headDim, float* scores)
        where TQueries : struct, ICount
        where TColumns : struct, ICount
    {
        TLanes zero = TLanes.Create(0f);
        TLanes a0 = zero, b0 = zero;
        TLanes a1 = zero, b1 = zero;
        TLanes a2 = zero, b2 = zero;
        TLanes a3 = zero, b3 = zero;
        TLanes a4 = zero, b4 = zero;
        TLanes a5 = zero, b5 = zero;
        TLanes a6 = zero, b6 = zero;
        TLanes a7 = zero, b7 = zero;
        float* left = keys[0], right = TColumns.Count > 1 ? keys[1] : null;
        long nextLeft = ahead[0], nextRight = TColumns.Count > 1 ? ahead[1] : 0;
        for (int d = 0; d < headDim; d++)
        {
            if (Sse.IsSupported)
            {
                Sse.Prefetch0(left + nextLeft);
                if (TColumns.Count > 1)
                    Sse.Prefetch0(right + nextRight);
            }

            TLanes k = TLanes.Load(left), l = TColumns.Count > 1 ? TLanes.Load(right) : zero;
            left += KvCache.BlockTokens;
            right += KvCache.BlockTokens;
            {
                TLanes x = TLanes.Create(queries[(0 * HeadStride) + d]);
                a0 = TLanes.Fma(x, k, a0);
                if (TColumns.Count > 1)
                    b0 = TLanes.Fma(x, l, b0);
            }

            if (TQueries.Count > 1)
            {
                TLanes x = TLanes.Create(queries[(1 * HeadStride) + d]);
                a1 = TLanes.Fma(x, k, a1);
                if (TColumns.Count > 1)
                    b1 = TLanes.Fma(x, l, b1);
            }

            if (TQueries.Count > 2)
            {
                TLanes x = TLanes.Create(queries[(2 * HeadStride) + d]);
                a2 = TLanes.Fma(x, k, a2);
                if (TColumns.Count > 1)
                    b2 = TLanes.Fma(x, l, b2);
            }

            if (TQueries.Count > 3)
            {
                TLanes x = TLanes.Create(queries[(3 * HeadStride) + d]);
                a3 = TLanes.Fma(x, k, a3);
                if (TColumns.Count > 1)
                    b3 = TLanes.Fma(x, l, b3);
            }

            if (TQueries.Count > 4)
            {
                TLanes x = TLanes.Create(queries[(4 * HeadStride) + d]);
                a4 = TLanes.Fma(x, k, a4);
                if (TColumns.Count > 1)
                    b4 = TLanes.Fma(x, l, b4);
            }

            if (TQueries.Count > 5)
            {
                TLanes x = TLanes.Create(queries[(5 * HeadStride) + d]);
                a5 = TLanes.Fma(x, k, a5);
                if (TColumns.Count > 1)
                    b5 = TLanes.Fma(x, l, b5);
            }

            if (TQueries.Count > 6)
            {
                TLanes x = TLanes.Create(queries[(6 * HeadStride) + d]);
                a6 = TLanes.Fma(x, k, a6);
                if (TColumns.Count > 1)
                    b6 = TLanes.Fma(x, l, b6);
            }

            if (TQueries.Count > 7)
            {
                TLanes x = TLanes.Create(queries[(7 * HeadStride) + d]);
                a7 = TLanes.Fma(x, k, a7);
                if (TColumns.Count > 1)
                    b7 = TLanes.Fma(x, l, b7);
            }
        }

        Store<TColumns>(scores + (0 * ChunkTokens), a0, b0);
        if (TQueries.Count > 1)
            Store<TColumns>(scores + (1 * ChunkTokens), a1, b1);
        if (TQueries.Count > 2)
            Store<TColumns>(scores + (2 * ChunkTokens), a2, b2);
        if (TQueries.Count > 3)
            Store<TColumns>(scores + (3 * ChunkTokens), a3, b3);
        if (TQueries.Count > 4)
            Store<TColumns>(scores + (4 * ChunkTokens), a4, b4);
        if (TQueries.Count > 5)
            Store<TColumns>(scores + (5 * ChunkTokens), a5, b5);
        if (TQueries.Count > 6)
            Store<TColumns>(scores + (6 * ChunkTokens), a6, b6);
        if (TQueries.Count > 7)
            Store<TColumns>(scores + (7 * ChunkTokens), a7, b7);
    }

    private static void AddValues(int count, float* weights, float** values, long* ahead, int stride, int tokens, float* sums)
    {
        int d = 0;
        for (; d + (2 * LaneMemory.Count) <= stride && TLanes.Columns > 1; d += 2 * LaneMemory.Count)
            AddValues<Columns2>(count, weights, values, ahead, d, stride, tokens, sums);
        for (; d < stride; d += LaneMemory.Count)
            AddValues<Columns1>(count, weights, values, ahead, d, stride, tokens, sums);
    }

    private static void AddValues<TColumns>(
        int count, float* weights, float** values, long* ahead, int d, int stride, int tokens, float* sums)
        where TColumns : struct, ICount
    {
        switch (count)
        {
            case 1: AddValues<Queries1, TColumns>(weights, values, ahead, d, stride, tokens, sums); break;
            case 2: AddValues<Queries2, TColumns>(weights, values, ahead, d, stride, tokens, sums); break;
            case 3: AddValues<Queries3, TColumns>(weights, values, ahead, d, stride, tokens, sums); break;
            case 4: AddValues<Queries4, TColumns>(weights, values, ahead, d, stride, tokens, sums); break;
            case 5: AddValues<Queries5, TColumns>(weights, values, ahead, d, stride, tokens, sums); break;
            case 6: AddValues<Queries6, TColumns>(weights, values, ahead, d, stride, tokens, sums); break;
            case 7: AddValues<Queries7, TColumns>(weights, values, ahead, d, stride, tokens, sums); break;
            default: AddValues<Queries8, TColumns>(weights, values, ahead, d, stride, tokens, sums); break;
        }
    }

    /// <summary>
    /// sums [queries][HeadStride] += weights [queries][ChunkTokens] x values [blocks] of [16 tokens][stride], over ascending tokens, for
    /// one or two columns of 16 from <paramref name="d"/> on.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void AddValues<TQueries, TColumns>(
        float* weights, float** values, long* ahead, int d, int stride, int tokens, float* sums)
        where TQueries : struct, ICount
        where TColumns : struct, ICount
    {
        sums += d;
        TLanes zero = TLanes.Create(0f);
        TLanes a0 = TQueries.Count > 0 ? TLanes.Load(sums + (0 * HeadStride)) : zero;
        TLanes a1 = TQueries.Count > 1 ? TLanes.Load(sums + (1 * HeadStride)) : zero;
        TLanes a2 = TQueries.Count > 2 ? TLanes.Load(sums + (2 * HeadStride)) : zero;
        TLanes a3 = TQueries.Count > 3 ? TLanes.Load(sums + (3 * HeadStride)) : zero;
        TLanes a4 = TQueries.Count > 4 ? TLanes.Load(sums + (4 * HeadStride)) : zero;
        TLanes a5 = TQueries.Count > 5 ? TLanes.Load(sums + (5 * HeadStride)) : zero;
        TLanes a6 = TQueries.Count > 6 ? TLanes.Load(sums + (6 * HeadStride)) : zero;
        TLanes a7 = TQueries.Count > 7 ? TLanes.Load(sums + (7 * HeadStride)) : zero;
        TLanes b0 = TQueries.Count > 0 && TColumns.Count > 1 ? TLanes.Load(sums + (0 * HeadStride) + LaneMemory.Count) : zero;
        TLanes b1 = TQueries.Count > 1 && TColumns.Count > 1 ? TLanes.Load(sums + (1 * HeadStride) + LaneMemory.Count) : zero;
        TLanes b2 = TQueries.Count > 2 && TColumns.Count > 1 ? TLanes.Load(sums + (2 * HeadStride) + LaneMemory.Count) : zero;
        TLanes b3 = TQueries.Count > 3 && TColumns.Count > 1 ? TLanes.Load(sums + (3 * HeadStride) + LaneMemory.Count) : zero;
        TLanes b4 = TQueries.Count > 4 && TColumns.Count > 1 ? TLanes.Load(sums + (4 * HeadStride) + LaneMemory.Count) : zero;
        TLanes b5 = TQueries.Count > 5 && TColumns.Count > 1 ? TLanes.Load(sums + (5 * HeadStride) + LaneMemory.Count) : zero;
        TLanes b6 = TQueries.Count > 6 && TColumns.Count > 1 ? TLanes.Load(sums + (6 * HeadStride) + LaneMemory.Count) : zero;
        TLanes b7 = TQueries.Count > 7 && TColumns.Count > 1 ? TLanes.Load(sums + (7 * HeadStride) + LaneMemory.Count) : zero;
        for (int block = 0; block * KvCache.BlockTokens < tokens; block++)
        {
            float* value = values[block] + d;
            float* w = weights + (block * KvCache.BlockTokens);
            long next = ahead[block];
            int count = Math.Min(KvCache.BlockTokens, tokens - (block * KvCache.BlockTokens));
            for (int t = 0; t < count; t++)
            {
                if (Sse.IsSupported)
                {
                    Sse.Prefetch0(value + next);
                    if (TColumns.Count > 1)
                        Sse.Prefetch0(value + next + LaneMemory.Count);
                }

                TLanes v = TLanes.Load(value), u = TColumns.Count > 1 ? TLanes.Load(value + LaneMemory.Count) : zero;
                value += stride;
                {
                    TLanes x = TLanes.Create(w[(0 * ChunkTokens) + t]);
                    a0 = TLanes.Fma(x, v, a0);
                    if (TColumns.Count > 1)
                        b0 = TLanes.Fma(x, u, b0);
                }

                if (TQueries.Count > 1)
                {
                    TLanes x = TLanes.Create(w[(1 * ChunkTokens) + t]);
                    a1 = TLanes.Fma(x, v, a1);
                    if (TColumns.Count > 1)
                        b1 = TLanes.Fma(x, u, b1);
                }

                if (TQueries.Count > 2)
                {
                    TLanes x = TLanes.Create(w[(2 * ChunkTokens) + t]);
                    a2 = TLanes.Fma(x, v, a2);
                    if (TColumns.Count > 1)
                        b2 = TLanes.Fma(x, u, b2);
                }

                if (TQueries.Count > 3)
                {
                    TLanes x = TLanes.Create(w[(3 * ChunkTokens) + t]);
                    a3 = TLanes.Fma(x, v, a3);
                    if (TColumns.Count > 1)
                        b3 = TLanes.Fma(x, u, b3);
                }

                if (TQueries.Count > 4)
                {
                    TLanes x = TLanes.Create(w[(4 * ChunkTokens) + t]);
                    a4 = TLanes.Fma(x, v, a4);
                    if (TColumns.Count > 1)
                        b4 = TLanes.Fma(x, u, b4);
                }

                if (TQueries.Count > 5)
                {
                    TLanes x = TLanes.Create(w[(5 * ChunkTokens) + t]);
                    a5 = TLanes.Fma(x, v, a5);
                    if (TColumns.Count > 1)
                        b5 = TLanes.Fma(x, u, b5);
                }

                if (TQueries.Count > 6)
                {
                    TLanes x = TLanes.Create(w[(6 * ChunkTokens) + t]);
                    a6 = TLanes.Fma(x, v, a6);
                    if (TColumns.Count > 1)
                        b6 = TLanes.Fma(x, u, b6);
                }

                if (TQueries.Count > 7)
                {
                    TLanes x = TLanes.Create(w[(7 * ChunkTokens) + t]);
                    a7 = TLanes.Fma(x, v, a7);
                    if (TColumns.Count > 1)
                        b7 = TLanes.Fma(x, u, b7);
                }
            }
        }

        Store<TColumns>(sums + (0 * HeadStride), a0, b0);
        if (TQueries.Count > 1)
            Store<TColumns>(sums + (1 * HeadStride), a1, b1);
        if (TQueries.Count > 2)
            Store<TColumns>(sums + (2 * HeadStride), a2, b2);
        if (TQueries.Count > 3)
            Store<TColumns>(sums + (3 * HeadStride), a3, b3);
        if (TQueries.Count > 4)
            Store<TColumns>(sums + (4 * HeadStride), a4, b4);
        if (TQueries.Count > 5)
            Store<TColumns>(sums + (5 * HeadStride), a5, b5);
        if (TQueries.Count > 6)
            Store<TColumns>(sums + (6 * HeadStride), a6, b6);
        if (TQueries.Count > 7)
            Store<TColumns>(sums + (7 * HeadStride), a7, b7);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Store<TColumns>(float* destination, TLanes left, TLanes right)
        where TColumns : struct, ICount
    {
        TLanes.Store(destination, left);
        if (TColumns.Count > 1)
            TLanes.Store(destination + LaneMemory.Count, right);
    }

    private interface ICount
    {
        static abstract int Count { get; }
    }

    private readonly struct Columns1 : ICount
    {
        public static int Count => 1;
    }

    private readonly struct Columns2 : ICount
    {
        public static int Count => 2;
    }

    private readonly struct Queries1 : ICount
    {
        public static int Count => 1;
    }

    private readonly struct Queries2 : ICount
    {
        public static int Count => 2;
    }

    private readonly struct Queries3 : ICount
    {
        public static int Count => 3;
    }

    private readonly struct Queries4 : ICount
    {
        public static int Count => 4;
    }

    private readonly struct Queries5 : ICount
    {
        public static int Count => 5;
    }

    private readonly struct Queries6 : ICount
    {
        public static int Count => 6;
    }

    private readonly struct Queries7 : ICount
    {
        public static int Count => 7;
    }

    private readonly struct Queries8 : ICount
    {
        public static int Count => 8;
    }
}
