// Causal attention over paged keys and values, for prefill and decode: a row has the same bits however its step is cut.
//
// A context is processed in chunks of CHUNK tokens from position 0. For one chunk and one query: scores are chains over head_dim, their
// maximum m and the sum l of exp(score - m) come from one warp in a fixed tree, and the weighted values are chains over ascending tokens
// (mma.cuh). Chunks merge in ascending order (Milakov and Gimelshein 2018; Dao et al. 2022):
//   M' = max(M, m), L' = L exp(M - M') + l exp(m - M'), A' = A exp(M - M') + a exp(m - M')
// Tokens of a chunk that a query does not see have weights of zero, which change no bit.
//
// An item is rows that attend to the same blocks of the cache, and one chunk or all of them. With one chunk, a block's result waits in
// `partials` for the last block, which merges them (merge.cuh): thus a long context of few sequences fills the device. With all chunks, the
// block merges them itself. Rows of several sequences in one item share a prefix, which is then read once for all of them. A block takes
// one item after the other, so that the launch does not depend on the number of items: steps of equally many rows have equal launches.
//
// A block's warps with the same row tile divide its scores by tokens and its output by columns.
//
// Where every sequence of the step has one row, `rope` is given, and a block also does what rope_store of step.cu does in other steps: it
// rotates its queries, and the block with the row's own token rotates its key and stores key and value. Same arithmetic, same bits, one
// launch less.
//
// Cache: [blocks][kv_heads][BLOCK_TOKENS][HEAD_DIM].
#include "merge.cuh"
#include "ring.cuh"
#include "rope.cuh"

// Puts a token's own key or value into its empty place in a stage.
__device__ __forceinline__ void put_own(stored (*tokens)[STAGE_ROW], int place, const stored* own)
{
    if (place < 0 || place >= STAGE)
        return;
    for (int d = threadIdx.x; d < HEAD_DIM; d += THREADS)
        tokens[place][d] = own[d];
    __syncthreads();
}

// Turns one query's scores of one chunk into weights, by one warp; and gives the factors of this chunk and of the earlier ones. The query
// sees `seen` tokens of the chunk.
__device__ __forceinline__ void weigh(Shared& s, int q, int seen, int lane)
{
    float weights[CHUNK / 32], most = -INFINITE, sum = 0;
#pragma unroll
    for (int i = 0; i < CHUNK / 32; i++)
    {
        weights[i] = s.scores[q][lane + 32 * i];
        if (lane + 32 * i < seen)
            most = fmaxf(most, weights[i]);
    }

    most = warp_max(most);
    __syncwarp(); // weights replace scores
#pragma unroll
    for (int i = 0; i < CHUNK / 32; i++)
    {
        float weight = lane + 32 * i < seen ? exp_of(weights[i] - most) : 0;
        put<CHUNK>(s.scores[q], lane + 32 * i, weight);
        sum += weight;
    }

    sum = warp_sum(sum);
    if (lane != 0)
        return;
    s.sees[q] = seen > 0;
    s.chunk_top[q] = most;
    s.chunk_sum[q] = sum;
    if (seen > 0)
    {
        float above = fmaxf(s.top[q], most);
        s.keep[q] = exp_of(s.top[q] - above);
        s.take[q] = exp_of(most - above);
        s.sum[q] = fmaf(s.sum[q], s.keep[q], sum * s.take[q]);
        s.top[q] = above;
    }
}

__device__ __forceinline__ const Item& item_of(const StepHeader* step, int i) { return ((const Item*)((const char*)step + step->items_at))[i]; }

