// A warp's products of small matrices, on tensor cores where storage is bf16: C [16 x 8] += A [16 x 16] B [16 x 8].
//
// A is fp32, and goes in as the sum of two bf16 numbers (16 bits of mantissa): queries and softmax weights lose next to nothing, and what memory
// holds, B, is bf16 already. Every element of C is one chain over tiles of 16 in the order of the calls, whatever is in other rows and columns.
//
// Lanes hold what "mma.m16n8k16" of the PTX manual says: with g = lane / 4 and t = lane % 4, C's rows g and g + 8 at columns 2t and 2t + 1.
#pragma once
#include "common.cuh"

#if STORE_BF16
struct RowTile { u32 high[4], low[4]; };
struct ColumnTile { u32 pairs[2]; };

#if defined(ROLLOUT_SIM)
__device__ __forceinline__ u32 bf16_pair(float first, float second) { return store(first) | (u32)store(second) << 16; }
__device__ __forceinline__ void mma(float* c, const u32* a, const u32* b) { sim_mma(c, a, b); }
__device__ __forceinline__ void load_transposed(u32* pairs, const stored* row) { sim_load_transposed(pairs, row); }
#else
__device__ __forceinline__ u32 bf16_pair(float first, float second)
{
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

__device__ __forceinline__ void mma(float* c, const u32* a, const u32* b)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Of lanes 0 to 15 the row, of 8 numbers, of two 8 x 8 tiles; every lane gets column g of rows 2t and 2t + 1 of both.
__device__ __forceinline__ void load_transposed(u32* pairs, const stored* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(pairs[0]), "=r"(pairs[1]) : "r"(shared_address(row)) : "memory");
}
#endif

// rows [16][stride] in shared memory.
__device__ __forceinline__ void load_rows(RowTile& tile, const float* rows, int stride, int lane)
{
    const float* first = rows + lane / 4 * stride + lane % 4 * 2;
    for (int i = 0; i < 4; i++)
    {
        float2 x = *(const float2*)(first + i % 2 * 8 * stride + i / 2 * 8);
        tile.high[i] = bf16_pair(x.x, x.y);
        tile.low[i] = bf16_pair(x.x - __uint_as_float(tile.high[i] << 16), x.y - __uint_as_float(tile.high[i] & 0xffff0000u));
    }
}

// B's columns are rows of memory: columns [8][stride].
__device__ __forceinline__ void load_columns(ColumnTile& tile, const stored* columns, int stride, int lane)
{
    const stored* first = columns + lane / 4 * stride + lane % 4 * 2;
    tile.pairs[0] = *(const u32*)first;
    tile.pairs[1] = *(const u32*)(first + 8);
}

// B as memory has it: rows [16][stride].
__device__ __forceinline__ void load_columns_of_rows(ColumnTile& tile, const stored* rows, int stride, int lane)
{
    load_transposed(tile.pairs, rows + lane % 16 * stride);
}

__device__ __forceinline__ void multiply_add(float* c, const RowTile& a, const ColumnTile& b)
{
    mma(c, a.low, b.pairs);
    mma(c, a.high, b.pairs);
}

#else
// fp32 has no tensor cores: a lane computes its four elements itself, and a tile is where its rows and columns lie.
struct RowTile { const float *upper, *lower; };
struct ColumnTile { const float *left, *right; int step; };

__device__ __forceinline__ void load_rows(RowTile& tile, const float* rows, int stride, int lane)
{
    tile.upper = rows + lane / 4 * stride;
    tile.lower = tile.upper + 8 * stride;
}

__device__ __forceinline__ void load_columns(ColumnTile& tile, const float* columns, int stride, int lane)
{
    tile.left = columns + lane % 4 * 2 * stride;
    tile.right = tile.left + stride;
    tile.step = 1;
}

__device__ __forceinline__ void load_columns_of_rows(ColumnTile& tile, const float* rows, int stride, int lane)
{
    tile.left = rows + lane % 4 * 2;
    tile.right = tile.left + 1;
    tile.step = stride;
}

__device__ __forceinline__ void multiply_add(float* c, const RowTile& a, const ColumnTile& b)
{
    for (int k = 0; k < 16; k++)
    {
        float left = b.left[k * b.step], right = b.right[k * b.step];
        c[0] = fmaf(a.upper[k], left, c[0]);
        c[1] = fmaf(a.upper[k], right, c[1]);
        c[2] = fmaf(a.lower[k], left, c[2]);
        c[3] = fmaf(a.lower[k], right, c[3]);
    }
}
#endif
