using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics.X86;

namespace Rollout.Kernels;

/// <summary>
/// The step's rows in tiles that read keys and values together: rows of one sequence, or of sequences whose tables begin with the same
/// blocks (samples of one prompt). Blocks that all rows of a tile see whole are read once for the tile.
/// </summary>
internal sealed class AttentionTiles
{
    private int[] _start = [];
    private int[] _shared = [];

    public int Count { get; private set; }

    public int Start(int tile) => _start[tile];

    public int End(int tile) => _start[tile + 1];

    /// <summary>Leading blocks that are the same and complete for every row of the tile.</summary>
    public int Shared(int tile) => _shared[tile];

    public void Build(StepLayout step, int[] rowSequence, int rowsPerTile)
    {
        if (_start.Length < step.TokenIds.Length + 1)
        {
            _start = new int[step.TokenIds.Length + 1];
            _shared = new int[step.TokenIds.Length + 1];
        }

        int rows = step.RowCount;
        Count = 0;
        int row = 0;
        while (row < rows)
        {
            int first = row;
            int shared = WholeBlocks(step, row);
            for (row++; row < rows && row - first < rowsPerTile; row++)
            {
                if (rowSequence[row] == rowSequence[row - 1])
                    continue;
                int common = Common(step, rowSequence[row - 1], rowSequence[row], Math.Min(shared, WholeBlocks(step, row)));

                // Sharing less than two blocks is not worth a coarser unit of work.
                if (common < 2)
                    break;
                shared = common;
            }

            _start[Count] = first;
            _shared[Count++] = shared;
        }

        _start[Count] = rows;
    }

    private static int WholeBlocks(StepLayout step, int row) => (step.Positions[row] + 1) / KvCache.BlockTokens;

    private static int Common(StepLayout step, int a, int b, int limit)
    {
        int n = 0;
        while (n < limit && step.BlockTables[(a * step.MaxBlocks) + n] == step.BlockTables[(b * step.MaxBlocks) + n])
            n++;
        return n;
    }
}

/// <summary>
/// Causal attention with grouped queries over paged keys and values, with the running maximum of Milakov and Gimelshein ("Online normalizer
/// calculation for softmax", 2018) and Dao et al. ("FlashAttention", 2022). The context is walked in blocks of 16 tokens from position 0.
/// Every query has its own maximum, sum (16 lanes, token mod 16) and weighted values, and sees the same operations in the same order
/// whichever other queries share its tile, so its bits depend on its own sequence up to its position only.
/// <para>Units: tile of rows x key-value head; later rows, which have more to read, first.</para>
/// </summary>
internal abstract unsafe class AttentionJob : Job, IDisposable
{
    /// <summary>Queries of a tile: rows x query heads of one key-value head.</summary>
    public const int TileQueries = 64;

    /// <summary>Floats from one query's vector to the next; fixed, so that eight of them need one address register.</summary>
    public const int HeadStride = 512 + 16;

