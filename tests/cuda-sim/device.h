// Included when g++ compiles a .cu source for the simulated device: CUDA's builtins, as far as the kernels use them.
#pragma once
#include <math.h>
#include <string.h>

#define ROLLOUT_SIM 1
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cuda_shared")))
#define __constant__ static const

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

extern "C" {
// The fiber that runs now. Set by the scheduler at every switch.
extern struct sim_indices { uint3 thread, block; dim3 block_size, grid_size; } sim_index;

void sim_wait_for_earlier_kernels();
void sim_sync_threads(int line);
void sim_sync_warp(unsigned mask);
unsigned sim_shuffle(unsigned mask, unsigned value, unsigned source_lane); // the value of source_lane
unsigned sim_ballot(unsigned mask, int predicate);
unsigned sim_atomic_add(unsigned* address, unsigned value);
void sim_mma(float* c, const unsigned* a, const unsigned* b);          // m16n8k16, bf16
void sim_copy_async(void* to, const void* from, unsigned present);      // 16 bytes, zeros past those present
void sim_end_copies();
void sim_wait_copies(int left);                                         // groups that may still be in flight
char* sim_launched_shared();

// Where the linker put all __shared__ variables of the source.
extern char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));
__attribute__((no_sanitize_thread)) void sim_shared_range(char** start, char** end)
{
    *start = __start_cuda_shared;
    *end = __stop_cuda_shared;
}
}

#define threadIdx sim_index.thread
#define blockIdx sim_index.block
#define blockDim sim_index.block_size
#define gridDim sim_index.grid_size

// Identified by its line, not by its address: g++ may make several copies of one barrier for threads from different branches.
static inline void __syncthreads(int line = __builtin_LINE()) { sim_sync_threads(line); }
static inline void __syncwarp(unsigned mask = 0xffffffffu) { sim_sync_warp(mask); }
static inline void __threadfence() {}
static inline unsigned sim_lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) & 31; }

template <class T> static inline T sim_shuffle_any(unsigned mask, T value, unsigned lane)
{
    static_assert(sizeof(T) == 4, "32-bit values only");
    unsigned bits;
    memcpy(&bits, &value, 4);
    bits = sim_shuffle(mask, bits, lane & 31);
    memcpy(&value, &bits, 4);
    return value;
}

template <class T> static inline T __shfl_sync(unsigned mask, T value, int lane) { return sim_shuffle_any(mask, value, lane); }
template <class T> static inline T __shfl_xor_sync(unsigned mask, T value, int x) { return sim_shuffle_any(mask, value, sim_lane() ^ x); }
template <class T> static inline T __shfl_down_sync(unsigned mask, T value, int d)
{
    unsigned lane = sim_lane();
    return sim_shuffle_any(mask, value, lane + d < 32 ? lane + d : lane);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate) { return sim_ballot(mask, predicate); }
static inline unsigned atomicAdd(unsigned* address, unsigned value) { return sim_atomic_add(address, value); }

// ldmatrix, of 2 or 4 tiles of 8 x 8 into a and b, two registers each. Lanes 8i to 8i + 7 have the addresses of the rows of tile i; a lane
// receives columns 2 (lane % 4) and the next of row lane / 4, or, transposed, column lane / 4 of rows 2 (lane % 4) and the one after.
template <int COUNT, bool TRANSPOSED> static inline void sim_load_matrices(unsigned* a, unsigned* b, const unsigned short* row)
{
    unsigned long long address = (unsigned long long)row;
    for (unsigned i = 0; i < 2 * COUNT; i++)
    {
        unsigned tile = i / 2, pair = sim_lane() % 4 * 2 + i % 2, line = TRANSPOSED ? pair : sim_lane() / 4;
        unsigned low = __shfl_sync(0xffffffffu, (unsigned)address, 8 * tile + line);
        unsigned high = __shfl_sync(0xffffffffu, (unsigned)(address >> 32), 8 * tile + line);
        unsigned value = ((const unsigned short*)((unsigned long long)high << 32 | low))[TRANSPOSED ? sim_lane() / 4 : pair];
        unsigned* to = tile < 2 ? a + tile : b + (tile - 2);
        *to = i % 2 == 0 ? value : *to | value << 16;
    }
}

static inline float __uint_as_float(unsigned x) { float f; memcpy(&f, &x, 4); return f; }
static inline unsigned __float_as_uint(float f) { unsigned x; memcpy(&x, &f, 4); return x; }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((unsigned long long)a * b) >> 32); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned long long)(((unsigned __int128)a * b) >> 64); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __double2hiint(double x) { long long b; memcpy(&b, &x, 8); return (int)(b >> 32); }
static inline int __double2loint(double x) { long long b; memcpy(&b, &x, 8); return (int)b; }
static inline double __hiloint2double(int high, int low)
{
    long long b = (long long)((unsigned long long)(unsigned)high << 32 | (unsigned)low);
    double x;
    memcpy(&x, &b, 8);
    return x;
}

static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __fdividef(float a, float b) { return a / b; }

#define SIM_UNCHECKED __attribute__((no_sanitize_thread)) // touches the host's memory

// A kernel is called with an array of pointers to its arguments, as cuLaunchKernel has them.
template <class F> struct sim_call;
template <class... A> struct sim_call<void (*)(A...)>
{
    template <unsigned long... I> struct indices {};
    template <unsigned long N, unsigned long... I> struct count : count<N - 1, N - 1, I...> {};
    template <unsigned long... I> struct count<0, I...> { using type = indices<I...>; };
    template <unsigned long... I> SIM_UNCHECKED static void run(void (*f)(A...), void** a, indices<I...>) { f(*(A*)a[I]...); }
    SIM_UNCHECKED static void run(void (*f)(A...), void** a) { run(f, a, typename count<sizeof...(A)>::type()); }
    SIM_UNCHECKED static int sizes(unsigned* bytes)
    {
        unsigned all[] = {(unsigned)sizeof(A)..., 0};
        for (unsigned i = 0; i < sizeof...(A); i++)
            bytes[i] = all[i];
        return sizeof...(A);
    }
};

#define ROLLOUT_KERNEL(name) \
    extern "C" SIM_UNCHECKED void sim_kernel_##name(void** arguments) { sim_call<decltype(&name)>::run(&name, arguments); } \
    extern "C" SIM_UNCHECKED int sim_sizes_##name(unsigned* bytes) { return sim_call<decltype(&name)>::sizes(bytes); }
