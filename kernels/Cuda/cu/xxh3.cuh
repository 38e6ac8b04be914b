// XXH3-128 (Collet, xxHash 0.8: seed 0, its default secret), by one thread block, of bytes whose sums of blocks are computed in parallel.
//
// The algorithm adds 16 stripes of 64 bytes to eight accumulators, scrambles these, and repeats. The terms of a stripe do not depend on the
// accumulators: all blocks of 1024 bytes are summed in parallel, at the speed of memory, and only adding and scrambling the sums is
// sequential. Up to 240 bytes there are other algorithms.
#pragma once
#include "common.cuh"

#define BLOCK_BYTES 1024
#define STRIPE_BYTES 64
#define SHORT_BYTES 240
#define SECRET_BYTES 192

#define PRIME32_1 0x9E3779B1ull
#define PRIME32_2 0x85EBCA77ull
#define PRIME32_3 0xC2B2AE3Dull
#define PRIME64_1 0x9E3779B185EBCA87ull
#define PRIME64_2 0xC2B2AE3D27D4EB4Full
#define PRIME64_3 0x165667B19E3779F9ull
#define PRIME64_4 0x85EBCA77C2B2AE63ull
#define PRIME64_5 0x27D4EB2F165667C5ull

// 192 bytes, little-endian.
__constant__ u64 secret[SECRET_BYTES / 8] = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
    0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
    0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
    0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
    0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull,
};

__constant__ u64 accumulator_starts[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};

struct Digest { u64 low, high; };

// Eight bytes of the secret from any byte on.
__device__ __forceinline__ u64 secret_at(int offset)
{
    int shift = offset % 8 * 8;
    u64 word = secret[offset / 8];
    return shift == 0 ? word : word >> shift | secret[offset / 8 + 1] << (64 - shift);
}

// ---- The terms of a block's stripes, and the chain over them.

__device__ __forceinline__ u64 product_of_halves(u64 x) { return (x & 0xffffffffu) * (x >> 32); }

// The sums of a block are those of its words: word w belongs to stripe w / 8, accumulator w % 8, and is also added to its neighbour's.
__device__ __forceinline__ void add_words(u64 even, u64 odd, u64 even_key, u64 odd_key, u64& even_sum, u64& odd_sum)
{
    even_sum += product_of_halves(even ^ even_key) + odd;
    odd_sum += product_of_halves(odd ^ odd_key) + even;
}

__device__ __forceinline__ u64 from_lane_xor(u64 x, int other)
{
    u32 low = __shfl_xor_sync(ALL_LANES, (u32)x, other), high = __shfl_xor_sync(ALL_LANES, (u32)(x >> 32), other);
    return (u64)high << 32 | low;
}

__device__ __forceinline__ u64 scrambled(u64 sum, u64 key) { return (sum ^ sum >> 47 ^ key) * PRIME32_1; }

__device__ __forceinline__ u64 folded_product(u64 a, u64 b) { return a * b ^ __umul64hi(a, b); }

// The algorithm's two avalanches.
__device__ __forceinline__ u64 mixed(u64 x)
{
    x = (x ^ x >> 37) * 0x165667919E3779F9ull;
    return x ^ x >> 32;
}

__device__ __forceinline__ u64 mixed_more(u64 x)
{
    x = (x ^ x >> 33) * PRIME64_2;
    x = (x ^ x >> 29) * PRIME64_3;
    return x ^ x >> 32;
}

__device__ __forceinline__ u64 merged(const u64* sums, int offset, u64 start)
{
    u64 x = start;
    for (int i = 0; i < 4; i++)
        x += folded_product(sums[2 * i] ^ secret_at(offset + 16 * i), sums[2 * i + 1] ^ secret_at(offset + 16 * i + 8));
    return mixed(x);
}

__device__ __forceinline__ Digest merged(const u64* sums, u64 bytes)
{
    return {merged(sums, 11, bytes * PRIME64_1), merged(sums, SECRET_BYTES - STRIPE_BYTES - 11, ~(bytes * PRIME64_2))};
}

