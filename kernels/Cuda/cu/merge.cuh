// The last block of a row merges the row's chunks: the chain of attention.cu, chunk after chunk, in two phases. First one warp a query
// computes the factor of every chunk's values: maxima are exact in any order, so 32 chunks are processed together, and only the sum is a
// chain. Then each thread processes four columns of a query, and its chain has only fused multiply-adds of values that were loaded well
// ahead.
#pragma once
#include "attention.cuh"

#define UNIT (HEAD_DIM % 4 == 0 ? 4 : 1)      // columns a thread
#define UNITS (HEAD_DIM / UNIT)
#define ASKED 8                               // chunks whose values a thread loads ahead
#define MERGED 64                              // chunks at a time; their factors replace a query's scores

struct Factors { float keep, take; };
static_assert(sizeof(Factors) * MERGED <= sizeof(Shared::scores[0]), "factors have no more room than scores");

// For chunks [first, end) of query q, into to[0..]: the factors of the earlier sums and of the chunk's own. parts: the row's first, of this
// head.
__device__ __forceinline__ void find_factors(Shared& s, int q, const float* parts, long long chunk_stride, int first, int end, Factors* to, int lane)
{
    float top = s.top[q], sum = s.sum[q];
    for (int chunk = first; chunk < end; chunk += 32)
    {
        bool present = chunk + lane < end;
        const float* found = parts + (chunk + lane) * chunk_stride + HEAD_DIM;
        float most = present ? load_written(found) : -INFINITE, part = present ? load_written(found + 1) : 0;
        float above = most;
        for (int lanes = 1; lanes < 32; lanes *= 2)
        {
            float other = __shfl_sync(ALL_LANES, above, (lane - lanes) & 31);
            if (lane >= lanes)
                above = fmaxf(above, other);
        }

        above = fmaxf(top, above);
        float before = __shfl_sync(ALL_LANES, above, (lane - 1) & 31);
        if (lane == 0)
            before = top;
        float keep = exp_of(before - above), take = exp_of(most - above);
        if (present)
            to[chunk - first + lane] = {keep, take};
        part *= take;
        int count = min(32, end - chunk);
        for (int i = 0; i < count; i++)
            sum = fmaf(sum, __shfl_sync(ALL_LANES, keep, i), __shfl_sync(ALL_LANES, part, i));
        top = __shfl_sync(ALL_LANES, above, 31);
    }

    __syncwarp(); // all lanes have read the value that one replaces
    if (lane == 0)
    {
        s.top[q] = top;
        s.sum[q] = sum;
    }
}

// Adds chunks [first, end) to the merged values: columns [d, d + UNIT). parts: as above, but of column d.
__device__ __forceinline__ void add_chunks(float* merged, const float* parts, long long chunk_stride, int first, int end, const Factors* factors)
{
    parts += first * chunk_stride;
    for (int done = first; done < end; done += ASKED)
    {
        float found[ASKED][UNIT];
#pragma unroll
        for (int i = 0; i < ASKED; i++)
        {
            if (UNIT == 4)
            {
                float4 x = done + i < end ? load_written((const float4*)parts) : float4{0, 0, 0, 0};
                found[i][0] = x.x, found[i][1 % UNIT] = x.y, found[i][2 % UNIT] = x.z, found[i][3 % UNIT] = x.w;
            }
            else
                found[i][0] = done + i < end ? load_written(parts) : 0;
            parts += chunk_stride;
        }

#pragma unroll
        for (int i = 0; i < ASKED; i++)
        {
            if (done + i >= end)
                break;
            Factors of = *factors++;
#pragma unroll
            for (int k = 0; k < UNIT; k++)
                merged[k] = fmaf(merged[k], of.keep, found[i][k] * of.take);
        }
    }
}

// Merges all rows of the item that s.merges marks; its first `count` queries. All threads of the block call this.
__device__ __forceinline__ void merge_rows(Shared& s, int rows, int count, int slice_heads, int heads, const float* partials, stored* output)
{
    int thread = threadIdx.x, lane = thread % 32, longest = 0;
    long long chunk_stride = (long long)heads * PARTIAL;
    for (int r = 0; r < rows; r++)
        longest = max(longest, s.merges[r]);
    for (int first = 0; first < longest; first += MERGED)
    {
        for (int q = thread / 32; q < count; q += WARPS)
        {
            int chunks = s.merges[q / slice_heads];
            if (first < chunks)
                find_factors(s, q, partials + (long long)s.slot[q] * PARTIAL, chunk_stride, first, min(chunks, first + MERGED), (Factors*)s.scores[q], lane);
        }

        __syncthreads();
        for (int i = thread; i < count * UNITS; i += THREADS)
        {
            int q = i / UNITS, d = i % UNITS * UNIT, chunks = s.merges[q / slice_heads];
            if (first >= chunks)
                continue;
            float merged[UNIT] = {}, *so_far = &s.queries[q][d];
            for (int k = 0; k < UNIT && first > 0; k++)
                merged[k] = so_far[k];
            add_chunks(merged, partials + (long long)s.slot[q] * PARTIAL + d, chunk_stride, first, min(chunks, first + MERGED), (const Factors*)s.scores[q]);
            for (int k = 0; k < UNIT; k++)
            {
                if (first + MERGED < chunks)
                    so_far[k] = merged[k];
                else
                    output[(long long)s.place[q] * HEAD_DIM + d + k] = store(merged[k] / s.sum[q]);
            }
        }

        __syncthreads(); // before the next chunks' factors, or the next item
    }
}
