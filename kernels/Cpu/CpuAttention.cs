using System.Runtime.CompilerServices;

namespace Rollout.Kernels;

/// <summary>
/// Causal attention with grouped queries over paged keys and values, with the running maximum of Milakov and Gimelshein ("Online normalizer
/// calculation for softmax", 2018) and Dao et al. ("FlashAttention", 2022). The context is processed in chunks of 64 tokens from position
/// 0, for as many queries at a time as registers hold: a chunk's scores, then its maximum, weights and sum, then its values. Every query
/// has its own maximum, sum (16 lanes, token mod 16) and weighted values, and sees the same operations in the same order whichever other
/// queries share its tile, so its bits depend on its own sequence up to its position only.
/// <para>Units: tile of rows x key-value head; later rows, which have more to read, first.</para>
/// </summary>
internal abstract unsafe class AttentionJob : Job, IDisposable
{
    /// <summary>Queries of a tile: rows x query heads of one key-value head.</summary>
    public const int TileQueries = 64;

    /// <summary>
    /// Blocks after which the maximum is updated and sums are written back: often enough to stay in the first-level cache, seldom enough to
    /// cost little.
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

    /// <summary>Allocates each worker's scratch in native memory; only when a group of heads is larger than any before.</summary>
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

internal sealed unsafe partial class AttentionJob<TLanes> : AttentionJob
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
    /// Adds the first <paramref name="tokens"/> tokens of the chunk at the start of <paramref name="blocks"/> to <paramref name="count"/>
    /// queries, and prefetches the block after each: blocks are scattered, so the hardware cannot predict it.
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
            new Span<long>(ahead, ChunkBlocks).Clear(); // prefetching once is enough
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
}
