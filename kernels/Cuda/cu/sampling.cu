// Answers sample queries as protos/rollout/v1/DEFINITIONS.md defines them, with one block for each slice of a query's row.
//
// Each block reads its slice once: for the model's log-sum, the log-sum of the sampled distribution, and the arg-max of x + Gumbel noise.
// Its result waits for the query's last block, which merges all results and, with truncation, draws (truncation.cuh). Slices and the order
// of every sum are fixed by the vocabulary alone: a thread's tokens ascending, then a tree over the block; a thread's slices, then the same
// tree.
#include "truncation.cuh"

#define SMALLEST_TEMPERATURE 1.17549435e-38f // greedy below: dividing by less would overflow

struct Result // as SampleResult of kernels/StepLayout.cs
{
    int token;
    float log_prob, sampling_log_prob;
};

// Of a slice; sums are of exp(value - the slice's largest).
struct Found
{
    double mass;     // as drawn_sum, when only top-p truncates
    float top, sum;  // of the logits; the top is INFINITE when one of them is NaN or +infinity
    float drawn_sum; // of biased logits over temperature
    Best largest;    // biased logit
    Best best;       // of the sampled values, with noise
};
static_assert(sizeof(Found) == 40, "CudaSampleScratch has room for other parts");

// grid (queries, slices). found [queries][slices]; tops [queries][x, logits][chunks]; counters [queries] are 0 before and after.
extern "C" __global__ void __launch_bounds__(THREADS) sample(
    const StepHeader* step, const float* logits, int stride, int vocabulary, const Query* queries, int first_query, int first_output,
    int end_output, Result* results, int* alternative_ids, float* alternative_log_probs,
    u32* counters, Found* found, float* tops)
{
    int q = first_query + (int)blockIdx.x, slice = blockIdx.y, slices = gridDim.y, thread = threadIdx.x;
    int chunks = (vocabulary + CHUNK - 1) / CHUNK, groups = (vocabulary + 3) / 4; // of four tokens
    int first = slice * (SLICE / 4), end = min(first + SLICE / 4, groups);
    found += (long long)blockIdx.x * slices;
    tops += (long long)blockIdx.x * 2 * chunks;

    wait_for_earlier_kernels();
    if (q >= step->queries)
        return; // the launch is rounded up
    if (thread < (int)(sizeof(Query) / sizeof(u32)))
        ((u32*)&shared.query)[thread] = ((const u32*)&queries[q])[thread];
    __syncthreads();
    const Query& query = shared.query;
    if (query.output_index >= end_output)
        return; // a query about logits of a later launch
    Row row = plain_row(logits + (long long)(query.output_index - first_output) * stride, vocabulary);
    row.bias_count = query.bias_count;
    if (row.bias_count > 0)
    {
        row.bias_ids = step->bias_ids + query.bias_start;
        row.bias_values = step->bias_values + query.bias_start;
    }

    bool draws = query.target < 0, greedy = query.temperature < SMALLEST_TEMPERATURE;
    row.temperature = greedy ? 1.0f : query.temperature;
    bool by_k = query.top_k > 0 && query.top_k < vocabulary;
    bool truncated = draws && !greedy && (by_k || query.top_p < 1.0f || query.min_p > 0.0f), noisy = draws && !greedy && !truncated;
    bool weighs = truncated && !by_k && query.top_p < 1.0f;
    bool biased = false;
    if (draws && row.bias_count > 0)
        biased = row.bias_from(first * 4) < row.bias_from(end * 4);

    // ---- The largest of the slice, and of its chunks. All loads are in flight before the first is needed.
    float4 loaded[SLICE / 4 / THREADS];
#pragma unroll
    for (int i = 0; i < SLICE / 4 / THREADS; i++)
        loaded[i] = row.logits_of(first + i * THREADS + thread);
#pragma unroll
    for (int i = 0; i < SLICE / 4 / THREADS; i++)
        shared.slice[i * THREADS + thread] = loaded[i];

    float top = -INFINITE;
    Best largest = {-INFINITE, NONE};
    bool bad = false;
#pragma unroll 1
    for (int chunk = first / (CHUNK / 4) + thread / 32; chunk * (CHUNK / 4) < end; chunk += WARPS)
    {
        int group = chunk * (CHUNK / 4) + thread % 32;
        float4 four = shared.slice[group - first];
        float z[4] = {four.x, four.y, four.z, four.w};
        float most = fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3]));
        top = fmaxf(top, most);
#pragma unroll
        for (int j = 0; j < 4; j++)
            bad |= !(z[j] < INFINITE);
        if (query.alternatives_count > 0)
        {
            most = warp_max(most);
            if (thread % 32 == 0)
                tops[chunks + chunk] = most;
        }

        if (!draws)
            continue;
        if (biased)
            row.add_biases(z, group);
