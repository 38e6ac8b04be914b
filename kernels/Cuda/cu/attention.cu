// Causal attention over paged keys and values, for prefill and decode alike: a row has the same bits however its step is cut.
//
// A context is walked in chunks of CHUNK tokens from position 0. Of one chunk and one query: scores are chains of fused multiply-adds over
// head_dim, their maximum m and the sum l of exp(score - m) come from one warp in a fixed tree, and the weighted values are chains over
// ascending tokens. Chunks merge in ascending order (Milakov and Gimelshein 2018; Dao et al. 2022):
//   M' = max(M, m), L' = L exp(M - M') + l exp(m - M'), A' = A exp(M - M') + a exp(m - M')
//
// A block has an item: rows that look at the same blocks of the cache, and one chunk or all of them. With one chunk, what it finds waits in
// `partials` for the block that comes last, which merges them: how a long context of few sequences fills the device. With all, it merges as it goes. Rows of
// several sequences in one item have a prefix in common, which is then read once for all of them.
//
// Where every sequence of the step has one row, `rope` is given, and a block also does what rope_store of step.cu does in other steps: it rotates its
// queries, and the one that holds the row's own token rotates its key and stores both. Same arithmetic, same bits, one launch less.
//
// HEAD_DIM is a definition of the compiler. Cache: [blocks][kv_heads][BLOCK_TOKENS][HEAD_DIM].
#include "rope.cuh"

#define BLOCK_TOKENS 16
#define CHUNK 128
#define THREADS 128
#define TILE (HEAD_DIM <= 128 ? 16 : 8)             // queries of an item: rows times heads
#define PAIRS ((TILE * HEAD_DIM + THREADS - 1) / THREADS) // of query and dimension, a thread

struct Item
{
    int first_row, rows;
    int first_chunk, chunks;
    int split; // whether each of these rows has items of other chunks
};

