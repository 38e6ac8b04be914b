// Copies keys, then values, of chunk after chunk into shared memory, through a ring of STAGES places of STAGE tokens each; all threads
// copy.
#pragma once
#include "attention.cuh"
#include "copy.cuh"

#define ROOM (16 / (int)sizeof(stored))
#define VECTOR (HEAD_DIM % ROOM == 0 ? ROOM : 1)                    // elements of one copy: heads of odd sizes are not aligned to 16 bytes
#define VECTORS (HEAD_DIM / VECTOR)                                 // of a token
#define PASS (VECTOR == 1 ? 1 : THREADS / VECTORS)                  // tokens that all threads copy at once
#define PASSES ((STAGE + PASS - 1) / PASS)
#define CHUNK_BLOCKS (CHUNK / BLOCK_TOKENS)

struct Ring
{
    const stored *keys, *values; // this thread's part of token 0 of block 0
    const int* table;
    u32 block_bytes;
    int thread, token, d;        // the part of a pass that this thread copies
    int last;                    // the furthest token of any row
    int end_token, end_chunk;    // exclusive end of the copying
    int chunk, stage, ahead;
    u32 copied, used;
    bool is_value;

    __device__ __forceinline__ void begin(
        Shared& s, const Item& item, const stored* all_keys, const stored* all_values, const int* item_table, int kv_heads, int kv_head, int own)
    {
        thread = threadIdx.x;
        token = thread / VECTORS;
        d = thread % VECTORS * VECTOR;
        int line = BLOCK_TOKENS % PASS == 0 && VECTOR > 1 ? token : 0; // common to the thread's copies in all passes
        int offset = (kv_head * BLOCK_TOKENS + line) * HEAD_DIM + (VECTOR > 1 ? d : 0);
        keys = all_keys + offset;
        values = all_values + offset;
        table = item_table;
        block_bytes = kv_heads * BLOCK_TOKENS * HEAD_DIM * (int)sizeof(stored);
        last = item.last;
        end_token = own >= 0 ? own : item.last + 1;
        end_chunk = item.first_chunk + item.chunks;
        chunk = item.first_chunk;
        stage = 0;
        copied = used = 0;
        is_value = false;
        if (thread < CHUNK_BLOCKS)
            s.blocks[chunk & 1][thread] = block_of(chunk);
        __syncthreads();
        for (int i = 0; i < STAGES - 1; i++)
            copy_next(s);
    }

    // Stages of a chunk.
    __device__ __forceinline__ int stages_of(int of) const { return (min(CHUNK, last + 1 - of * CHUNK) + STAGE - 1) / STAGE; }

    // Waits for the next stage, and starts copying another.
    __device__ __forceinline__ int next(Shared& s)
    {
        wait_for_groups<STAGES - 2>();
        __syncthreads(); // for all threads' copies; and all are done with the place that is written next
        copy_next(s);
        return used++ % STAGES;
    }

private:
    // The id of this thread's block of a chunk.
    __device__ __forceinline__ int block_of(int of) const
    {
        int block = of * CHUNK_BLOCKS + thread;
        return block <= last / BLOCK_TOKENS ? table[block] : 0;
    }

    __device__ __forceinline__ void copy_next(Shared& s)
    {
        if (chunk < end_chunk)
        {
            // The next chunk's blocks: loaded with the first of this one's keys, stored with the first of its values. A barrier comes
            // before their use.
            if (stage == 0 && chunk + 1 < end_chunk && thread < CHUNK_BLOCKS)
            {
                if (is_value)
                    s.blocks[(chunk + 1) & 1][thread] = ahead;
                else
                    ahead = block_of(chunk + 1);
            }

            copy(s);
            if (++stage == stages_of(chunk))
            {
                stage = 0;
                chunk += is_value;
                is_value = !is_value;
            }
        }

        end_group();
    }

    __device__ __forceinline__ void copy(Shared& s)
    {
        const char* from = (const char*)(is_value ? values : keys);
        const int* blocks = &s.blocks[chunk & 1][stage * (STAGE / BLOCK_TOKENS)];
        int tokens = end_token - chunk * CHUNK - stage * STAGE; // later ones become zeros
        stored(*to)[STAGE_ROW] = s.stages[copied++ % STAGES];
        if (VECTOR == 1)
        {
            for (int i = thread; i < STAGE * HEAD_DIM; i += THREADS)
            {
                int row = i / HEAD_DIM, column = i % HEAD_DIM;
                const stored* block = (const stored*)(from + (u64)(u32)blocks[row / BLOCK_TOKENS] * block_bytes);
                to[row][column] = row < tokens ? block[row % BLOCK_TOKENS * HEAD_DIM + column] : 0;
            }

            return;
        }

        if (THREADS % VECTORS != 0 && token >= PASS)
            return;
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++)
        {
            int row = token + pass * PASS;
            if (STAGE % PASS != 0 && row >= STAGE)
                break;
            int common = BLOCK_TOKENS % PASS == 0 ? pass * PASS : row; // the offset in its block, except for what is in `from` already
            const char* block = from + (u64)(u32)blocks[common / BLOCK_TOKENS] * block_bytes;
            copy_16(&to[row][d], (const stored*)block + common % BLOCK_TOKENS * HEAD_DIM, row < tokens);
        }
    }
};
