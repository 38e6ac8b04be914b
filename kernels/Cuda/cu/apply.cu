// Stores tensors of a checkpoint that are in device memory, in this process's or in another's, and computes the XXH3-128 of every piece of
// them, in one pass over their bytes and in one launch, however many tensors there are. A thread block takes a piece: all its warps read,
// sum and store; then one warp chains the sums.
#include "elements.cuh"
#include "xxh3.cuh"

#define WARPS 8
#define THREADS (32 * WARPS)
#define PIECE_BLOCKS 128
#define TOGETHER 2 // blocks that a warp loads before it uses the first
#define UNIT 16    // bytes of a load
#define AHEAD 8    // blocks whose sums the chain loads ahead

// Up to 131,072 bytes of a tensor. Whole elements.
struct Piece
{
    const unsigned char* source;
    u32 bytes; // at least 1
    int type;
    u32 first_store, stores; // in ascending order of their elements; none: only the digest is wanted
};

// Elements [first, end) of a piece.
struct Store
{
    void* destination;
    u32 first, end;
    u32 is_vector; // stored as fp32
    u32 padding;
};

// The stores of one piece, as a thread comes to them: it asks for ascending elements.
struct Stores
{
    const Store *next, *end;
    Store store;

    __device__ __forceinline__ Stores(const Store* first, u32 count) : next(first), end(first + count), store() {}

    __device__ __forceinline__ bool find(u32 element)
    {
        while (element >= store.end && next < end)
            store = *next++;
        return element >= store.first && element < store.end;
    }
};

__device__ __forceinline__ u32 word(const uint4& unit, int i) { return i == 0 ? unit.x : i == 1 ? unit.y : i == 2 ? unit.z : unit.w; }

__device__ __forceinline__ u64 even_word(const uint4& unit) { return unit.x | (u64)unit.y << 32; }
__device__ __forceinline__ u64 odd_word(const uint4& unit) { return unit.z | (u64)unit.w << 32; }

// ---- Loads.

__device__ __forceinline__ u32 load_word(const unsigned char* from)
{
    if (((u64)from & 3) == 0)
        return *(const u32*)from;
    const unsigned short* halves = (const unsigned short*)from;
    return ((u64)from & 1) == 0 ? halves[0] | (u32)halves[1] << 16 : (u32)word_of(from, 4);
}

__device__ __noinline__ uint4 load_unaligned(const unsigned char* from)
{
    return {load_word(from), load_word(from + 4), load_word(from + 8), load_word(from + 12)};
}

// The last bytes of a piece; zeros follow.
__device__ __noinline__ uint4 load_some(const unsigned char* from, int bytes)
{
    u64 even = word_of(from, min(bytes, 8)), odd = bytes > 8 ? word_of(from + 8, bytes - 8) : 0;
    return {(u32)even, (u32)(even >> 32), (u32)odd, (u32)(odd >> 32)};
}

// Bytes that nothing reads again, so that they take no room in the first-level cache.
__device__ __forceinline__ uint4 load_unit(const unsigned char* from)
{
    if (((u64)from & (UNIT - 1)) != 0)
        return load_unaligned(from);
#if defined(ROLLOUT_SIM)
    return *(const uint4*)from;
#else
    uint4 x;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
    return x;
#endif
}

// ---- Stores.

template <int TYPE> __device__ __forceinline__ u32 half_of(const uint4& unit, int i) { return word(unit, i / 2) >> (16 * (i % 2)) & 0xffffu; }

template <int TYPE> __device__ __forceinline__ u32 fp32_of(const uint4& unit, int i)
{
    return TYPE == TYPE_F32 ? word(unit, i)
        : TYPE == TYPE_F16 ? __float_as_uint(half_to_float(half_of<TYPE>(unit, i)))
        : half_of<TYPE>(unit, i) << 16;
}

#if STORE_BF16
// As it is where it needs no rounding, which would change a not-a-number.
template <int TYPE> __device__ __forceinline__ u32 bf16_of(const uint4& unit, int i)
{
    return TYPE == TYPE_BF16 ? half_of<TYPE>(unit, i) : store(__uint_as_float(fp32_of<TYPE>(unit, i)));
}

template <int TYPE> __device__ __forceinline__ u32 two_bf16_of(const uint4& unit, int i)
{
    return bf16_of<TYPE>(unit, i) | bf16_of<TYPE>(unit, i + 1) << 16;
}
#endif

