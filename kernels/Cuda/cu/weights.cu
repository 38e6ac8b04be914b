// Writes elements of a checkpoint to storage. TYPE of the source: see elements.cuh. Matrices are stored as `stored`, vectors as
// fp32. Also kernels for testing matmuls: inputs to multiply, and a comparison of the resulting rows.
#include "elements.cuh"

#define THREADS 256

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

#define UNITS 32 // per thread: elements, or units of 16 bytes

__device__ __forceinline__ u32 mixed(u32 x)
{
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

// Numbers of both signs and of many magnitudes, 2^-15 to 2, so that sums of their products in different orders round differently. BYTES of
// an element: 4 for fp32, 2 for the upper half of the same.
extern "C" __global__ void __launch_bounds__(THREADS) fill_pattern(void* destination, int bytes, u32 seed, long long count)
{
    wait_for_earlier_kernels();
    for (int u = 0; u < UNITS; u++)
    {
        long long i = ((long long)blockIdx.x * UNITS + u) * THREADS + threadIdx.x;
        if (i >= count)
            return;
        u32 random = mixed((u32)i ^ mixed((u32)(i >> 32) ^ seed));
        u32 bits = (random & 0x807fffffu) | (127u - (random >> 23 & 15u)) << 23;
        if (bytes == 4)
            ((u32*)destination)[i] = bits;
        else
            ((unsigned short*)destination)[i] = (unsigned short)(bits >> 16);
    }
}
ROLLOUT_KERNEL(fill_pattern)

// Counts units of 16 bytes, and elements after the last, that differ from the reference, which repeats: its bytes are whole units. It only
// reads results of other launches, and reads much: checking every access would take the simulated device minutes.
extern "C" __global__ SIM_UNCHECKED void __launch_bounds__(THREADS) compare_rows(
    const void* values, const void* reference, long long bytes, long long reference_bytes, u32* different)
{
    wait_for_earlier_kernels();
    long long units = bytes / 16, reference_units = reference_bytes / 16;
    for (int u = 0; u < UNITS; u++)
    {
        long long i = ((long long)blockIdx.x * UNITS + u) * THREADS + threadIdx.x;
        if (i < units)
        {
            uint4 x = ((const uint4*)values)[i], y = ((const uint4*)reference)[i % reference_units];
            if (((x.x ^ y.x) | (x.y ^ y.y) | (x.z ^ y.z) | (x.w ^ y.w)) != 0)
                atomicAdd(different, 1);
        }
        else if (i == units)
        {
            const unsigned short* rest = (const unsigned short*)values + 8 * units;
            const unsigned short* expected = (const unsigned short*)reference + 8 * (units % reference_units);
            for (int e = 0; e < (int)(bytes % 16 / 2); e++)
            {
                if (rest[e] != expected[e])
                    atomicAdd(different, 1);
            }
        }
    }
}
ROLLOUT_KERNEL(compare_rows)
