// Causal attention over paged keys and values, for prefill and decode alike: a row has the same bits however its step is cut.
//
// A context is walked in chunks of CHUNK tokens from position 0. Of one chunk and one query: scores are chains over head_dim, their maximum m and the
// sum l of exp(score - m) come from one warp in a fixed tree, and the weighted values are chains over ascending tokens (mma.cuh). Chunks merge in
// ascending order (Milakov and Gimelshein 2018; Dao et al. 2022):
//   M' = max(M, m), L' = L exp(M - M') + l exp(m - M'), A' = A exp(M - M') + a exp(m - M')
// Tokens of a chunk that a query does not see count as weights of zero, which change no bit.
//
// A block has an item: rows that look at the same blocks of the cache, and one chunk or all of them. With one chunk, what it finds waits in `partials`
// for the block that comes last, which merges them: how a long context of few sequences fills the device. With all, it merges as it goes. Rows of
// several sequences in one item have a prefix in common, which is then read once for all of them.
//
// Keys, then values, of a chunk come through a ring of STAGES places of STAGE tokens each. Of the warps, those with one row tile share its scores by
// tokens and its output by columns.
//
// Where every sequence of the step has one row, `rope` is given, and a block also does what rope_store of step.cu does in other steps: it rotates its
// queries, and the one that holds the row's own token rotates its key and stores both. Same arithmetic, same bits, one launch less.
//
// Definitions of the compiler: HEAD_DIM; ROW_TILES, of 16 queries (rows times heads) an item; SHARED_BYTES of the launch.
// Cache: [blocks][kv_heads][BLOCK_TOKENS][HEAD_DIM].
#include "copy.cuh"
#include "mma.cuh"
#include "rope.cuh"

#define BLOCK_TOKENS 16
#define CHUNK 128
#define STAGE 32
#define STAGES 4
#define TILE (16 * ROW_TILES)
#define COLUMN_WARPS (ROW_TILES == 4 ? 2 : 4)
#define THREADS (32 * ROW_TILES * COLUMN_WARPS)
#define HEAD_PADDED ((HEAD_DIM + 15) / 16 * 16) // with zeros
#define HEAD_TILES (HEAD_PADDED / 16)
#define OUTPUT_TILES ((HEAD_PADDED / 8 + COLUMN_WARPS - 1) / COLUMN_WARPS) // of 8 columns, a warp
#define SCORE_TILES (STAGE / 8 / COLUMN_WARPS)                              // of 8 tokens, a warp
#define ROOM (16 / (int)sizeof(stored))             // that a staged row has left over
#define VECTOR (HEAD_DIM % ROOM == 0 ? ROOM : 1)   // elements of one copy: heads of odd sizes have no 16 bytes in line
#define VECTORS (HEAD_DIM / VECTOR)

struct Item
{
    int first_row, rows;
    int first_chunk, chunks;
    int split; // whether each of these rows has items of other chunks
};