// grid (items, kv_heads, slices of a group's heads).
extern "C" __global__ void __launch_bounds__(THREADS) attend(
    const int* counts, const Item* items, const float* qkv, int stride, const int* positions, const int* sequences, const int* tables, int max_blocks,
    stored* keys, stored* values, int heads, int kv_heads, int slice, float scale, stored* output,
    const int* row_slots, float* partials, u32* counters, const float* query_norm, const float* key_norm, float epsilon, const float* rope)
{
    __shared__ float queries[TILE][HEAD_DIM];
    __shared__ float tile[BLOCK_TOKENS][HEAD_DIM + 1];
    __shared__ float scores[TILE][CHUNK];
    __shared__ float top[TILE], sum[TILE], chunk_top[TILE], chunk_sum[TILE], keep[TILE], take[TILE];
    __shared__ int visible[TILE]; // tokens of the chunk that a query sees
    __shared__ u32 merges[TILE];  // by row of the item
    __shared__ float own_key[HEAD_DIM], own_value[HEAD_DIM];

    if ((int)blockIdx.x >= counts[0])
        return; // the launch is rounded up
    Item item = items[blockIdx.x];
    int kv_head = blockIdx.y, group = heads / kv_heads, thread = threadIdx.x;
    int first_head = kv_head * group + blockIdx.z * slice;
    int slice_heads = min(slice, group - (int)blockIdx.z * slice), count = item.rows * slice_heads;
    const int* table = tables + (long long)sequences[item.first_row] * max_blocks;
    float total[PAIRS];

    int own = -1; // position of the token that this block adds to the cache
    for (int q = thread / 32; q < count; q += THREADS / 32)
    {
        int row = item.first_row + q / slice_heads, lane = thread % 32;
        const float* x = qkv + (long long)row * stride + (first_head + q % slice_heads) * HEAD_DIM;
        if (rope != nullptr)
            rotate_head(x, query_norm, epsilon, rope + (long long)positions[row] * HEAD_DIM, HEAD_DIM, lane, [&](int i, float value) { queries[q][i] = value; });
        else
        {
            for (int d = lane; d < HEAD_DIM; d += 32)
                queries[q][d] = x[d];
        }
    }

    if (rope != nullptr && positions[item.first_row] / CHUNK < item.first_chunk + item.chunks)
    {
        // The item has this row only: what several rows share came before.
        own = positions[item.first_row];
        const float* key = qkv + (long long)item.first_row * stride + (heads + kv_head) * HEAD_DIM;
        const float* value = key + kv_heads * HEAD_DIM;
        long long slot = (((long long)table[own / BLOCK_TOKENS] * kv_heads + kv_head) * BLOCK_TOKENS + own % BLOCK_TOKENS) * HEAD_DIM;
        bool stores = blockIdx.z == 0;
        if (thread < 32)
        {
            rotate_head(key, key_norm, epsilon, rope + (long long)own * HEAD_DIM, HEAD_DIM, thread, [&](int i, float rotated)
            {
                own_key[i] = load(store(rotated));
                if (stores)
                    keys[slot + i] = store(rotated);
            });
        }

        for (int d = thread; d < HEAD_DIM; d += THREADS)
        {
            own_value[d] = load(store(value[d]));
            if (stores)
                values[slot + d] = store(value[d]);
        }
    }

    if (thread < TILE)
    {
        top[thread] = -INFINITE;
        sum[thread] = 0;
    }

    for (int k = 0; k < PAIRS; k++)
        total[k] = 0;
    __syncthreads();

    for (int chunk = item.first_chunk; chunk < item.first_chunk + item.chunks; chunk++)
    {
        int start = chunk * CHUNK, tokens = 0;
        if (thread < count)
            visible[thread] = max(0, min(CHUNK, positions[item.first_row + thread / slice_heads] - start + 1));
        for (int r = 0; r < item.rows; r++) // sequences that share a prefix end where they like
            tokens = max(tokens, min(CHUNK, positions[item.first_row + r] - start + 1));
        __syncthreads();

        for (int block = 0; block * BLOCK_TOKENS < tokens; block++)
        {
            int present = min(BLOCK_TOKENS, tokens - block * BLOCK_TOKENS);
            const stored* from = keys + ((long long)table[start / BLOCK_TOKENS + block] * kv_heads + kv_head) * BLOCK_TOKENS * HEAD_DIM;
            int own_token = own - start - block * BLOCK_TOKENS;
            for (int i = thread; i < present * HEAD_DIM; i += THREADS)
                tile[i / HEAD_DIM][i % HEAD_DIM] = i / HEAD_DIM == own_token ? own_key[i % HEAD_DIM] : load(from[i]);
            __syncthreads();
            for (int i = thread; i < count * BLOCK_TOKENS; i += THREADS)
            {
                int q = i / BLOCK_TOKENS, t = i % BLOCK_TOKENS;
                if (block * BLOCK_TOKENS + t >= visible[q])
                    continue;
                float score = 0;
                for (int d = 0; d < HEAD_DIM; d++)
                    score = fmaf(queries[q][d], tile[t][d], score);
                scores[q][block * BLOCK_TOKENS + t] = score * scale;
            }

            __syncthreads();
        }

        for (int q = thread / 32; q < count; q += THREADS / 32)
        {
            float most = -INFINITE, part = 0;
            for (int t = thread % 32; t < visible[q]; t += 32)
                most = fmaxf(most, scores[q][t]);
            most = warp_max(most);
            for (int t = thread % 32; t < visible[q]; t += 32)
            {
                float e = exp_of(scores[q][t] - most);
                scores[q][t] = e;
                part += e;
            }

            part = warp_sum(part);
            if (thread % 32 == 0)
            {
                chunk_top[q] = most;
                chunk_sum[q] = part;
            }
        }

        __syncthreads();
        float weighted[PAIRS];
        for (int k = 0; k < PAIRS; k++)
            weighted[k] = 0;
        for (int block = 0; block * BLOCK_TOKENS < tokens; block++)
        {
            int present = min(BLOCK_TOKENS, tokens - block * BLOCK_TOKENS);
            const stored* from = values + ((long long)table[start / BLOCK_TOKENS + block] * kv_heads + kv_head) * BLOCK_TOKENS * HEAD_DIM;
            int own_token = own - start - block * BLOCK_TOKENS;
            for (int i = thread; i < present * HEAD_DIM; i += THREADS)
                tile[i / HEAD_DIM][i % HEAD_DIM] = i / HEAD_DIM == own_token ? own_value[i % HEAD_DIM] : load(from[i]);
            __syncthreads();
            for (int k = 0; k < PAIRS; k++)
            {
                int q = (thread + k * THREADS) / HEAD_DIM, d = (thread + k * THREADS) % HEAD_DIM;
                if (q >= count)
                    continue;
                int end = min(BLOCK_TOKENS, visible[q] - block * BLOCK_TOKENS);
                for (int t = 0; t < end; t++)
                    weighted[k] = fmaf(scores[q][block * BLOCK_TOKENS + t], tile[t][d], weighted[k]);
            }

            __syncthreads();
        }

        if (item.split)
        {
            for (int k = 0; k < PAIRS; k++)
                total[k] = weighted[k];
            continue; // the only chunk of this item
        }

        if (thread < count)
        {
            bool sees = visible[thread] > 0;
            float most = sees ? fmaxf(top[thread], chunk_top[thread]) : top[thread];
            keep[thread] = sees ? exp_of(top[thread] - most) : 1.0f;
            take[thread] = sees ? exp_of(chunk_top[thread] - most) : 0.0f;
            sum[thread] = sees ? fmaf(sum[thread], keep[thread], chunk_sum[thread] * take[thread]) : sum[thread];
            top[thread] = most;
        }

        __syncthreads();
        for (int k = 0; k < PAIRS; k++)
        {
            int q = (thread + k * THREADS) / HEAD_DIM;
            if (q < count && visible[q] > 0)
                total[k] = fmaf(total[k], keep[q], weighted[k] * take[q]);
        }

        __syncthreads();
    }

    if (!item.split)
    {
        for (int k = 0; k < PAIRS; k++)
        {
            int q = (thread + k * THREADS) / HEAD_DIM, d = (thread + k * THREADS) % HEAD_DIM;
            if (q < count)
                output[((long long)(item.first_row + q / slice_heads) * heads + first_head + q % slice_heads) * HEAD_DIM + d] = store(total[k] / sum[q]);
        }

        return;
    }

    // partials [row_slots[row] + chunk][heads][HEAD_DIM + 2]: the weighted values, then m and l.
    for (int k = 0; k < PAIRS; k++)
    {
        int q = (thread + k * THREADS) / HEAD_DIM, d = (thread + k * THREADS) % HEAD_DIM;
        if (q >= count)
            continue;
        long long slot = row_slots[item.first_row + q / slice_heads] + item.first_chunk;
        float* part = partials + (slot * heads + first_head + q % slice_heads) * (HEAD_DIM + 2);
        part[d] = total[k];
        if (d == 0)
        {
            part[HEAD_DIM] = chunk_top[q];
            part[HEAD_DIM + 1] = chunk_sum[q];
        }
    }

    __threadfence();
    __syncthreads();
    if (thread < item.rows)
    {
        u32* counter = counters + ((long long)(item.first_row + thread) * kv_heads + kv_head) * gridDim.z + blockIdx.z;
        u32 chunks = positions[item.first_row + thread] / CHUNK + 1;
        merges[thread] = atomicAdd(counter, 1u) + 1u == chunks;
        if (merges[thread])
            *counter = 0; // for the next layer
    }

    __syncthreads();
    __threadfence();
    for (int k = 0; k < PAIRS; k++)
    {
        int q = (thread + k * THREADS) / HEAD_DIM, d = (thread + k * THREADS) % HEAD_DIM;
        if (q >= count || !merges[q / slice_heads])
            continue;
        int row = item.first_row + q / slice_heads, chunks = positions[row] / CHUNK + 1, head = first_head + q % slice_heads;
        float merged = 0, merged_sum = 0, merged_top = -INFINITE;
        for (int chunk = 0; chunk < chunks; chunk++)
        {
            // Past the first-level cache: other blocks wrote these.
            const volatile float* part = partials + ((long long)(row_slots[row] + chunk) * heads + head) * (HEAD_DIM + 2);
            float most = fmaxf(merged_top, part[HEAD_DIM]);
            float keeps = exp_of(merged_top - most), takes = exp_of(part[HEAD_DIM] - most);
            merged_sum = fmaf(merged_sum, keeps, part[HEAD_DIM + 1] * takes);
            merged = fmaf(merged, keeps, part[d] * takes);
            merged_top = most;
        }

        output[((long long)row * heads + head) * HEAD_DIM + d] = store(merged / merged_sum);
    }
}
ROLLOUT_KERNEL(attend)
