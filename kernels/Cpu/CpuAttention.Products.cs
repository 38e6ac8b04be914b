using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics.X86;

namespace Rollout.Kernels;

/// <summary>The two matrix products of attention: queries x keys, and weights x values.</summary>
internal sealed unsafe partial class AttentionJob<TLanes>
{
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
    /// chain over headDim a lane. Each element broadcast from a query is used for both columns: otherwise broadcasts would take longer than
    /// the products.
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