// grid (blocks, kv_heads, slices of a group's heads).
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) attend(
    const StepHeader* step, const float* qkv, int stride, const int* positions, stored* keys, stored* values,
    int heads, int kv_heads, int slice, float scale, stored* output, const int* row_slots, float* partials, u32* counters,
    const float* query_norm, const float* key_norm, float epsilon, const float* rope)
{
    LAUNCHED_SHARED(Shared, s);
    wait_for_earlier_kernels();
    int kv_head = blockIdx.y, group = heads / kv_heads, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    int first_head = kv_head * group + blockIdx.z * slice, slice_heads = min(slice, group - (int)blockIdx.z * slice);
    int row_tile = warp / COLUMN_WARPS * 16, part = warp % COLUMN_WARPS; // the part that this warp multiplies
    for (int next_item = blockIdx.x; next_item < step->items; next_item += gridDim.x)
    {
        Item item = item_of(step, next_item);
        int count = item.rows * slice_heads;
        bool multiplies = row_tile < count;
        if (HEAD_PADDED > HEAD_DIM)
        {
            for (int i = thread; i < STAGES * STAGE * STAGE_ROW; i += THREADS)
                s.stages[0][0][i] = 0;
            for (int i = thread; i < TILE * ROW_ROOM(HEAD_PADDED); i += THREADS)
                s.queries[0][i] = 0;
            __syncthreads();
        }

        // The token that this block adds to the cache. The item has this row only: shared chunks are earlier ones.
        int own = rope != nullptr && item.last / CHUNK < item.first_chunk + item.chunks ? item.last : -1;
        const int* table = step->table(item.sequence);
        Ring ring;
        ring.begin(s, item, keys, values, table, kv_heads, kv_head, own);

        // ---- Queries, and that token.
        for (int q = warp; q < count; q += WARPS)
        {
            int row = item.first_row + q / slice_heads, head = first_head + q % slice_heads, position = positions[row];
            const float* x = qkv + (long long)row * stride + head * HEAD_DIM;
            if (rope != nullptr)
            {
                rotate_head(x, query_norm, epsilon, rope + (long long)position * HEAD_DIM, HEAD_DIM, lane,
                    [&](int i, float value) { put<HEAD_PADDED>(s.queries[q], i, value); });
            }
            else
            {
                for (int d = lane; d < HEAD_DIM; d += 32)
                    put<HEAD_PADDED>(s.queries[q], d, x[d]);
            }

            if (lane == 0)
            {
                s.position[q] = position;
                s.place[q] = row * heads + head;
                s.slot[q] = item.split ? row_slots[row] * heads + head : 0;
                s.top[q] = -INFINITE;
                s.sum[q] = 0;
            }
        }

        if (own >= 0)
        {
            const float* key = qkv + (long long)item.first_row * stride + (heads + kv_head) * HEAD_DIM;
            const float* value = key + kv_heads * HEAD_DIM;
            long long slot = (((long long)table[own / BLOCK_TOKENS] * kv_heads + kv_head) * BLOCK_TOKENS + own % BLOCK_TOKENS) * HEAD_DIM;
            bool stores = blockIdx.z == 0;
            if (warp == WARPS - 1)
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

        __syncthreads();
        RowTile kept[KEPT];
#pragma unroll
        for (int k = 0; k < KEPT; k++)
            load_rows<HEAD_PADDED>(kept[k], s.queries[row_tile], 16 * k, lane);

        float total[OUTPUT_TILES][4] = {};
        for (int chunk = item.first_chunk; chunk < item.first_chunk + item.chunks; chunk++)
        {
            int stages = ring.stages_of(chunk), own_place = own >= 0 ? own - chunk * CHUNK : -1;
            for (int stage = 0; stage < stages; stage++)
            {
                auto tokens = s.stages[ring.next(s)];
                put_own(tokens, own_place - stage * STAGE, s.own_key);
                for (int n = 0; n < SCORE_TILES && multiplies; n++)
                {
                    int token = (part * SCORE_TILES + n) * 8;
                    float c[4] = {};
                    ColumnTile key[2];
#pragma unroll
                    for (int k = 0; k < HEAD_TILES; k++)
                    {
                        RowTile query = kept[k % KEPT];
                        if (k >= KEPT)
                            load_rows<HEAD_PADDED>(query, s.queries[row_tile], 16 * k, lane);
                        if (k % 2 == 0 && k + 1 < HEAD_TILES)
                            load_columns<2>(key, &tokens[token][16 * k], STAGE_ROW, lane);
                        else if (k % 2 == 0)
                            load_columns<1>(key, &tokens[token][16 * k], STAGE_ROW, lane);
                        multiply_add(c, query, key[k % 2]);
                    }

                    float* to = &s.scores[row_tile + lane / 4][stage * STAGE + token + lane % 4 * 2];
                    *(float2*)to = {c[0] * scale, c[1] * scale};
                    if (row_tile + 8 < count)
                        *(float2*)(to + 8 * ROW_ROOM(CHUNK)) = {c[2] * scale, c[3] * scale};
                }
            }

            __syncthreads();
            for (int q = warp; q < count; q += WARPS)
                weigh(s, q, max(0, min(CHUNK, s.position[q] - chunk * CHUNK + 1)), lane);

            float weighted[OUTPUT_TILES][4] = {};
            for (int stage = 0; stage < stages; stage++)
            {
                auto tokens = s.stages[ring.next(s)];
                put_own(tokens, own_place - stage * STAGE, s.own_value);
                for (int k = 0; k < STAGE / 16 && multiplies; k++)
                {
                    RowTile weights;
                    load_rows<CHUNK>(weights, s.scores[row_tile], stage * STAGE + 16 * k, lane);
#pragma unroll
                    for (int n = 0; n < OUTPUT_TILES; n += 2)
                    {
                        constexpr bool Even = HEAD_PADDED / 8 % (2 * COLUMN_WARPS) == 0;
                        int column = (part * OUTPUT_TILES + n) * 8;
                        ColumnTile value[2];
                        if (Even || (n + 1 < OUTPUT_TILES && column + 8 < HEAD_PADDED))
                        {
                            load_columns_of_rows<2>(value, &tokens[16 * k][column], STAGE_ROW, lane);
                            multiply_add(weighted[n], weights, value[0]);
                            multiply_add(weighted[(n + 1) % OUTPUT_TILES], weights, value[1]);
                        }
                        else if (column < HEAD_PADDED)
                        {
                            load_columns_of_rows<1>(value, &tokens[16 * k][column], STAGE_ROW, lane);
                            multiply_add(weighted[n], weights, value[0]);
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
                    else if (q < count && s.sees[q])
                        total[n][i] = fmaf(total[n][i], s.keep[q], weighted[n][i] * s.take[q]);
                }
            }
        }

        item = item_of(step, next_item); // read again, so that no register keeps it meanwhile

        // ---- The block's result: the output, or a part of it [row_slots[row] + chunk][heads][PARTIAL]: weighted values, then m and l.
#pragma unroll
        for (int i = 0; i < 4; i += 2)
        {
            int q = row_tile + lane / 4 + i / 2 * 8;
            if (q >= count)
                continue;
            float* partial = partials + ((long long)item.first_chunk * heads + s.slot[q]) * PARTIAL;
            stored* row = output + (long long)s.place[q] * HEAD_DIM;
#pragma unroll
            for (int n = 0; n < OUTPUT_TILES; n++)
            {
                int d = (part * OUTPUT_TILES + n) * 8 + lane % 4 * 2; // heads have an even dimension
                if (d >= HEAD_DIM)
                    continue;
                if (item.split)
                    *(float2*)(partial + d) = {total[n][i], total[n][i + 1]};
                else
                {
                    row[d] = store(total[n][i] / s.sum[q]);
                    row[d + 1] = store(total[n][i + 1] / s.sum[q]);
                }
            }
        }

        if (item.split)
        {
            if (thread < count)
            {
                float* found = partials + ((long long)item.first_chunk * heads + s.slot[thread]) * PARTIAL + HEAD_DIM;
                found[0] = s.chunk_top[thread];
                found[1] = s.chunk_sum[thread];
            }

            __threadfence();
            __syncthreads();
            if (thread < item.rows)
            {
                u32* counter = counters + ((long long)(item.first_row + thread) * kv_heads + kv_head) * gridDim.z + blockIdx.z;
                int chunks = s.position[thread * slice_heads] / CHUNK + 1;
                bool comes_last = atomicAdd(counter, 1u) + 1u == (u32)chunks;
                s.merges[thread] = comes_last ? chunks : 0;
                if (comes_last)
                    *counter = 0; // for the next layer
            }

            if (thread < count)
            {
                s.top[thread] = -INFINITE;
                s.sum[thread] = 0;
            }

            __syncthreads();
            __threadfence();
            merge_rows(s, item.rows, count, slice_heads, heads, partials, output);
        }

        __syncthreads(); // before the next item takes this one's memory
    }
}
ROLLOUT_KERNEL(attend)