// ---- Up to 240 bytes, by one thread.

__device__ __forceinline__ u64 word_of(const unsigned char* from, int bytes)
{
    u64 word = 0;
    for (int i = 0; i < bytes; i++)
        word |= (u64)from[i] << (8 * i);
    return word;
}

__device__ __forceinline__ u64 swapped(u64 x)
{
    u64 y = 0;
    for (int i = 0; i < 8; i++)
        y |= (x >> (8 * i) & 0xff) << (56 - 8 * i);
    return y;
}

__device__ __forceinline__ u64 mixed_16(const unsigned char* from, int offset)
{
    return folded_product(word_of(from, 8) ^ secret_at(offset), word_of(from + 8, 8) ^ secret_at(offset + 8));
}

// 16 bytes from each of two places.
__device__ __forceinline__ void add_32(Digest& sums, const unsigned char* one, const unsigned char* other, int offset)
{
    sums.low = (sums.low + mixed_16(one, offset)) ^ (word_of(other, 8) + word_of(other + 8, 8));
    sums.high = (sums.high + mixed_16(other, offset + 16)) ^ (word_of(one, 8) + word_of(one + 8, 8));
}

__device__ __noinline__ Digest digest_of_1_to_16(const unsigned char* from, int bytes)
{
    if (bytes < 4)
    {
        u32 low = (u32)from[0] << 16 | (u32)from[bytes / 2] << 24 | from[bytes - 1] | (u32)bytes << 8;
        u32 turned = (u32)(swapped(low) >> 32), high = turned << 13 | turned >> 19;
        return {mixed_more(low ^ (u32)secret[0] ^ secret[0] >> 32), mixed_more(high ^ (u32)secret[1] ^ secret[1] >> 32)};
    }

    if (bytes <= 8)
    {
        u64 key = (word_of(from, 4) + (word_of(from + bytes - 4, 4) << 32)) ^ secret[2] ^ secret[3];
        u64 factor = PRIME64_1 + ((u64)bytes << 2);
        u64 low = key * factor, high = __umul64hi(key, factor) + (low << 1);
        low ^= high >> 3;
        low = (low ^ low >> 35) * 0x9FB21C651E98DF25ull;
        return {low ^ low >> 28, mixed(high)};
    }

    u64 last = word_of(from + bytes - 8, 8), key = word_of(from, 8) ^ last ^ secret[4] ^ secret[5];
    u64 low = key * PRIME64_1 + ((u64)(bytes - 1) << 54), high = __umul64hi(key, PRIME64_1);
    last ^= secret[6] ^ secret[7];
    high += last + (last & 0xffffffffu) * (PRIME32_2 - 1);
    low ^= swapped(high);
    return {mixed(low * PRIME64_2), mixed(__umul64hi(low, PRIME64_2) + high * PRIME64_2)};
}

__device__ __noinline__ Digest digest_of_17_to_240(const unsigned char* from, int bytes)
{
    Digest sums = {bytes * PRIME64_1, 0};
    if (bytes <= 128)
    {
        for (int i = (bytes - 1) / 32; i >= 0; i--)
            add_32(sums, from + 16 * i, from + bytes - 16 * (i + 1), 32 * i);
    }
    else
    {
        for (int i = 0; i < 4; i++)
            add_32(sums, from + 32 * i, from + 32 * i + 16, 32 * i);
        sums = {mixed(sums.low), mixed(sums.high)};
        for (int i = 4; i < bytes / 32; i++)
            add_32(sums, from + 32 * i, from + 32 * i + 16, 32 * i - 125);
        add_32(sums, from + bytes - 16, from + bytes - 32, 103);
    }

    u64 high = sums.low * PRIME64_1 + sums.high * PRIME64_4 + bytes * PRIME64_2;
    return {mixed(sums.low + sums.high), 0 - mixed(high)};
}
