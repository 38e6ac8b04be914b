// A row of logits with a query's biases and temperature, the noise that is added, and reductions over the threads of a block of
// sampling.cu.
#pragma once
#include "common.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)
#define NONE 0x7fffffff
#define SLICE 4096 // tokens that one block reads, as in CudaSampleScratch
#define CHUNK 128  // tokens that one warp reads at a time, likewise
#define ROOM 4096  // tokens that are sorted in shared memory

struct Query // as SampleQuery of kernels/StepLayout.cs
{
    int output_index, target;
    float temperature;
    int top_k;
    float top_p, min_p;
    u64 seed;
    u32 sample_index;
    int position, bias_start, bias_count, alternatives_start, alternatives_count;
};
static_assert(sizeof(Query) == 56, "SampleQuery has another layout");

// ---- The row.

struct Row
{
    const float* logits;
    int vocabulary;
    const int* bias_ids; // ascending
    const float* bias_values;
    int bias_count;
    float temperature; // 1: no division
    float top;         // largest x, where it is known

    // Values of tokens 4 * group and the three after it; -INFINITE past the vocabulary. A row's alignment, and so how it is loaded, depends
    // on the rows before it, but no order of operations may.
    __device__ __forceinline__ float4 logits_of(int group) const
    {
        int v = group * 4;
        if (v + 4 <= vocabulary && ((u64)logits & 15) == 0)
            return *(const float4*)(logits + v);
        float4 z = {-INFINITE, -INFINITE, -INFINITE, -INFINITE};
        if (v < vocabulary)
            z.x = logits[v];
        if (v + 1 < vocabulary)
            z.y = logits[v + 1];
        if (v + 2 < vocabulary)
            z.z = logits[v + 2];
        if (v + 3 < vocabulary)
            z.w = logits[v + 3];
        return z;
    }

    // The first bias of this token or a later one.
    __device__ __forceinline__ int bias_from(int v) const
    {
        int low = 0, high = bias_count;
        while (low < high)
        {
            int middle = (low + high) / 2;
            if (bias_ids[middle] < v)
                low = middle + 1;
            else
                high = middle;
        }

        return low;
    }

    __device__ __forceinline__ void add_biases(float (&four)[4], int group) const
    {
        int bias = bias_from(group * 4);
#pragma unroll
        for (int j = 0; j < 4; j++)
        {
            for (; bias < bias_count && bias_ids[bias] == group * 4 + j; bias++)
                four[j] += bias_values[bias];
        }
    }

    __device__ __forceinline__ float divided(float biased) const { return temperature == 1.0f ? biased : biased / temperature; }

    __device__ __forceinline__ float x(int v) const
    {
        float biased = logits[v];
        for (int bias = bias_from(v); bias < bias_count && bias_ids[bias] == v; bias++)
            biased += bias_values[bias];
        return divided(biased);
    }
};

// The unmodified values.
__device__ __forceinline__ Row plain_row(const float* values, int count)
{
    return Row{values, count, nullptr, nullptr, 0, 1.0f, 0};
}

// The largest value and the lowest id that has it.
struct Best
{
    float value;
    int id;
};

__device__ __forceinline__ Best better(Best a, float value, int id)
{
    return value > a.value || (value == a.value && id < a.id) ? Best{value, id} : a;
}

// ---- The block.

// Its shared memory; query and row too, so that they occupy no registers for long.
struct alignas(16) Shared
{
    union
    {
        float4 slice[SLICE / 4];
        u64 list[ROOM]; // see packed
    };
    double sums[WARPS];
    float values[WARPS];
    int ids[WARPS];
    Query query;
    Row row;
    u32 count;
    bool is_last;
};
__shared__ Shared shared;

// Reduces all threads' values; all threads get the result.
__device__ __forceinline__ double block_total(double x)
{
    for (int other = 16; other > 0; other >>= 1)
    {
        int high = __shfl_xor_sync(ALL_LANES, __double2hiint(x), other), low = __shfl_xor_sync(ALL_LANES, __double2loint(x), other);
        x += __hiloint2double(high, low);
    }

    __syncthreads();
    if ((threadIdx.x & 31) == 0)
        shared.sums[threadIdx.x / 32] = x;
    __syncthreads();
    double total = 0;
    for (int warp = 0; warp < WARPS; warp++)
        total += shared.sums[warp];
    return total;
}

__device__ __forceinline__ Best block_best(Best x)
{
    for (int other = 16; other > 0; other >>= 1)
    {
        float value = __shfl_xor_sync(ALL_LANES, x.value, other);
        int id = __shfl_xor_sync(ALL_LANES, x.id, other);
        x = better(x, value, id);
    }

    __syncthreads();
    if ((threadIdx.x & 31) == 0)
    {
        shared.values[threadIdx.x / 32] = x.value;
        shared.ids[threadIdx.x / 32] = x.id;
    }

    __syncthreads();
    x = Best{shared.values[0], shared.ids[0]};
    for (int warp = 1; warp < WARPS; warp++)
        x = better(x, shared.values[warp], shared.ids[warp]);
    return x;
}

// ---- Order.

// Bit patterns of fp32 as integers in the numbers' order; its own inverse.
__device__ __forceinline__ int ordered(float value)
{
    int bits = (int)__float_as_uint(value);
    return bits >= 0 ? bits : bits ^ 0x7fffffff;
}

__device__ __forceinline__ float unordered(int key) { return __uint_as_float((u32)(key >= 0 ? key : key ^ 0x7fffffff)); }

// A token as a number: ascending numbers are descending values, equals by ascending id.
__device__ __forceinline__ u64 packed(float value, int id)
{
    u32 descending = 0x7fffffffu - (u32)ordered(value + 0.0f); // -0 equals 0
    return (u64)descending << 32 | (u32)id;
}

__device__ __forceinline__ float value_of(u64 token) { return unordered((int)(0x7fffffffu - (u32)(token >> 32))); }
__device__ __forceinline__ int id_of(u64 token) { return (int)(u32)token; }

// ---- Noise.

// Philox 4x32-10 (Salmon et al., SC'11) of the counter (v / 4, position, sample, 0): a word for each of four tokens.
__device__ __forceinline__ void philox(u32 (&words)[4], const Query& query, int group)
{
    u32 key0 = (u32)query.seed, key1 = (u32)(query.seed >> 32);
    words[0] = (u32)group;
    words[1] = (u32)query.position;
    words[2] = query.sample_index;
    words[3] = 0;
    for (int round = 0; round < 10; round++)
    {
        u32 high0 = __umulhi(words[0], 0xD2511F53u), low0 = words[0] * 0xD2511F53u;
        u32 high1 = __umulhi(words[2], 0xCD9E8D57u), low1 = words[2] * 0xCD9E8D57u;
        words[0] = high1 ^ words[1] ^ key0;
        words[2] = high0 ^ words[3] ^ key1;
        words[1] = low1;
        words[3] = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// -log(-log(u)), u = (random >> 9) * 2^-23 + 2^-24.
__device__ __forceinline__ float gumbel(u32 random)
{
    float u = fmaf((float)(random >> 9), 1.0f / (1 << 23), 1.0f / (1 << 24));
    return 0.0f - log_of(0.0f - log_of(u));
}

__device__ __forceinline__ float noise(const Query& query, int v)
{
    u32 words[4];
    philox(words, query, v / 4);
    return gumbel((v & 2) == 0 ? ((v & 1) == 0 ? words[0] : words[1]) : (v & 1) == 0 ? words[2] : words[3]);
}
