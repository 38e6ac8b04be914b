// XXH3-128 (Collet, xxHash 0.8: seed 0, its default secret) of tensors in device memory, of more than 240 bytes each.
//
// The algorithm adds 16 stripes of 64 bytes to eight accumulators, scrambles these, and repeats. The terms of a stripe do not depend on the
// accumulators: the sums of all blocks of 1024 bytes are computed in parallel, at the speed of memory, and only adding and scrambling them
// is sequential, one warp a tensor.
#include "common.cuh"

#define BLOCK_BYTES 1024
#define STRIPE_BYTES 64
#define WARPS 8
#define AHEAD 8 // blocks whose sums the chain loads ahead

#define PRIME32_1 0x9E3779B1ull
#define PRIME32_2 0x85EBCA77ull
#define PRIME32_3 0xC2B2AE3Dull
#define PRIME64_1 0x9E3779B185EBCA87ull
#define PRIME64_2 0xC2B2AE3D27D4EB4Full
#define PRIME64_3 0x165667B19E3779F9ull
#define PRIME64_4 0x85EBCA77C2B2AE63ull
#define PRIME64_5 0x27D4EB2F165667C5ull

// A piece of a tensor: whole blocks, and after the last of them the rest.
struct Piece
{
    const unsigned char* tensor;
    u64 bytes;       // of the tensor
    u64 first_block; // of the piece
    u32 blocks;
    u32 sums;        // the place of its sums, in blocks
    u32 state;       // the index of its state
    u32 last;
};

__constant__ unsigned char secret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb,
    0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb,
    0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
    0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc,
    0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

__constant__ u64 starts[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};

__device__ __forceinline__ u64 word_at(const unsigned char* p)
{
    if (((u64)p & 7) == 0)
        return *(const u64*)p;
    u64 word = 0;
    for (int i = 0; i < 8; i++)
        word |= (u64)p[i] << (8 * i);
    return word;
}

__device__ __forceinline__ u64 secret_at(int offset)
{
    u64 word = 0;
    for (int i = 0; i < 8; i++)
        word |= (u64)secret[offset + i] << (8 * i);
    return word;
}

__device__ __forceinline__ u64 from_lane_xor(u64 x, int other)
{
    u32 low = __shfl_xor_sync(ALL_LANES, (u32)x, other), high = __shfl_xor_sync(ALL_LANES, (u32)(x >> 32), other);
    return (u64)high << 32 | low;
}

__device__ __forceinline__ u64 product_of_halves(u64 x) { return (x & 0xffffffffu) * (x >> 32); }

// sums [blocks][8]: the terms of a block's stripes for each accumulator. A warp processes a block at a time, a lane four of its 128 words:
// word w is of stripe w / 8, for accumulator w % 8. grid (any, pieces).
extern "C" __global__ void __launch_bounds__(32 * WARPS) digest_sums(const Piece* pieces, u64* sums)
{
    Piece piece = pieces[blockIdx.y];
    int lane = threadIdx.x % 32;
    u64 keys[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        keys[i] = secret_at(8 * ((32 * i + lane) / 8 + lane % 8));
    for (u32 block = blockIdx.x * WARPS + threadIdx.x / 32; block < piece.blocks; block += gridDim.x * WARPS)
    {
        const unsigned char* from = piece.tensor + (piece.first_block + block) * BLOCK_BYTES;
        u64 products = 0, words = 0;
#pragma unroll
        for (int i = 0; i < 4; i++)
        {
            u64 value = word_at(from + 8 * (32 * i + lane));
            products += product_of_halves(value ^ keys[i]);
            words += value;
        }

        u64 sum = products + from_lane_xor(words, 1);
        sum += from_lane_xor(sum, 8);
        sum += from_lane_xor(sum, 16);
        if (lane < 8)
            sums[((u64)piece.sums + block) * 8 + lane] = sum;
    }
}
ROLLOUT_KERNEL(digest_sums)

__device__ __forceinline__ u64 folded_product(u64 a, u64 b)
{
    u64 low = a * b, high = __umul64hi(a, b);
    return low ^ high;
}

__device__ __forceinline__ u64 merged(const u64* sums, int offset, u64 start)
{
    u64 x = start;
    for (int i = 0; i < 4; i++)
        x += folded_product(sums[2 * i] ^ secret_at(offset + 16 * i), sums[2 * i + 1] ^ secret_at(offset + 16 * i + 8));
    x ^= x >> 37;
    x *= 0x165667919E3779F9ull;
    return x ^ x >> 32;
}

// states [tensors][8]: the accumulators between pieces; digests [tensors][2]: low, then high. One warp a piece; lanes from 8 on repeat the
// first eight.
extern "C" __global__ void __launch_bounds__(32) digest_chain(const Piece* pieces, const u64* sums, u64* states, u64* digests)
{
    __shared__ u64 final_sums[8];
    Piece piece = pieces[blockIdx.x];
    int lane = threadIdx.x, i = lane % 8;
    u64* state = states + (u64)piece.state * 8;
    u64 sum = piece.first_block == 0 ? starts[i] : state[i];
    u64 scrambles = secret_at(sizeof secret - STRIPE_BYTES + 8 * i);
    const u64* next = sums + (u64)piece.sums * 8 + i;
    for (u32 block = 0; block < piece.blocks; block += AHEAD)
    {
        u64 added[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            added[k] = block + k < piece.blocks ? next[(u64)(block + k) * 8] : 0;
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
        {
            if (block + k >= piece.blocks)
                continue;
            sum += added[k];
            sum = (sum ^ sum >> 47 ^ scrambles) * PRIME32_1;
        }
    }

    if (!piece.last)
    {
        __syncwarp(); // all have read it
        if (lane < 8)
            state[i] = sum;
        return;
    }

    // Whole stripes of the last block, which is not scrambled, and then the last 64 bytes, which may overlap them.
    const unsigned char* rest = piece.tensor + (piece.first_block + piece.blocks) * BLOCK_BYTES;
    int stripes = (int)((piece.bytes - 1 - (piece.first_block + piece.blocks) * BLOCK_BYTES) / STRIPE_BYTES);
    for (int stripe = 0; stripe <= stripes; stripe++)
    {
        const unsigned char* from = stripe < stripes ? rest + stripe * STRIPE_BYTES : piece.tensor + piece.bytes - STRIPE_BYTES;
        u64 value = word_at(from + 8 * i);
        u64 key = secret_at((stripe < stripes ? 8 * stripe : (int)sizeof secret - STRIPE_BYTES - 7) + 8 * i);
        sum += product_of_halves(value ^ key) + from_lane_xor(value, 1);
    }

    if (lane < 8)
        final_sums[i] = sum;
    __syncwarp();
    if (lane == 0)
    {
        digests[2 * piece.state] = merged(final_sums, 11, piece.bytes * PRIME64_1);
        digests[2 * piece.state + 1] = merged(final_sums, sizeof secret - STRIPE_BYTES - 11, ~(piece.bytes * PRIME64_2));
    }
}
ROLLOUT_KERNEL(digest_chain)
