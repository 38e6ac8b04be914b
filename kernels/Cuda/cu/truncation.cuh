// Truncation, and the draw from the tokens that it keeps: done by the query's last block.
//
// Tokens are ordered by descending x, equals by ascending id, as numbers (see packed); every rule keeps a prefix of this order. The largest
// x of every chunk of CHUNK tokens is known. When n tokens are needed, at least n are at or above the n-th largest of these, and few more:
// chunks below it need not be read. The tokens found are sorted in shared memory. When too many are kept, the last kept one is found by
// bisection over the row.
#pragma once
#include "logits.cuh"

#define LEAST (-3.402823466e38f) // finite: forbidden tokens are never kept

// The drawn token, and the sum of exp(x - top) over the tokens that it was drawn from.
struct Drawn
{
    Best best;
    float sum;
};

// ---- The row.

// Visits all tokens up to the last, in chunks that have such: visit(token, x, v). tops: the largest x of every chunk, or null. Neighbouring
// chunks belong to different warps, since the lowest ids are the most frequent tokens. A warp loads two at a time.
template <class Visit>
__device__ __forceinline__ void visit_up_to(u64 last, const Row& row, const float* tops, Visit visit)
{
    int chunks = (row.vocabulary + CHUNK - 1) / CHUNK, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int first = warp; first < chunks; first += THREADS)
    {
        int mine = first + lane * WARPS;
        u32 left = __ballot_sync(ALL_LANES, mine < chunks && (tops == nullptr || packed(tops[mine], 0) <= last));
        while (left != 0)
        {
            int groups[2];
            float4 loaded[2];
#pragma unroll
            for (int i = 0; i < 2; i++)
            {
                int lowest = __popc((left & (0u - left)) - 1); // 32 where none is left
                groups[i] = lowest < 32 ? (first + lowest * WARPS) * (CHUNK / 4) + lane : row.vocabulary;
                loaded[i] = row.logits_of(groups[i]);
                left &= left - 1;
            }

#pragma unroll
            for (int i = 0; i < 2; i++)
            {
                float four[4] = {loaded[i].x, loaded[i].y, loaded[i].z, loaded[i].w};
                if (row.bias_count > 0)
                    row.add_biases(four, groups[i]);
#pragma unroll
                for (int j = 0; j < 4; j++)
                {
                    int v = groups[i] * 4 + j;
                    float x = row.divided(four[j]);
                    u64 token = packed(x, v);
                    if (v < row.vocabulary && token <= last)
                        visit(token, x, v);
                }
            }
        }
    }
}

struct Mass
{
    double mass, count;
};

// Mass of the tokens up to the last; with weigh = false their number is their mass.
__device__ Mass mass_up_to(u64 last, const Row& row, const float* tops, bool weigh)
{
    double mass = 0, count = 0;
    visit_up_to(last, row, tops, [&](u64, float x, int)
    {
        count += 1.0;
        if (weigh)
            mass += exp_of(x - row.top);
    });
    count = block_total(count);
    return Mass{weigh ? block_total(mass) : count, count};
}

// Tokens after one and up to another, and the mass of the earlier ones.
struct Range
{
    u64 after, last;
    double before;
};

// Finds at most `most` tokens, or one, among which the mass first reaches the target.
__device__ Range narrow(const Row& row, const float* tops, double target, bool weigh, int most)
{
    Range range = {0, packed(-INFINITE, NONE), 0};
    double count_before = 0, count = row.vocabulary;
    float step = 1.0f;
    while (count - count_before > most && range.last - range.after > 1)
    {
        // Down from the top in steps that double, until the target is reached; then between the two.
        u64 middle = step < 1e30f ? packed(row.top - step, NONE) : range.after + (range.last - range.after) / 2;
        step = step < 1e30f ? step * 2.0f : step;
        if (middle <= range.after || middle >= range.last)
            continue;
        Mass found = mass_up_to(middle, row, tops, weigh);
        if (found.count > 0 && found.mass >= target)
        {
            range.last = middle;
            count = found.count;
            step = 1e30f;
        }
        else
        {
            range.after = middle;
            range.before = found.mass;
            count_before = found.count;
        }
    }

    return range;
}

// A value that at least this many tokens reach, unless there are fewer chunks.
__device__ float bound_for(int wanted, const Row& row, const float* tops, float top)
{
    Row of_chunks = plain_row(tops, (row.vocabulary + CHUNK - 1) / CHUNK);
    of_chunks.top = top;
    return value_of(narrow(of_chunks, nullptr, min(wanted, of_chunks.vocabulary), false, wanted / 4 + 1).last);
}

// Puts tokens into the list, in any order. Returns their number, even when they do not fit.
__device__ int collect(u64 after, u64 last, const Row& row, const float* tops)
{
    __syncthreads(); // all are done with an earlier list
    if (threadIdx.x == 0)
        shared.count = 0;
    __syncthreads();
    visit_up_to(last, row, tops, [&](u64 token, float, int)
    {
        if (token <= after)
            return;
        u32 place = atomicAdd(&shared.count, 1u);
        if (place < ROOM)
            shared.list[place] = token;
    });
    __syncthreads();
    return (int)shared.count;
}

// ---- The list.

// Bitonic (Batcher 1968).
__device__ void sort_list(int count)
{
    int size = 1;
    while (size < count)
        size *= 2;
    for (int i = count + (int)threadIdx.x; i < size; i += THREADS)
        shared.list[i] = ~0ull;
    for (int run = 2; run <= size; run *= 2)
    {
        for (int apart = run / 2; apart > 0; apart /= 2)
        {
            __syncthreads();
            for (int i = threadIdx.x; i < size / 2; i += THREADS)
            {
                int one = 2 * i - (i & (apart - 1)), other = one + apart;
                u64 a = shared.list[one], b = shared.list[other];
                if ((a > b) == ((one & run) == 0))
                {
                    shared.list[one] = b;
                    shared.list[other] = a;
                }
            }
        }
    }

    __syncthreads();
}

