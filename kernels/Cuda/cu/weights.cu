// Elements of a checkpoint into storage. TYPE of the source: 0 bfloat16, 1 fp16, 2 fp32. Matrices are kept as `stored`, vectors as fp32.
#include "common.cuh"

#define THREADS 256

__device__ __forceinline__ float half_to_float(u32 half)
{
    u32 sign = (half & 0x8000u) << 16, exponent = half >> 10 & 0x1fu, fraction = half & 0x3ffu;
    if (exponent == 31)
        return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent != 0)
        return __uint_as_float(sign | (exponent + 112u) << 23 | fraction << 13);
    float magnitude = (float)fraction * (1.0f / (1 << 24)); // exact: at most 10 bits
    return __uint_as_float(sign | __float_as_uint(magnitude));
}

__device__ __forceinline__ float element_of(const void* source, long long i, int type)
{
    return type == 2 ? ((const float*)source)[i]
        : type == 1 ? half_to_float(((const unsigned short*)source)[i])
        : __uint_as_float((u32)((const unsigned short*)source)[i] << 16);
}

extern "C" __global__ void __launch_bounds__(THREADS) write_matrix(const void* source, int type, stored* destination, long long count)
{
    long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i < count)
        destination[i] = store(element_of(source, i, type));
}
ROLLOUT_KERNEL(write_matrix)

extern "C" __global__ void __launch_bounds__(THREADS) write_vector(const void* source, int type, float* destination, long long count)
{
    long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i < count)
        destination[i] = element_of(source, i, type);
}
ROLLOUT_KERNEL(write_vector)

// destination[indices[i]] = source[i].
extern "C" __global__ void __launch_bounds__(THREADS) scatter_matrix(
    const void* source, int type, const u32* indices, stored* destination, long long count)
{
    long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i < count)
        destination[indices[i]] = store(element_of(source, i, type));
}
ROLLOUT_KERNEL(scatter_matrix)

extern "C" __global__ void __launch_bounds__(THREADS) scatter_vector(
    const void* source, int type, const u32* indices, float* destination, long long count)
{
    long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i < count)
        destination[indices[i]] = element_of(source, i, type);
}
ROLLOUT_KERNEL(scatter_vector)