// All elements of a unit, in one or two accesses.
template <int TYPE> __device__ __forceinline__ void put_all(u64 at, bool as_fp32, const uint4& unit)
{
    constexpr int ALL = TYPE == TYPE_F32 ? 4 : 8;
    if (as_fp32)
    {
#pragma unroll
        for (int i = 0; i < ALL; i += 4)
            ((uint4*)at)[i / 4] = {fp32_of<TYPE>(unit, i), fp32_of<TYPE>(unit, i + 1), fp32_of<TYPE>(unit, i + 2), fp32_of<TYPE>(unit, i + 3)};
    }
#if STORE_BF16
    else if (ALL == 8)
        *(uint4*)at = {two_bf16_of<TYPE>(unit, 0), two_bf16_of<TYPE>(unit, 2), two_bf16_of<TYPE>(unit, 4 % ALL), two_bf16_of<TYPE>(unit, 6 % ALL)};
    else
        *(uint2*)at = {two_bf16_of<TYPE>(unit, 0), two_bf16_of<TYPE>(unit, 2)};
#endif
}

// The first elements of a unit, of which the first is ELEMENT of the piece: together where they go to one place that is aligned for it,
// else one by one.
template <int TYPE> __device__ __forceinline__ void put(Stores& stores, u32 element, int count, const uint4& unit)
{
    constexpr int ALL = TYPE == TYPE_F32 ? 4 : 8;
#pragma unroll 1
    for (int i = 0; i < count; i++)
    {
        if (!stores.find(element + i))
            continue;
        const Store& to = stores.store;
        bool as_fp32 = sizeof(stored) == 4 || to.is_vector;
        u64 at = (u64)to.destination + (u64)(element + i - to.first) * (as_fp32 ? 4 : 2);
        if (i == 0 && count == ALL && element + ALL <= to.end && (at & (as_fp32 || ALL == 8 ? 15 : 7)) == 0)
        {
            put_all<TYPE>(at, as_fp32, unit);
            return;
        }

#if STORE_BF16
        if (!as_fp32)
        {
            *(stored*)at = (stored)bf16_of<TYPE>(unit, i);
            continue;
        }
#endif
        *(u32*)at = fp32_of<TYPE>(unit, i);
    }
}

// ---- One piece.

struct Shared
{
    u64 sums[PIECE_BLOCKS][8];
    uint4 tail[(STRIPE_BYTES + BLOCK_BYTES) / UNIT]; // the last stripe of the whole blocks, and all bytes after them
};

// Reads the piece once: sums of its whole blocks and the bytes after them go to shared memory, its elements to their places. The last block
// is never whole. A lane reads two units of a block: unit u is half of the words 2 (u % 4) and the next of stripe u / 4.
template <int TYPE> __device__ __forceinline__ void read_piece(const Piece& piece, const Store* all_stores, u32 whole, Shared& shared)
{
    constexpr int SIZE = TYPE == TYPE_F32 ? 4 : 2;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Stores stores(all_stores + piece.first_store, piece.stores);
    u64 keys[2][2];
#pragma unroll
    for (int j = 0; j < 2; j++)
    {
        int first = (32 * j + lane) / 4 + 2 * (lane % 4);
        keys[j][0] = secret[first];
        keys[j][1] = secret[first + 1];
    }

    for (u32 group = warp; group < whole; group += WARPS * TOGETHER)
    {
        uint4 units[TOGETHER][2];
#pragma unroll
        for (int t = 0; t < TOGETHER; t++)
        {
            u32 block = group + t * WARPS;
#pragma unroll
            for (int j = 0; j < 2; j++)
                units[t][j] = block < whole ? load_unit(piece.source + block * BLOCK_BYTES + UNIT * (32 * j + lane)) : uint4();
        }

#pragma unroll
        for (int t = 0; t < TOGETHER; t++)
        {
            u32 block = group + t * WARPS;
            if (block >= whole)
                break;
            u64 even = 0, odd = 0;
#pragma unroll
            for (int j = 0; j < 2; j++)
            {
                add_words(even_word(units[t][j]), odd_word(units[t][j]), keys[j][0], keys[j][1], even, odd);
                put<TYPE>(stores, (block * BLOCK_BYTES + UNIT * (32 * j + lane)) / SIZE, UNIT / SIZE, units[t][j]);
            }

#pragma unroll
            for (int other = 4; other < 32; other *= 2)
            {
                even += from_lane_xor(even, other);
                odd += from_lane_xor(odd, other);
            }

            if (lane < 4)
            {
                shared.sums[block][2 * lane] = even;
                shared.sums[block][2 * lane + 1] = odd;
            }

            if (block == whole - 1 && lane >= 28)
                shared.tail[lane - 28] = units[t][1];
        }
    }

    // The last warps, which have a block less.
    u32 at = whole * BLOCK_BYTES + UNIT * (threadIdx.x - (THREADS - BLOCK_BYTES / UNIT));
    if (threadIdx.x < THREADS - BLOCK_BYTES / UNIT || at >= piece.bytes)
        return;
    int bytes = min((int)(piece.bytes - at), UNIT);
    uint4 unit = bytes == UNIT ? load_unit(piece.source + at) : load_some(piece.source + at, bytes);
    shared.tail[(at - whole * BLOCK_BYTES + STRIPE_BYTES) / UNIT] = unit;
    put<TYPE>(stores, at / SIZE, bytes / SIZE, unit);
}

