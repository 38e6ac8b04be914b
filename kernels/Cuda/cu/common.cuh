// What all kernels share: how values are stored, and sums over warps and blocks in one fixed order.
// No CUDA header is included anywhere: NVRTC alone compiles this for a device, and g++ for the simulated one (tests/cuda-sim/device.h).
//
// STORE_BF16 = 1: weights, keys, values and what goes into a matmul are bfloat16; 0: fp32. The residual stream, sums and everything that is
// not such storage are fp32 either way.
#pragma once

#if !defined(ROLLOUT_SIM)
#define ROLLOUT_KERNEL(name)
#endif

typedef unsigned int u32;
typedef unsigned long long u64;

#define ALL_LANES 0xffffffffu

#if STORE_BF16
typedef unsigned short stored; // the upper half of an fp32

__device__ __forceinline__ float load(stored x) { return __uint_as_float((u32)x << 16); }

// Rounds to nearest, ties to even; not-a-number stays one.
__device__ __forceinline__ stored store(float x)
{
    u32 bits = __float_as_uint(x);
    return (stored)((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
#else
typedef float stored;

__device__ __forceinline__ float load(stored x) { return x; }
__device__ __forceinline__ stored store(float x) { return x; }
#endif

__device__ __forceinline__ float warp_sum(float x)
{
    for (int other = 16; other > 0; other >>= 1)
        x += __shfl_xor_sync(ALL_LANES, x, other);
    return x;
}

__device__ __forceinline__ float warp_max(float x)
{
    for (int other = 16; other > 0; other >>= 1)
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, other));
    return x;
}

// The sum over a block of THREADS threads, for all of them: lanes fold, then warps add in ascending order. parts [THREADS / 32] is shared.
template <int THREADS>
__device__ __forceinline__ float block_sum(float x, float* parts)
{
    x = warp_sum(x);
    __syncthreads(); // who still reads an earlier sum
    if ((threadIdx.x & 31) == 0)
        parts[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0;
    for (int warp = 0; warp < THREADS / 32; warp++)
        sum += parts[warp];
    return sum;
}

template <int THREADS>
__device__ __forceinline__ float block_max(float x, float* parts)
{
    x = warp_max(x);
    __syncthreads();
    if ((threadIdx.x & 31) == 0)
        parts[threadIdx.x / 32] = x;
    __syncthreads();
    float most = parts[0];
    for (int warp = 1; warp < THREADS / 32; warp++)
        most = fmaxf(most, parts[warp]);
    return most;
}
