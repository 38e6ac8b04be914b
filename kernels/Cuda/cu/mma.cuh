// A warp's products of small matrices, on tensor cores where storage is bf16: C [16 x 8] += A [16 x 16] B [16 x 8].
//
// A is fp32, and is represented as the sum of two bf16 numbers (16 bits of mantissa): queries and softmax weights lose almost nothing, and
// B, from memory, is bf16 already. Every element of C is one chain over tiles of 16 in the order of the calls, whatever is in other rows
// and columns.
//
// Lanes hold the elements that the PTX manual gives for "mma.m16n8k16": with g = lane / 4 and t = lane % 4, C's rows g and g + 8 at columns
// 2t and 2t + 1.
#pragma once
#include "common.cuh"

// The size, in fp32 numbers, of a row of A in shared memory, of `columns` numbers (a multiple of 16). With bf16 it has the upper parts,
// then the lower. 48 or 112 bytes more than a multiple of 128: eight rows at the same column are in different banks.
#define ROW_ROOM(columns) ((columns) + 12)

#if STORE_BF16
struct RowTile { u32 high[4], low[4]; };
struct ColumnTile { u32 pairs[2]; };

#define LOW_PART(columns) ((columns) + 8) // offset of a row's lower parts, in bf16 numbers

#if defined(ROLLOUT_SIM)
__device__ __forceinline__ u32 bf16_pair(float first, float second) { return store(first) | (u32)store(second) << 16; }
__device__ __forceinline__ void mma(float* c, const u32* a, const u32* b) { sim_mma(c, a, b); }
__device__ __forceinline__ void load_2(u32* a, const stored* row) { sim_load_matrices<2, false>(a, nullptr, row); }
__device__ __forceinline__ void load_4(u32* a, u32* b, const stored* row) { sim_load_matrices<4, false>(a, b, row); }
__device__ __forceinline__ void load_2_transposed(u32* a, const stored* row) { sim_load_matrices<2, true>(a, nullptr, row); }
__device__ __forceinline__ void load_4_transposed(u32* a, u32* b, const stored* row) { sim_load_matrices<4, true>(a, b, row); }
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

// Two or four tiles of 8 x 8, into a and then b. Lanes 8i to 8i + 7 have the addresses of the rows, of 8 numbers, of tile i; of every tile
// a lane receives columns 2t and 2t + 1 of row g, or, transposed, column g of rows 2t and 2t + 1.
__device__ __forceinline__ void load_2(u32* a, const stored* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(a[0]), "=r"(a[1]) : "r"(shared_address(row)) : "memory");
}

__device__ __forceinline__ void load_4(u32* a, u32* b, const stored* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(a[0]), "=r"(a[1]), "=r"(b[0]), "=r"(b[1]) : "r"(shared_address(row)) : "memory");
}

__device__ __forceinline__ void load_2_transposed(u32* a, const stored* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(a[0]), "=r"(a[1]) : "r"(shared_address(row)) : "memory");
}

__device__ __forceinline__ void load_4_transposed(u32* a, u32* b, const stored* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(a[0]), "=r"(a[1]), "=r"(b[0]), "=r"(b[1]) : "r"(shared_address(row)) : "memory");
}
#endif

// Writes column i of a row of A.
template <int COLUMNS>
__device__ __forceinline__ void put(float* row, int i, float x)
{
    u32 high = bf16_pair(x, 0);
    ((stored*)row)[i] = (stored)high;
    ((stored*)row)[LOW_PART(COLUMNS) + i] = (stored)bf16_pair(x - __uint_as_float(high << 16), 0);
}

// Columns [first, first + 16) of 16 rows of A, each of ROW_ROOM(COLUMNS).
template <int COLUMNS>
__device__ __forceinline__ void load_rows(RowTile& tile, const float* rows, int first, int lane)
{
    const stored* row = (const stored*)(rows + lane % 16 * ROW_ROOM(COLUMNS)) + first + lane / 16 * 8;
    load_4(tile.high, tile.high + 2, row);
    load_4(tile.low, tile.low + 2, row + LOW_PART(COLUMNS));
}

// B's columns are rows of memory, columns [8][stride]: COUNT tiles, 1 or 2, consecutive along the rows of memory.
template <int COUNT>
__device__ __forceinline__ void load_columns(ColumnTile* tiles, const stored* columns, int stride, int lane)
{
    const stored* row = columns + lane % 8 * stride + lane / 8 % (2 * COUNT) * 8;
    if (COUNT == 2)
        load_4(tiles[0].pairs, tiles[COUNT - 1].pairs, row);
    else
        load_2(tiles[0].pairs, row);
}

// B in memory order, rows [16][stride]: COUNT tiles, 1 or 2, side by side.
template <int COUNT>
__device__ __forceinline__ void load_columns_of_rows(ColumnTile* tiles, const stored* rows, int stride, int lane)
{
    const stored* row = rows + lane % 16 * stride + lane / 16 % COUNT * 8;
    if (COUNT == 2)
        load_4_transposed(tiles[0].pairs, tiles[COUNT - 1].pairs, row);
    else
        load_2_transposed(tiles[0].pairs, row);
}

__device__ __forceinline__ void multiply_add(float* c, const RowTile& a, const ColumnTile& b)
{
    mma(c, a.low, b.pairs);
    mma(c, a.high, b.pairs);
}

#else
// fp32 has no tensor cores: a lane computes its four elements itself, and a tile holds pointers to its rows and columns.
struct RowTile { const float *upper, *lower; };
struct ColumnTile { const float *left, *right; int step; };

template <int COLUMNS>
__device__ __forceinline__ void put(float* row, int i, float x) { row[i] = x; }

template <int COLUMNS>
__device__ __forceinline__ void load_rows(RowTile& tile, const float* rows, int first, int lane)
{
    tile.upper = rows + lane / 4 * ROW_ROOM(COLUMNS) + first;
    tile.lower = tile.upper + 8 * ROW_ROOM(COLUMNS);
}

template <int COUNT>
__device__ __forceinline__ void load_columns(ColumnTile* tiles, const float* columns, int stride, int lane)
{
    for (int i = 0; i < COUNT; i++)
    {
        tiles[i].left = columns + lane % 4 * 2 * stride + 16 * i;
        tiles[i].right = tiles[i].left + stride;
        tiles[i].step = 1;
    }
}

template <int COUNT>
__device__ __forceinline__ void load_columns_of_rows(ColumnTile* tiles, const float* rows, int stride, int lane)
{
    for (int i = 0; i < COUNT; i++)
    {
        tiles[i].left = rows + lane % 4 * 2 + 8 * i;
        tiles[i].right = tiles[i].left + 1;
        tiles[i].step = stride;
    }
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