// By one warp; lanes from 8 on repeat the first eight. For lane 0.
__device__ __forceinline__ Digest digest_of(const Shared& shared, u32 bytes, u32 whole, u64* final_sums)
{
    const unsigned char* tail = (const unsigned char*)shared.tail;
    if (bytes <= SHORT_BYTES)
    {
        const unsigned char* from = tail + STRIPE_BYTES;
        return threadIdx.x > 0 ? Digest() : bytes <= 16 ? digest_of_1_to_16(from, (int)bytes) : digest_of_17_to_240(from, (int)bytes);
    }

    int i = threadIdx.x % 8;
    u64 sum = accumulator_starts[i], key = secret[SECRET_BYTES / 8 - 8 + i];
    for (u32 block = 0; block < whole; block += AHEAD)
    {
        u64 added[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            added[k] = block + k < whole ? shared.sums[block + k][i] : 0;
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
        {
            if (block + k < whole)
                sum = scrambled(sum + added[k], key);
        }
    }

    // Whole stripes of the last block, which is not scrambled, and then the last 64 bytes, which may overlap them.
    int rest = (int)(bytes - whole * BLOCK_BYTES), stripes = (rest - 1) / STRIPE_BYTES;
    for (int stripe = 0; stripe <= stripes; stripe++)
    {
        bool last = stripe == stripes;
        u64 value = last ? word_of(tail + rest + 8 * i, 8) : ((const u64*)shared.tail)[(STRIPE_BYTES / 8) * (stripe + 1) + i];
        u64 term_key = secret_at((last ? SECRET_BYTES - STRIPE_BYTES - 7 : 8 * stripe) + 8 * i);
        sum += product_of_halves(value ^ term_key) + from_lane_xor(value, 1);
    }

    if (threadIdx.x < 8)
        final_sums[i] = sum;
    __syncwarp();
    return threadIdx.x > 0 ? Digest() : merged(final_sums, bytes);
}

// digests [pieces][2]: in the canonical order of bytes. One thread block a piece.
extern "C" __global__ void __launch_bounds__(THREADS, 3) apply(const Piece* pieces, const Store* stores, u64* digests)
{
    __shared__ Shared shared;
    __shared__ u64 final_sums[8];
    Piece piece = pieces[blockIdx.x];
    u32 whole = (piece.bytes - 1) / BLOCK_BYTES;
    if (piece.type == TYPE_BF16)
        read_piece<TYPE_BF16>(piece, stores, whole, shared);
    else if (piece.type == TYPE_F16)
        read_piece<TYPE_F16>(piece, stores, whole, shared);
    else
        read_piece<TYPE_F32>(piece, stores, whole, shared);
    __syncthreads();
    if (threadIdx.x >= 32)
        return;
    Digest digest = digest_of(shared, piece.bytes, whole, final_sums);
    if (threadIdx.x > 0)
        return;
    digests[2 * (u64)blockIdx.x] = swapped(digest.high);
    digests[2 * (u64)blockIdx.x + 1] = swapped(digest.low);
}
ROLLOUT_KERNEL(apply)