    public float* Qkv;
    public int Stride;
    public int Group;
    public float Scale;
    public CpuKvCache Cache = null!;
    public int Layer;
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
        _scratch = new NativeBuffer((long)workers * queries * FloatsPerQuery * sizeof(float));
    }

    public void Dispose() => _scratch?.Dispose();

    private const int FloatsPerQuery = (2 * HeadStride) + (2 * KvCache.BlockTokens) + 16;

    protected Scratch ScratchOf(int worker)
    {
        float* p = _scratch!.Floats + ((long)worker * _queries * FloatsPerQuery);
        Scratch s;
        s.Queries = p;
        s.Values = s.Queries + (_queries * HeadStride);
        s.Weights = s.Values + (_queries * HeadStride);
        s.Sums = s.Weights + (_queries * KvCache.BlockTokens);
        s.Maxima = s.Sums + (_queries * KvCache.BlockTokens);
        return s;
    }

    /// <summary>Per query: [HeadStride] query, [HeadStride] weighted values, [16] scores then weights, [16] sums, maximum.</summary>
    protected struct Scratch
    {
        public float* Queries;
        public float* Values;
        public float* Weights;
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
        int headDim = Cache.HeadDim;
        int start = Tiles.Start(tile), end = Tiles.End(tile);
        Scratch scratch = ScratchOf(worker);

        int queries = (end - start) * Group;
        for (int q = 0; q < queries; q++)
        {
            float* source = Qkv + ((long)(start + (q / Group)) * Stride) + (((kvHead * Group) + (q % Group)) * headDim);
            new ReadOnlySpan<float>(source, headDim).CopyTo(new Span<float>(scratch.Queries + (q * HeadStride), headDim));
            new Span<float>(scratch.Values + (q * HeadStride), Cache.ValueStride).Clear();
            new Span<float>(scratch.Sums + (q * KvCache.BlockTokens), KvCache.BlockTokens).Clear();
            scratch.Maxima[q] = float.NegativeInfinity;
        }

        ReadOnlySpan<int> blocks = Step.BlockTables.AsSpan(RowSequence[start] * Step.MaxBlocks, Step.MaxBlocks);
        int shared = Tiles.Shared(tile);
        for (int b = 0; b < shared; b++)
            Block(scratch, 0, queries, blocks[b], blocks[b + 1 < shared ? b + 1 : b], kvHead, KvCache.BlockTokens);

        for (int row = start; row < end; row++)
        {
            blocks = Step.BlockTables.AsSpan(RowSequence[row] * Step.MaxBlocks, Step.MaxBlocks);
            int context = Step.Positions[row] + 1;
            for (int b = shared; b * KvCache.BlockTokens < context; b++)
            {
                int tokens = Math.Min(KvCache.BlockTokens, context - (b * KvCache.BlockTokens));
                int next = (b + 1) * KvCache.BlockTokens < context ? blocks[b + 1] : blocks[b];
                Block(scratch, (row - start) * Group, Group, blocks[b], next, kvHead, tokens);
            }
        }

        for (int q = 0; q < queries; q++)
        {
            float* output = Output + ((long)(start + (q / Group)) * OutputStride) + (((kvHead * Group) + (q % Group)) * headDim);
            Finish(scratch.Values + (q * HeadStride), scratch.Sums + (q * KvCache.BlockTokens), output, headDim);
        }
    }

    /// <summary>
    /// Takes the first <paramref name="tokens"/> tokens of one block into <paramref name="count"/> queries, and asks for the next block:
    /// blocks lie anywhere, so the hardware cannot guess it.
    /// </summary>
    private void Block(in Scratch scratch, int first, int count, int block, int next, int kvHead, int tokens)
    {
        float* keys = Cache.Keys(Layer, block, kvHead);
        float* values = Cache.Values(Layer, block, kvHead);
        float* weights = scratch.Weights + (first * KvCache.BlockTokens);
        long ahead = Cache.Keys(Layer, next, kvHead) - keys;
        for (int q = 0; q < count; q += TLanes.Queries)
        {
            float* queries = scratch.Queries + ((first + q) * HeadStride);
            Scores(Math.Min(TLanes.Queries, count - q), queries, keys, ahead, Cache.HeadDim, weights + (q * KvCache.BlockTokens));
        }

        Weigh(scratch, first, count, tokens);
        for (int q = 0; q < count; q += TLanes.Queries)
        {
            float* sums = scratch.Values + ((first + q) * HeadStride);
            AddValues(
                Math.Min(TLanes.Queries, count - q), weights + (q * KvCache.BlockTokens), values, ahead, Cache.ValueStride, tokens, sums);
        }
    }

    /// <summary>Scores become weights relative to the running maximum; what was summed before is rescaled when the maximum moves.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private void Weigh(in Scratch scratch, int first, int count, int tokens)
    {
        TLanes scale = TLanes.Create(Scale);
        TLanes seen = TLanes.Create(0f);
        if (tokens < KvCache.BlockTokens)
        {
            float* index = stackalloc float[KvCache.BlockTokens];
            for (int t = 0; t < KvCache.BlockTokens; t++)
                index[t] = t;
            seen = TLanes.Less(TLanes.Load(index), TLanes.Create(tokens));
        }

        for (int q = first; q < first + count; q++)
        {
            float* weights = scratch.Weights + (q * KvCache.BlockTokens);
            float* sums = scratch.Sums + (q * KvCache.BlockTokens);
            TLanes scores = TLanes.Load(weights) * scale;
            if (tokens < KvCache.BlockTokens)
                scores = TLanes.Select(seen, scores, TLanes.Create(float.NegativeInfinity));

            float largest = TLanes.Largest(scores);
            TLanes sum = TLanes.Load(sums);
            if (largest > scratch.Maxima[q])
            {
                TLanes factor = VectorMath.Exp(TLanes.Create(scratch.Maxima[q] - largest));
                scratch.Maxima[q] = largest;
                sum *= factor;
                float* values = scratch.Values + (q * HeadStride);
                for (int d = 0; d < Cache.ValueStride; d += LaneMemory.Count)
                    TLanes.Store(values + d, TLanes.Load(values + d) * factor);
            }

            TLanes weight = VectorMath.Exp(scores - TLanes.Create(scratch.Maxima[q]));
            TLanes.Store(weights, weight);
            TLanes.Store(sums, sum + weight);
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Finish(float* values, float* sums, float* output, int headDim)
    {
        // Adding zero turns -0 into +0: the sign of an underflow is the one thing that rescaling could change.
        float inverse = 1f / TLanes.Sum(TLanes.Load(sums));
        TLanes factor = TLanes.Create(inverse);
        int d = 0;
        for (; d + LaneMemory.Count <= headDim; d += LaneMemory.Count)
            TLanes.Store(output + d, (TLanes.Load(values + d) * factor) + TLanes.Create(0f));
        for (; d < headDim; d++)
            output[d] = (values[d] * inverse) + 0f;
    }

    private static void Scores(int count, float* queries, float* keys, long ahead, int headDim, float* scores)
    {
        switch (count)
        {
            case 1: Scores<Queries1>(queries, keys, ahead, headDim, scores); break;
            case 2: Scores<Queries2>(queries, keys, ahead, headDim, scores); break;
            case 3: Scores<Queries3>(queries, keys, ahead, headDim, scores); break;
            case 4: Scores<Queries4>(queries, keys, ahead, headDim, scores); break;
            case 5: Scores<Queries5>(queries, keys, ahead, headDim, scores); break;
            case 6: Scores<Queries6>(queries, keys, ahead, headDim, scores); break;
            case 7: Scores<Queries7>(queries, keys, ahead, headDim, scores); break;
            default: Scores<Queries8>(queries, keys, ahead, headDim, scores); break;
        }
    }

    /// <summary>scores [queries][16] = queries [queries][headDim] x keys [headDim][16 tokens]: one chain over headDim a lane.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Scores<TQueries>(float* queries, float* keys, long ahead, int headDim, float* scores)
        where TQueries : struct, IQueries
    {
        TLanes zero = TLanes.Create(0f);
        TLanes a0 = zero;
        TLanes a1 = zero;
        TLanes a2 = zero;
        TLanes a3 = zero;
        TLanes a4 = zero;
        TLanes a5 = zero;
        TLanes a6 = zero;
        TLanes a7 = zero;
        for (int d = 0; d < headDim; d++)
        {
            if (Sse.IsSupported)
                Sse.Prefetch0(keys + ahead);
            TLanes k = TLanes.Load(keys);
            keys += KvCache.BlockTokens;
            a0 = TLanes.Fma(TLanes.Create(queries[(0 * HeadStride) + d]), k, a0);
            if (TQueries.Count > 1)
                a1 = TLanes.Fma(TLanes.Create(queries[(1 * HeadStride) + d]), k, a1);
            if (TQueries.Count > 2)
                a2 = TLanes.Fma(TLanes.Create(queries[(2 * HeadStride) + d]), k, a2);
            if (TQueries.Count > 3)
                a3 = TLanes.Fma(TLanes.Create(queries[(3 * HeadStride) + d]), k, a3);
            if (TQueries.Count > 4)
                a4 = TLanes.Fma(TLanes.Create(queries[(4 * HeadStride) + d]), k, a4);
            if (TQueries.Count > 5)
                a5 = TLanes.Fma(TLanes.Create(queries[(5 * HeadStride) + d]), k, a5);
            if (TQueries.Count > 6)
                a6 = TLanes.Fma(TLanes.Create(queries[(6 * HeadStride) + d]), k, a6);
            if (TQueries.Count > 7)
                a7 = TLanes.Fma(TLanes.Create(queries[(7 * HeadStride) + d]), k, a7);
        }

        TLanes.Store(scores + (0 * KvCache.BlockTokens), a0);
        if (TQueries.Count > 1)
            TLanes.Store(scores + (1 * KvCache.BlockTokens), a1);
        if (TQueries.Count > 2)
            TLanes.Store(scores + (2 * KvCache.BlockTokens), a2);
        if (TQueries.Count > 3)
            TLanes.Store(scores + (3 * KvCache.BlockTokens), a3);
        if (TQueries.Count > 4)
            TLanes.Store(scores + (4 * KvCache.BlockTokens), a4);
        if (TQueries.Count > 5)
            TLanes.Store(scores + (5 * KvCache.BlockTokens), a5);
        if (TQueries.Count > 6)
            TLanes.Store(scores + (6 * KvCache.BlockTokens), a6);
        if (TQueries.Count > 7)
            TLanes.Store(scores + (7 * KvCache.BlockTokens), a7);
    }

    private static void AddValues(int count, float* weights, float* values, long ahead, int stride, int tokens, float* sums)
    {
        switch (count)
        {
            case 1: AddValues<Queries1>(weights, values, ahead, stride, tokens, sums); break;
            case 2: AddValues<Queries2>(weights, values, ahead, stride, tokens, sums); break;
            case 3: AddValues<Queries3>(weights, values, ahead, stride, tokens, sums); break;
            case 4: AddValues<Queries4>(weights, values, ahead, stride, tokens, sums); break;
            case 5: AddValues<Queries5>(weights, values, ahead, stride, tokens, sums); break;
            case 6: AddValues<Queries6>(weights, values, ahead, stride, tokens, sums); break;
            case 7: AddValues<Queries7>(weights, values, ahead, stride, tokens, sums); break;
            default: AddValues<Queries8>(weights, values, ahead, stride, tokens, sums); break;
        }
    }

    /// <summary>sums [queries][stride] += weights [queries][16] x values [tokens][stride], over ascending tokens.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void AddValues<TQueries>(float* weights, float* values, long ahead, int stride, int tokens, float* sums)
        where TQueries : struct, IQueries
    {
        TLanes zero = TLanes.Create(0f);
        for (int d = 0; d < stride; d += LaneMemory.Count)
        {
            TLanes a0 = TQueries.Count > 0 ? TLanes.Load(sums + (0 * HeadStride) + d) : zero;
            TLanes a1 = TQueries.Count > 1 ? TLanes.Load(sums + (1 * HeadStride) + d) : zero;
            TLanes a2 = TQueries.Count > 2 ? TLanes.Load(sums + (2 * HeadStride) + d) : zero;
            TLanes a3 = TQueries.Count > 3 ? TLanes.Load(sums + (3 * HeadStride) + d) : zero;
            TLanes a4 = TQueries.Count > 4 ? TLanes.Load(sums + (4 * HeadStride) + d) : zero;
            TLanes a5 = TQueries.Count > 5 ? TLanes.Load(sums + (5 * HeadStride) + d) : zero;
            TLanes a6 = TQueries.Count > 6 ? TLanes.Load(sums + (6 * HeadStride) + d) : zero;
            TLanes a7 = TQueries.Count > 7 ? TLanes.Load(sums + (7 * HeadStride) + d) : zero;
            float* value = values + d;
            for (int t = 0; t < tokens; t++)
            {
                if (Sse.IsSupported)
                    Sse.Prefetch0(value + ahead);
                TLanes v = TLanes.Load(value);
                value += stride;
                a0 = TLanes.Fma(TLanes.Create(weights[(0 * KvCache.BlockTokens) + t]), v, a0);
                if (TQueries.Count > 1)
                    a1 = TLanes.Fma(TLanes.Create(weights[(1 * KvCache.BlockTokens) + t]), v, a1);
                if (TQueries.Count > 2)
                    a2 = TLanes.Fma(TLanes.Create(weights[(2 * KvCache.BlockTokens) + t]), v, a2);
                if (TQueries.Count > 3)
                    a3 = TLanes.Fma(TLanes.Create(weights[(3 * KvCache.BlockTokens) + t]), v, a3);
                if (TQueries.Count > 4)
                    a4 = TLanes.Fma(TLanes.Create(weights[(4 * KvCache.BlockTokens) + t]), v, a4);
                if (TQueries.Count > 5)
                    a5 = TLanes.Fma(TLanes.Create(weights[(5 * KvCache.BlockTokens) + t]), v, a5);
                if (TQueries.Count > 6)
                    a6 = TLanes.Fma(TLanes.Create(weights[(6 * KvCache.BlockTokens) + t]), v, a6);
                if (TQueries.Count > 7)
                    a7 = TLanes.Fma(TLanes.Create(weights[(7 * KvCache.BlockTokens) + t]), v, a7);
            }

            TLanes.Store(sums + (0 * HeadStride) + d, a0);
            if (TQueries.Count > 1)
                TLanes.Store(sums + (1 * HeadStride) + d, a1);
            if (TQueries.Count > 2)
                TLanes.Store(sums + (2 * HeadStride) + d, a2);
            if (TQueries.Count > 3)
                TLanes.Store(sums + (3 * HeadStride) + d, a3);
            if (TQueries.Count > 4)
                TLanes.Store(sums + (4 * HeadStride) + d, a4);
            if (TQueries.Count > 5)
                TLanes.Store(sums + (5 * HeadStride) + d, a5);
            if (TQueries.Count > 6)
                TLanes.Store(sums + (6 * HeadStride) + d, a6);
            if (TQueries.Count > 7)
                TLanes.Store(sums + (7 * HeadStride) + d, a7);
        }
    }

    private interface IQueries
    {
        static abstract int Count { get; }
    }

    private readonly struct Queries1 : IQueries
    {
        public static int Count => 1;
    }

    private readonly struct Queries2 : IQueries
    {
        public static int Count => 2;
    }

    private readonly struct Queries3 : IQueries
    {
        public static int Count => 3;
    }

    private readonly struct Queries4 : IQueries
    {
        public static int Count => 4;
    }

    private readonly struct Queries5 : IQueries
    {
        public static int Count => 5;
    }

    private readonly struct Queries6 : IQueries
    {
        public static int Count => 6;
    }

    private readonly struct Queries7 : IQueries
    {
        public static int Count => 7;
    }

    private readonly struct Queries8 : IQueries
    {
        public static int Count => 8;
    }
}