#pragma unroll
        for (int j = 0; j < 4; j++)
            largest = better(largest, z[j], group * 4 + j);
        if (truncated)
        {
            most = row.divided(warp_max(fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3]))));
            if (thread % 32 == 0)
                tops[chunk] = most;
        }
    }

    Found mine = {0, 0, 0, 0, {-INFINITE, NONE}, {-INFINITE, NONE}};
    mine.top = block_max<THREADS>(bad ? INFINITE : top, shared.values);
    if (draws)
        mine.largest = block_best(largest);

    // ---- Sums and noise.
    float drawn_top = row.divided(mine.largest.value), sum = 0, drawn_sum = 0;
    bool as_model = !biased && row.temperature == 1.0f; // the same terms
    double mass = 0;
    Best best = {-INFINITE, NONE};
#pragma unroll 1
    for (int group = first + thread; group < end; group += THREADS)
    {
        float4 z = shared.slice[group - first];
        float x[4] = {z.x, z.y, z.z, z.w}, weights[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
        {
            weights[j] = x[j] == -INFINITE ? 0.0f : exp_of(x[j] - mine.top);
            sum += weights[j];
        }

        if (!noisy && !weighs)
            continue;
        if (!as_model)
        {
            if (biased)
                row.add_biases(x, group);
#pragma unroll
            for (int j = 0; j < 4; j++)
            {
                x[j] = row.divided(x[j]);
                weights[j] = x[j] == -INFINITE ? 0.0f : exp_of(x[j] - drawn_top);
            }
        }

        u32 words[4];
        if (noisy)
            philox(words, query, group);
#pragma unroll
        for (int j = 0; j < 4; j++)
        {
            if (weighs)
                mass += weights[j];
            drawn_sum += weights[j];
            if (noisy && x[j] != -INFINITE)
                best = better(best, x[j] + gumbel(words[j]), group * 4 + j);
        }
    }

    mine.sum = block_sum<THREADS>(sum, shared.values);
    if (noisy)
    {
        mine.drawn_sum = as_model ? mine.sum : block_sum<THREADS>(drawn_sum, shared.values);
        mine.best = block_best(best);
    }

    if (weighs)
        mine.mass = block_total(mass);

    // ---- Only the query's last block continues.
    if (thread == 0)
        found[slice] = mine;
    __threadfence();
    __syncthreads();
    if (thread == 0)
    {
        shared.is_last = atomicAdd(counters + blockIdx.x, 1u) + 1u == (u32)slices;
        if (shared.is_last)
            counters[blockIdx.x] = 0; // for the next launch
    }

    __syncthreads();
    if (!shared.is_last)
        return;
    __threadfence();
    top = -INFINITE;
    largest = best = Best{-INFINITE, NONE};
    for (int s = thread; s < slices; s += THREADS)
    {
        top = fmaxf(top, found[s].top);
        largest = better(largest, found[s].largest.value, found[s].largest.id);
        best = better(best, found[s].best.value, found[s].best.id);
    }

    top = block_max<THREADS>(top, shared.values);
    largest = block_best(largest);
    best = block_best(best);
    row.top = row.divided(largest.value);
    if (thread == 0)
        shared.row = row;
    sum = drawn_sum = 0;
    mass = 0;
    for (int s = thread; s < slices; s += THREADS)
    {
        sum = fmaf(found[s].sum, exp_of(found[s].top - top), sum);
        float scale = exp_of(row.divided(found[s].largest.value) - row.top);
        drawn_sum = fmaf(found[s].drawn_sum, scale, drawn_sum);
        mass = mass + found[s].mass * scale;
    }

    sum = block_sum<THREADS>(sum, shared.values);
    drawn_sum = block_sum<THREADS>(drawn_sum, shared.values);
    mass = block_total(mass);

    bool nothing = !(top < INFINITE && top > -INFINITE);
    float log_sum = log_of(sum);
    if (!nothing && query.alternatives_count > 0)
        list_alternatives(top, log_sum, tops + chunks, alternative_ids, alternative_log_probs);
    int token = query.target;
    float sampling_log_prob = 0;
    if (!nothing && draws)
    {
        if (greedy || !(shared.row.top < INFINITE && shared.row.top > -INFINITE))
        {
            // A temperature so small that the quotient overflows is treated as the limit, greedy.
            token = largest.value == -INFINITE ? -1 : largest.id;
        }
        else
        {
            Drawn drawn = truncated ? draw_truncated(by_k, mass, tops) : Drawn{best, drawn_sum};
            token = drawn.best.id == NONE ? -1 : drawn.best.id;
            sampling_log_prob = token < 0 ? 0.0f : shared.row.x(token) - shared.row.top - log_of(drawn.sum);
        }
    }

    if (thread != 0)
        return;
    Result result = {-1, 0, 0};
    if (!nothing && token >= 0)
    {
        result.token = token;
        result.log_prob = shared.row.logits[token] - top - log_sum;
        result.sampling_log_prob = draws ? sampling_log_prob : result.log_prob;
    }

    results[q] = result;
}
ROLLOUT_KERNEL(sample)