__device__ double mass_of_first(int count, bool weigh)
{
    if (!weigh)
        return count;
    double mass = 0;
    for (int i = threadIdx.x; i < count; i += THREADS)
        mass += exp_of(value_of(shared.list[i]) - shared.row.top);
    return block_total(mass);
}

// The smallest number of tokens of the sorted list, at least one, whose mass reaches the target; all, when it does not.
__device__ int reaching(int count, double target, bool weigh)
{
    int less = 0;
    while (count - less > 1)
    {
        int middle = (less + count) / 2;
        if (mass_of_first(middle, weigh) >= target)
            count = middle;
        else
            less = middle;
    }

    return count;
}

// How many tokens of the sorted list top-k and top-p keep; 0 when they keep more than the list has. mass: of the whole row.
__device__ int kept_of_list(int count, bool is_all, bool by_k, double mass)
{
    const Query& query = shared.query;
    if (by_k && count < query.top_k && !is_all)
        return 0;
    int kept = by_k ? min(count, query.top_k) : count;
    bool ends = by_k || is_all || (query.min_p > 0.0f && exp_of(value_of(shared.list[count - 1]) - shared.row.top) < query.min_p);
    if (query.top_p < 1.0f)
    {
        double found = mass_of_first(kept, true), target = query.top_p * (by_k ? found : mass);
        ends |= found >= target;
        kept = reaching(kept, target, true);
    }

    return ends ? kept : 0;
}

// ---- The draw.

// The token at which the mass first reaches the target.
__device__ u64 find_last(double target, bool weigh, const float* tops)
{
    Range range = narrow(shared.row, tops, target, weigh, ROOM);
    int count = collect(range.after, range.last, shared.row, tops);
    sort_list(count);
    return shared.list[reaching(count, target - range.before, weigh) - 1];
}

__device__ Drawn draw_from_row(bool by_k, double mass, const float* tops)
{
    const Row& row = shared.row;
    const Query& query = shared.query;
    u64 last = packed(LEAST, NONE);
    if (by_k)
        last = find_last(query.top_k, false, tops);
    if (query.top_p < 1.0f)
        last = find_last(query.top_p * (by_k ? mass_up_to(last, row, tops, true).mass : mass), true, tops);
    Best best = {-INFINITE, NONE};
    float sum = 0;
    visit_up_to(last, row, tops, [&](u64, float x, int v)
    {
        float weight = exp_of(x - row.top);
        if (x == -INFINITE || weight < query.min_p)
            return;
        sum += weight;
        best = better(best, x + noise(query, v), v);
    });
    return Drawn{block_best(best), block_sum<THREADS>(sum, shared.values)};
}

// mass: of the whole row, when only top-p truncates. tops: the largest x of every chunk.
__device__ __noinline__ Drawn draw_truncated(bool by_k, double mass, const float* tops)
{
    const Row& row = shared.row;
    const Query& query = shared.query;
    int chunks = (row.vocabulary + CHUNK - 1) / CHUNK;
    for (int wanted = by_k ? query.top_k : 64;; wanted *= 4)
    {
        float bound = row.vocabulary <= ROOM ? LEAST : fmaxf(bound_for(wanted, row, tops, row.top), LEAST);
        int count = collect(0, packed(bound, NONE), row, tops);
        if (count > ROOM)
            break;
        sort_list(count);
        int kept = kept_of_list(count, bound == LEAST, by_k, mass);
        if (kept > 0)
        {
            Best best = {-INFINITE, NONE};
            float sum = 0;
            for (int i = threadIdx.x; i < kept; i += THREADS)
            {
                float x = value_of(shared.list[i]), weight = exp_of(x - row.top);
                int v = id_of(shared.list[i]);
                if (weight < query.min_p)
                    continue;
                sum += weight;
                best = better(best, x + noise(query, v), v);
            }

            return Drawn{block_best(best), block_sum<THREADS>(sum, shared.values)};
        }

        if (wanted >= chunks)
            break;
    }

    return draw_from_row(by_k, mass, tops);
}

// The most probable tokens. tops: the largest logit of every chunk.
__device__ __noinline__ void list_alternatives(float top, float log_sum, const float* tops, int* ids, float* log_probs)
{
    Row row = plain_row(shared.row.logits, shared.row.vocabulary);
    int wanted = shared.query.alternatives_count, start = shared.query.alternatives_start;
    float bound = row.vocabulary <= ROOM ? -INFINITE : bound_for(wanted, row, tops, top);
    int count = collect(0, packed(bound, NONE), row, tops);
    if (count >= wanted && count <= ROOM)
    {
        sort_list(count);
        for (int i = threadIdx.x; i < wanted; i += THREADS)
        {
            ids[start + i] = id_of(shared.list[i]);
            log_probs[start + i] = value_of(shared.list[i]) - top - log_sum;
        }

        return;
    }

    // One after the other.
    Best previous = {INFINITE, -1};
    for (int i = 0; i < wanted; i++)
    {
        Best next = {-INFINITE, NONE};
        for (int v = threadIdx.x; v < row.vocabulary; v += THREADS)
        {
            float z = row.logits[v];
            if (z < previous.value || (z == previous.value && v > previous.id))
                next = better(next, z, v);
        }

        previous = block_best(next);
        if (threadIdx.x == 0)
        {
            ids[start + i] = previous.id;
            log_probs[start + i] = previous.value - top - log_sum;
        }
    }
}