// Rows are longer than they need to be, so that those next to each other begin in other banks.
struct alignas(16) Shared
{
    stored stages[STAGES][STAGE][HEAD_PADDED + ROOM];
    stored own_key[HEAD_PADDED], own_value[HEAD_PADDED];
    float queries[TILE][HEAD_PADDED + 8];
    float scores[TILE][CHUNK + 8];
    float top[TILE], sum[TILE], chunk_top[TILE], chunk_sum[TILE], keep[TILE], take[TILE];
    int visible[TILE]; // tokens of the chunk that a query sees
    int sees[TILE];    // whether any, once the chunk's scores are done
    u32 merges[TILE];  // by row of the item
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the launch asks for less shared memory than the kernel uses");

// grid (items, kv_heads, slices of a group's heads).
extern "C" __global__ void __launch_bounds__(THREADS) attend(
    const StepHeader* step, const float* qkv, int stride, const int* positions, const int* sequences, stored* keys, stored* values, int heads, int kv_heads, int slice, float scale, stored* output,
    const int* row_slots, float* partials, u32* counters, const float* query_norm, const float* key_norm, float epsilon, const float* rope)
{
    LAUNCHED_SHARED(Shared, s);
    if ((int)blockIdx.x >= step->items)
        return; // the launch is rounded up
    Item item = ((const Item*)((const char*)step + step->items_at))[blockIdx.x];
    int kv_head = blockIdx.y, group = heads / kv_heads, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    int first_head = kv_head * group + blockIdx.z * slice;
    int slice_heads = min(slice, group - (int)blockIdx.z * slice), count = item.rows * slice_heads;
    const int* table = step->table(sequences[item.first_row]);

    int row_tile = warp / COLUMN_WARPS * 16, part = warp % COLUMN_WARPS; // what this warp multiplies
    bool multiplies = row_tile < count;
    int first_chunk = item.first_chunk, end_chunk = first_chunk + item.chunks;
    int last = 0; // the furthest token that a row of the item sees: sequences that share a prefix end where they like
    for (int r = 0; r < item.rows; r++)
        last = max(last, positions[item.first_row + r]);

    // ---- Queries, and the token that this block adds to the cache.
    for (int q = warp; q < TILE; q += THREADS / 32)
    {
        int row = item.first_row + q / slice_heads;
        const float* x = qkv + (long long)row * stride + (first_head + q % slice_heads) * HEAD_DIM;
        if (q < count && rope != nullptr)
            rotate_head(x, query_norm, epsilon, rope + (long long)positions[row] * HEAD_DIM, HEAD_DIM, lane, [&](int i, float value) { s.queries[q][i] = value; });
        else
        {
            for (int d = lane; d < HEAD_DIM; d += 32)
                s.queries[q][d] = q < count ? x[d] : 0;
        }

        for (int d = HEAD_DIM + lane; d < HEAD_PADDED; d += 32)
            s.queries[q][d] = 0;
    }

    int own = -1; // its position
    if (rope != nullptr && positions[item.first_row] / CHUNK < end_chunk)
    {
        // The item has this row only: what several rows share came before.
        own = positions[item.first_row];
        const float* key = qkv + (long long)item.first_row * stride + (heads + kv_head) * HEAD_DIM;
        const float* value = key + kv_heads * HEAD_DIM;
        long long slot = (((long long)table[own / BLOCK_TOKENS] * kv_heads + kv_head) * BLOCK_TOKENS + own % BLOCK_TOKENS) * HEAD_DIM;
        bool stores = blockIdx.z == 0;
        if (warp == 0)
        {
            rotate_head(key, key_norm, epsilon, rope + (long long)own * HEAD_DIM, HEAD_DIM, lane, [&](int i, float rotated)
            {
                s.own_key[i] = store(rotated);
                if (stores)
                    keys[slot + i] = store(rotated);
            });
        }

        for (int d = thread; d < HEAD_DIM; d += THREADS)
        {
            s.own_value[d] = store(value[d]);
            if (stores)
                values[slot + d] = store(value[d]);
        }
    }

    if (HEAD_PADDED > HEAD_DIM)
    {
        for (int i = thread; i < STAGES * STAGE * (HEAD_PADDED + ROOM); i += THREADS)
            s.stages[0][0][i] = 0;
    }

    if (thread < TILE)
    {
        s.top[thread] = -INFINITE;
        s.sum[thread] = 0;
    }

    __syncthreads();
    RowTile query[HEAD_TILES];
#pragma unroll
    for (int k = 0; k < HEAD_TILES; k++)
        load_rows(query[k], &s.queries[row_tile][16 * k], HEAD_PADDED + 8, lane);

    // ---- The ring. What is copied next: keys, then values, of chunk after chunk.
    int next_chunk = first_chunk, next_stage = 0, copied = 0, used = 0;
    bool next_is_value = false;
    auto stages_of = [&](int chunk) { return (min(CHUNK, last + 1 - chunk * CHUNK) + STAGE - 1) / STAGE; };
    auto copy_next = [&]()
    {
        if (next_chunk < end_chunk)
        {
            stored(*to)[HEAD_PADDED + ROOM] = s.stages[copied++ % STAGES];
            const stored* from = next_is_value ? values : keys;
            const stored* own_row = next_is_value ? s.own_value : s.own_key;
            int first_token = next_chunk * CHUNK + next_stage * STAGE;
            for (int i = thread; i < STAGE * VECTORS; i += THREADS)
            {
                int row = i / VECTORS, d = i % VECTORS * VECTOR, token = first_token + row;
                bool present = token <= last;
                long long slot = (((long long)table[present ? token / BLOCK_TOKENS : 0] * kv_heads + kv_head) * BLOCK_TOKENS + token % BLOCK_TOKENS) * HEAD_DIM;
                if (VECTOR == 1)
                    to[row][d] = token == own ? own_row[d] : present ? from[slot + d] : 0;
                else if (token == own)
                    *(uint4*)&to[row][d] = *(const uint4*)&own_row[d];
                else
                    copy_16(&to[row][d], from + slot + d, present);
            }

            if (++next_stage == stages_of(next_chunk))
            {
                next_stage = 0;
                next_chunk += next_is_value;
                next_is_value = !next_is_value;
            }
        }

        end_group();
    };
    auto next_stage_arrives = [&]()
    {
        wait_for_groups<STAGES - 2>();
        __syncthreads(); // of all threads; and all are done with the place that is written next
        copy_next();
        return s.stages[used++ % STAGES];
    };
    for (int i = 0; i < STAGES - 1; i++)
        copy_next();

    float total[OUTPUT_TILES][4] = {};
    for (int chunk = first_chunk; chunk < end_chunk; chunk++)
    {
        int stages = stages_of(chunk);
        if (thread < TILE)
            s.visible[thread] = thread < count ? max(0, min(CHUNK, positions[item.first_row + thread / slice_heads] - chunk * CHUNK + 1)) : 0;
        for (int stage = 0; stage < stages; stage++)
        {
            auto tokens = next_stage_arrives();
            for (int n = 0; n < SCORE_TILES && multiplies; n++)
            {
                int token = (part * SCORE_TILES + n) * 8;
                float c[4] = {};
#pragma unroll
                for (int k = 0; k < HEAD_TILES; k++)
                {
                    ColumnTile key;
                    load_columns(key, &tokens[token][16 * k], HEAD_PADDED + ROOM, lane);
                    multiply_add(c, query[k], key);
                }

                float* to = &s.scores[row_tile + lane / 4][stage * STAGE + token + lane % 4 * 2];
                *(float2*)to = {c[0] * scale, c[1] * scale};
                *(float2*)(to + 8 * (CHUNK + 8)) = {c[2] * scale, c[3] * scale};
            }
        }

        __syncthreads();
        for (int q = warp; q < (count + 15) / 16 * 16; q += THREADS / 32)
        {
            int sees = s.visible[q];
            float most = -INFINITE, sum = 0;
            for (int t = lane; t < sees; t += 32)
                most = fmaxf(most, s.scores[q][t]);
            most = warp_max(most);
            for (int t = lane; t < stages * STAGE; t += 32)
            {
                float weight = t < sees ? exp_of(s.scores[q][t] - most) : 0;
                s.scores[q][t] = weight;
                sum += weight;
            }

            sum = warp_sum(sum);
            if (lane == 0)
            {
                s.sees[q] = sees > 0;
                s.chunk_top[q] = most;
                s.chunk_sum[q] = sum;
                if (sees > 0)
                {
                    float above = fmaxf(s.top[q], most);
                    s.keep[q] = exp_of(s.top[q] - above);
                    s.take[q] = exp_of(most - above);
                    s.sum[q] = fmaf(s.sum[q], s.keep[q], sum * s.take[q]);
                    s.top[q] = above;
                }
            }
        }

        float weighted[OUTPUT_TILES][4] = {};
        for (int stage = 0; stage < stages; stage++)
        {
            auto tokens = next_stage_arrives();
            for (int k = 0; k < STAGE / 16 && multiplies; k++)
            {
                RowTile weights;
                load_rows(weights, &s.scores[row_tile][stage * STAGE + 16 * k], CHUNK + 8, lane);
#pragma unroll
                for (int n = 0; n < OUTPUT_TILES; n++)
                {
                    int column = (part * OUTPUT_TILES + n) * 8;
                    if (column < HEAD_PADDED)
                    {
                        ColumnTile value;
                        load_columns_of_rows(value, &tokens[16 * k][column], HEAD_PADDED + ROOM, lane);
                        multiply_add(weighted[n], weights, value);
                    }
                }
            }
        }

#pragma unroll
        for (int i = 0; i < 4; i++)
        {
            int q = row_tile + lane / 4 + i / 2 * 8;
#pragma unroll
            for (int n = 0; n < OUTPUT_TILES; n++)
            {
                if (item.split)
                    total[n][i] = weighted[n][i]; // the only chunk of this item
                else if (multiplies && s.sees[q])
                    total[n][i] = fmaf(total[n][i], s.keep[q], weighted[n][i] * s.take[q]);
            }
        }
    }

    // ---- What the block found: the output, or a part of it [row_slots[row] + chunk][heads][HEAD_DIM + 2]: weighted values, then m and l.
#pragma unroll
    for (int i = 0; i < 4; i++)
    {
        int q = row_tile + lane / 4 + i / 2 * 8, row = item.first_row + q / slice_heads, head = first_head + q % slice_heads;
#pragma unroll
        for (int n = 0; n < OUTPUT_TILES; n++)
        {
            int d = (part * OUTPUT_TILES + n) * 8 + lane % 4 * 2 + i % 2;
            if (q >= count || d >= HEAD_DIM)
                continue;
            if (item.split)
                partials[((long long)(row_slots[row] + first_chunk) * heads + head) * (HEAD_DIM + 2) + d] = total[n][i];
            else
                output[((long long)row * heads + head) * HEAD_DIM + d] = store(total[n][i] / s.sum[q]);
        }
    }

    if (!item.split)
        return;
    if (thread < count)
    {
        long long slot = row_slots[item.first_row + thread / slice_heads] + first_chunk;
        float* found = partials + (slot * heads + first_head + thread % slice_heads) * (HEAD_DIM + 2) + HEAD_DIM;
        found[0] = s.chunk_top[thread];
        found[1] = s.chunk_sum[thread];
    }

    __threadfence();
    __syncthreads();
    if (thread < item.rows)
    {
        u32* counter = counters + ((long long)(item.first_row + thread) * kv_heads + kv_head) * gridDim.z + blockIdx.z;
        u32 chunks = positions[item.first_row + thread] / CHUNK + 1;
        s.merges[thread] = atomicAdd(counter, 1u) + 1u == chunks;
        if (s.merges[thread])
            *counter = 0; // for the next layer
    }

    __syncthreads();
    __threadfence();
    for (int i = thread; i < count * HEAD_DIM; i += THREADS)
    {
        int q = i / HEAD_DIM, d = i % HEAD_DIM;
        if (!s.merges[q / slice_heads])
            continue;
        int row = item.first_row + q / slice_heads, chunks = positions[row] / CHUNK + 1, head = first_head + q % slice_heads;
        float merged = 0, merged_sum = 0, merged_top = -INFINITE;
        for (int chunk = 0; chunk < chunks; chunk++)
        {
            // Past the first-level cache: other blocks wrote these.
            const volatile float* found = partials + ((long long)(row_slots[row] + chunk) * heads + head) * (HEAD_DIM + 2);
            float above = fmaxf(merged_top, found[HEAD_DIM]);
            float keep = exp_of(merged_top - above), take = exp_of(found[HEAD_DIM] - above);
            merged_sum = fmaf(merged_sum, keep, found[HEAD_DIM + 1] * take);
            merged = fmaf(merged, keep, found[d] * take);
            merged_top = above;
        }

        output[((long long)row * heads + head) * HEAD_DIM + d] = store(merged / merged_sum);
    }
}
ROLLOUT_KERNEL(attend)
