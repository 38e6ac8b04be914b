// Shared by all kernels: how values are stored, and sums over warps and blocks in one fixed order. No CUDA header is included anywhere:
// NVRTC alone compiles this for a device, and g++ for the simulated one (tests/cuda-sim/device.h).
//
// STORE_BF16 = 1: weights, keys, values and the inputs of matmuls are bfloat16; 0: fp32. The residual stream, sums and everything else are
// fp32 either way.
#pragma once

#if !defined(ROLLOUT_SIM)
#define ROLLOUT_KERNEL(name)
#define SIM_UNCHECKED
#endif

typedef unsigned int u32;
typedef unsigned long long u64;

#define ALL_LANES 0xffffffffu

// Values that differ between steps with equal arguments, at the start of a step's indices. As CudaStep.StepHeader.
struct StepHeader
{
    int items, queries;      // launches are rounded up
    int table_stride;        // blocks of a sequence's row of the block tables
    int items_at, tables_at; // bytes from here on
    int padding;
    const int* bias_ids;
    const float* bias_values;

    __device__ const int* table(int sequence) const { return (const int*)((const char*)this + tables_at) + (long long)sequence * table_stride; }
};

// A block's dynamic shared memory, as a struct.
#if defined(ROLLOUT_SIM)
#define LAUNCHED_SHARED(type, name) type& name = *(type*)sim_launched_shared()
#else
#define LAUNCHED_SHARED(type, name) \
    extern __shared__ __align__(16) unsigned char launched_shared[]; \
    type& name = *(type*)launched_shared

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }
#endif

// Every kernel of a step begins with this: it may have been started while the previous one in the stream still ran (programmatic dependent
// launch), and returns from here once that one has ended and its writes are visible. Every kernel waits, so all earlier ones have ended
// too. Then the next kernel may be started in turn: all blocks of this kernel are running by then, so the next one takes no resources from
// them, and it waits for them here.
__device__ __forceinline__ void wait_for_earlier_kernels()
{
#if defined(ROLLOUT_SIM)
    sim_wait_for_earlier_kernels();
#elif __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 16 bytes that another block wrote in this kernel: bypasses the first-level cache.
__device__ __forceinline__ float4 load_written(const float4* from)
{
#if defined(ROLLOUT_SIM)
    return *from;
#else
    float4 x;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(from) : "memory");
    return x;
#endif
}

__device__ __forceinline__ float load_written(const float* from)
{
#if defined(ROLLOUT_SIM)
    return *from;
#else
    float x;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(from) : "memory");
    return x;
#endif
}

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

// The elements of 16 bytes, in one access.
#define WIDE (16 / (int)sizeof(stored))
struct alignas(16) Wide { stored x[WIDE]; };

// Four at a time; fp32 is aligned to 16 bytes, bf16 to 8.
struct alignas(4 * sizeof(stored)) Four { stored x[4]; };

__device__ __forceinline__ float4 load_four(const stored* from)
{
    Four four = *(const Four*)from;
    return {load(four.x[0]), load(four.x[1]), load(four.x[2]), load(four.x[3])};
}

__device__ __forceinline__ void store_four(stored* to, float4 x) { *(Four*)to = {store(x.x), store(x.y), store(x.z), store(x.w)}; }

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
    __syncthreads(); // other threads may still read an earlier sum
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

// ---- Exponential and logarithm of fused multiply-adds only, bit for bit those of kernels/Cpu/VectorMath.cs (after Moshier's Cephes): the
// same bits come from every compiler and device.

#define INFINITE __uint_as_float(0x7f800000u)

// a * 2^n in two factors, so that results below the normal range are rounded once; n is a whole number.
__device__ __forceinline__ float scale_in_two(float a, float n)
{
    u32 bits = __float_as_uint(n + 12582912.0f) - __float_as_uint(12582912.0f);
    u32 half = ((bits + 256u) >> 1) - 128u, rest = bits - half;
    return a * __uint_as_float((half + 127u) << 23) * __uint_as_float((rest + 127u) << 23);
}

// e^x: exactly 1 at 0, 0 at -infinity; not-a-number stays one.
__device__ __forceinline__ float exp_of(float x)
{
    x = x < -104.0f ? -104.0f : x;
    x = 89.0f < x ? 89.0f : x;
    float n = fmaf(x, 1.44269504f, 12582912.0f) - 12582912.0f;
    float r = fmaf(n, -0.693359375f, x);
    r = fmaf(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = fmaf(p, r, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f);
    p = fmaf(p, r, 4.1665795894e-2f);
    p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f);
    p = fmaf(p * r, r, r) + 1.0f;
    return scale_in_two(p, n);
}

// Natural logarithm of a positive normal number.
__device__ __forceinline__ float log_of(float x)
{
    u32 offset = __float_as_uint(x) - 0x3f3504f3u;
    float e = (float)((int)offset >> 23);
    float f = __uint_as_float((offset & 0x007fffffu) + 0x3f3504f3u) - 1.0f, z = f * f;
    float p = 7.0376836292e-2f;
    p = fmaf(p, f, -1.1514610310e-1f);
    p = fmaf(p, f, 1.1676998740e-1f);
    p = fmaf(p, f, -1.2420140846e-1f);
    p = fmaf(p, f, 1.4249322787e-1f);
    p = fmaf(p, f, -1.6668057665e-1f);
    p = fmaf(p, f, 2.0000714765e-1f);
    p = fmaf(p, f, -2.4999993993e-1f);
    p = fmaf(p, f, 3.3333331174e-1f);
    float y = p * f * z;
    y = fmaf(e, -2.12194440e-4f, y);
    y = fmaf(z, -0.5f, y);
    return fmaf(e, 0.693359375f, f + y);
}
