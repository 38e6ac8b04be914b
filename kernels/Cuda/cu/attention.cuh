// Sizes of attention.cu, the items of its blocks, and their shared memory.
//
// Defined on the compiler's command line: HEAD_DIM; ROW_TILES, of 16 queries (rows times heads) an item; SHARED_BYTES of the launch.
#pragma once
#include "mma.cuh"

#define BLOCK_TOKENS 16
#define CHUNK 128
#define STAGE 32
#define STAGES 4
#define TILE (16 * ROW_TILES)
#define COLUMN_WARPS (ROW_TILES == 4 ? 2 : 4)
#define WARPS (ROW_TILES * COLUMN_WARPS)
#define THREADS (32 * WARPS)
#define HEAD_PADDED ((HEAD_DIM + 15) / 16 * 16) // with zeros
#define HEAD_TILES (HEAD_PADDED / 16)
#define OUTPUT_TILES ((HEAD_PADDED / 8 + COLUMN_WARPS - 1) / COLUMN_WARPS) // of 8 columns, a warp
#define SCORE_TILES (STAGE / 8 / COLUMN_WARPS)                              // of 8 tokens, a warp
#define STAGE_ROW (HEAD_PADDED + 16 / (int)sizeof(stored))                  // padded: neighbouring rows begin in different banks
#define PARTIAL (HEAD_DIM + 4) // of a chunk and a query: weighted values, m, l, and padding to 16 bytes

// Blocks of a multiprocessor that registers leave room for, and how many of the queries' tiles registers can then hold; the others are
// loaded again.
#define RESIDENT (ROW_TILES == 1 ? (HEAD_DIM <= 64 ? 4 : 3) : (HEAD_DIM <= 64 ? 2 : 1))
#define KEPT (HEAD_DIM > 128 ? 1 : HEAD_DIM > 32 && HEAD_DIM <= 64 && ROW_TILES == 4 ? 2 : HEAD_TILES)

// As CudaAttentionPlan writes it.
struct alignas(16) Item
{
    int first_row, rows;
    int first_chunk, chunks;
    int split;    // whether each of these rows has items of other chunks
    int sequence; // of the first row: whose block table is read
    int last;     // the furthest token that a row sees
    int unused;
};

struct alignas(16) Shared
{
    stored stages[STAGES][STAGE][STAGE_ROW];
    stored own_key[HEAD_PADDED], own_value[HEAD_PADDED];
    float queries[TILE][ROW_ROOM(HEAD_PADDED)]; // as rows of A; then the intermediate results of a merge
    float scores[TILE][ROW_ROOM(CHUNK)];        // then weights, as rows of A
    float top[TILE], sum[TILE], chunk_top[TILE], chunk_sum[TILE], keep[TILE], take[TILE];
    int position[TILE];
    int sees[TILE];    // whether a query sees a token of the chunk
    int place[TILE];   // row * heads + head
    int slot[TILE];    // the row's first part
    int merges[TILE];  // by row of the item: its chunks, where this block merges them; else 0
    int blocks[2][CHUNK / BLOCK_TOKENS]; // of even and of odd chunks
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the launch asks for less shared memory than the kernel uses");
