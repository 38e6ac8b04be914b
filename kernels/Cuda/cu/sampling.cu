// Answers sample queries as protos/rollout/v1/DEFINITIONS.md defines them: one block a query.
//
// One pass over the row gives the model's log-sum, the log-sum of what is sampled from, and the arg-max of x + Gumbel noise. Truncation first
// finds its borders by bisection over the ordered bit patterns of fp32 and never sorts the vocabulary. Every sum runs in an order fixed by
// the row alone: a thread's tokens ascending, then a fixed tree.
#include "common.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)
#define NONE 0x7fffffff
#define SMALLEST_TEMPERATURE 1.17549435e-38f // greedy below: dividing by less would overflow

struct Query // as SampleQuery of kernels/StepLayout.cs
{
    int output_index, target;
    float temperature;
    int top_k;
    float top_p, min_p;
    u64 seed;
    u32 sample_index;
    int position, bias_start, bias_count, alternatives_start, alternatives_count;
};

struct Result
{
    int token;
    float log_prob, sampling_log_prob;
};

// ---- Over the block; all threads get the answer.

struct Shared
{
    double sums[WARPS];
    float maxima[WARPS], parts[WARPS];
    int ids[WARPS];
};

__device__ __forceinline__ double block_total(double x, Shared& shared)
{
    for (int other = 16; other > 0; other >>= 1)
    {
        int high = __shfl_xor_sync(ALL_LANES, __double2hiint(x), other), low = __shfl_xor_sync(ALL_LANES, __double2loint(x), other);
        x += __hiloint2double(high, low);
    }

    __syncthreads();
    if ((threadIdx.x & 31) == 0)
        shared.sums[threadIdx.x / 32] = x;
    __syncthreads();
    double total = 0;
    for (int warp = 0; warp < WARPS; warp++)
        total += shared.sums[warp];
    return total;
}

// The largest value and the lowest id that has it.
struct Best
{
    float value;
    int id;
};

__device__ __forceinline__ Best better(Best a, float value, int id)
{
    return value > a.value || (value == a.value && id < a.id) ? Best{value, id} : a;
}

__device__ __forceinline__ Best block_best(Best x, Shared& shared)
{
    for (int other = 16; other > 0; other >>= 1)
    {
        float value = __shfl_xor_sync(ALL_LANES, x.value, other);
        int id = __shfl_xor_sync(ALL_LANES, x.id, other);
        x = better(x, value, id);
    }

    __syncthreads();
    if ((threadIdx.x & 31) == 0)
    {
        shared.maxima[threadIdx.x / 32] = x.value;
        shared.ids[threadIdx.x / 32] = x.id;
    }

    __syncthreads();
    x = Best{shared.maxima[0], shared.ids[0]};
    for (int warp = 1; warp < WARPS; warp++)
        x = better(x, shared.maxima[warp], shared.ids[warp]);
    return x;
}

// sum of exp(x - top), met one by one and then merged.
struct LogSum
{
    float top, sum;
};

__device__ __forceinline__ LogSum with(LogSum s, float x)
{
    if (x > s.top)
        return LogSum{x, fmaf(s.sum, exp_of(s.top - x), 1.0f)};
    if (x != -INFINITE)
        s.sum += exp_of(x - s.top);
    return s;
}

__device__ __forceinline__ LogSum merged(LogSum a, float top, float sum)
{
    if (top > a.top)
        return LogSum{top, fmaf(a.sum, exp_of(a.top - top), sum)};
    if (top != -INFINITE)
        a.sum = fmaf(sum, exp_of(top - a.top), a.sum);
    return a;
}

__device__ __forceinline__ LogSum block_log_sum(LogSum s, Shared& shared)
{
    // Lanes merge into lower lanes: of two, the lower one comes first.
    for (int other = 1; other < 32; other <<= 1)
    {
        float top = __shfl_down_sync(ALL_LANES, s.top, other), sum = __shfl_down_sync(ALL_LANES, s.sum, other);
        if ((threadIdx.x & (2 * other - 1)) == 0)
            s = merged(s, top, sum);
    }

    __syncthreads();
    if ((threadIdx.x & 31) == 0)
    {
        shared.maxima[threadIdx.x / 32] = s.top;
        shared.parts[threadIdx.x / 32] = s.sum;
    }

    __syncthreads();
    s = LogSum{shared.maxima[0], shared.parts[0]};
    for (int warp = 1; warp < WARPS; warp++)
        s = merged(s, shared.maxima[warp], shared.parts[warp]);
    return s;
}

// ---- The row as the query sees it.

// Tokens before the border in descending order of x, equals by ascending id; and the one at it.
struct Border
{
    float value;
    int last_id;
};

struct Row
{
    const float* logits;
    int vocabulary;
    const int* bias_ids; // ascending
    const float* bias_values;
    int bias_count;
    float temperature; // 1 where nothing is divided
    Border by_k, by_p;
    float top, min_p;

    __device__ __forceinline__ float biased(int v) const
    {
        float x = logits[v];
        if (bias_count == 0)
            return x;
        int low = 0, high = bias_count;
        while (low < high)
        {
            int middle = (low + high) / 2;
            if (bias_ids[middle] < v)
                low = middle + 1;
            else
                high = middle;
        }

        for (; low < bias_count && bias_ids[low] == v; low++)
            x += bias_values[low];
        return x;
    }

    __device__ __forceinline__ float x(int v) const { return temperature == 1.0f ? biased(v) : biased(v) / temperature; }

    static __device__ __forceinline__ bool within(Border border, float x, int v)
    {
        return x > border.value || (x == border.value && v <= border.last_id);
    }

    __device__ __forceinline__ bool keeps(float x, int v) const
    {
        return within(by_k, x, v) && within(by_p, x, v) && (min_p <= 0.0f || exp_of(x - top) >= min_p);
    }
};

// Bit patterns of fp32 as integers in the numbers' order; its own inverse.
__device__ __forceinline__ int ordered(float value)
{
    int bits = (int)__float_as_uint(value);
    return bits >= 0 ? bits : bits ^ 0x7fffffff;
}

__device__ __forceinline__ float unordered(int key) { return __uint_as_float((u32)(key >= 0 ? key : key ^ 0x7fffffff)); }

// Mass, or with weigh = false the number, of the kept tokens with x >= bound; and of this thread's the nearest to the bound on either side.
__device__ double mass_from(const Row& row, float bound, bool weigh, float& least_from, float& most_below, Shared& shared)
{
    double mass = 0;
    least_from = INFINITE;
    most_below = -INFINITE;
    for (int v = threadIdx.x; v < row.vocabulary; v += THREADS)
    {
        float x = row.x(v);
        if (!row.keeps(x, v))
            continue;
        if (x >= bound)
        {
            mass += weigh ? exp_of(x - row.top) : 1.0f;
            least_from = fminf(least_from, x);
        }
        else
            most_below = fmaxf(most_below, x);
    }

    return block_total(mass, shared);
}

// The token at which the mass (or number) of the tokens down to it first reaches the target; the first, where nothing is asked for. By bisection
// over keys, each time drawn in to the next key that a token has.
__device__ Border find_border(const Row& row, double target, bool weigh, Shared& shared)
{
    // Tokens at or above high have less than the target, those at or above low reach it.
    int low = ordered(-INFINITE), high = ordered(row.top) + 1;
    double above = 0;
    float step = 1.0f;
    while ((long long)high - low > 1)
    {
        // Down from the top in steps that double, until a bound reaches the target; then between the two.
        int middle = step < 1e30f ? ordered(row.top - step) : (int)(((long long)low + high) >> 1);
        step = step < 1e30f ? step * 2.0f : step;
        if (middle >= high || middle <= low)
            continue;
        float least_from, most_below;
        double mass = mass_from(row, unordered(middle), weigh, least_from, most_below, shared);
        if (mass >= target)
        {
            low = ordered(-block_max<THREADS>(-least_from, shared.maxima));
            step = 1e30f;
        }
        else
        {
            int next = ordered(block_max<THREADS>(most_below, shared.maxima)) + 1;
            high = next < middle ? next : middle;
            above = mass;
        }
    }

    float value = unordered(low);
    double each = weigh ? (double)exp_of(value - row.top) : 1.0;
    double equals = 0;
    for (int v = threadIdx.x; v < row.vocabulary; v += THREADS)
    {
        float x = row.x(v);
        equals += x == value && row.keeps(x, v) ? 1.0 : 0.0;
    }

    equals = block_total(equals, shared);
    double wanted = each > 0 ? ceil((target - above) / each) : equals;
    wanted = wanted < 1 ? 1 : wanted;
    if (wanted >= equals)
        return Border{value, NONE};

    // Of equals the lowest ids: the id at which there are as many as wanted.
    int first = -1, last = row.vocabulary - 1;
    while (last - first > 1)
    {
        int middle = first + (last - first) / 2;
        double found = 0;
        for (int v = threadIdx.x; v <= middle; v += THREADS)
        {
            float x = row.x(v);
            found += x == value && row.keeps(x, v) ? 1.0 : 0.0;
        }

        if (block_total(found, shared) >= wanted)
            last = middle;
        else
            first = middle;
    }

    return Border{value, last};
}

// ---- Noise.

// Philox 4x32-10 (Salmon et al., SC'11) of the counter (v / 4, position, sample, 0).
__device__ __forceinline__ void philox(u32 words[4], u32 key0, u32 key1)
{
    for (int round = 0; round < 10; round++)
    {
        u32 high0 = __umulhi(words[0], 0xD2511F53u), low0 = words[0] * 0xD2511F53u;
        u32 high1 = __umulhi(words[2], 0xCD9E8D57u), low1 = words[2] * 0xCD9E8D57u;
        words[0] = high1 ^ words[1] ^ key0;
        words[2] = high0 ^ words[3] ^ key1;
        words[1] = low1;
        words[3] = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// -log(-log(u)), u = (random >> 9) * 2^-23 + 2^-24.
__device__ __forceinline__ float gumbel(u32 random)
{
    float u = fmaf((float)(random >> 9), 1.0f / (1 << 23), 1.0f / (1 << 24));
    return 0.0f - log_of(0.0f - log_of(u));
}

// ---- The kernel. grid: queries.

extern "C" __global__ void __launch_bounds__(THREADS) sample(
    const StepHeader* step, const float* logits, int stride, int vocabulary, const Query* queries, int first_query, int first_output, int end_output,
    Result* results, int* alternative_ids, float* alternative_log_probs)
{
    __shared__ Shared shared;
    int q = first_query + blockIdx.x;
    if (q >= step->queries)
        return; // the launch is rounded up
    Query query = queries[q];
    if (query.output_index >= end_output)
        return; // so that it met one about logits that come later
    Row row;
    row.logits = logits + (long long)(query.output_index - first_output) * stride;
    row.vocabulary = vocabulary;
    row.bias_ids = step->bias_ids + query.bias_start;
    row.bias_values = step->bias_values + query.bias_start;
    row.bias_count = query.bias_count;
    bool greedy = query.temperature < SMALLEST_TEMPERATURE;
    row.temperature = greedy ? 1.0f : query.temperature;
    row.by_k = row.by_p = Border{-INFINITE, NONE};
    row.min_p = 0;
    row.top = 0;
    bool draws = query.target < 0;
    bool truncated = !greedy && ((query.top_k > 0 && query.top_k < vocabulary) || query.top_p < 1.0f || query.min_p > 0.0f);

    // The model's log-sum and, unless something has to be found out first, all else.
    LogSum model = {-INFINITE, 0}, drawn = {-INFINITE, 0};
    Best largest = {-INFINITE, NONE}, best = {-INFINITE, NONE};
    double bad = 0;
    for (int group = threadIdx.x; group * 4 < vocabulary; group += THREADS)
    {
        u32 words[4] = {(u32)group, (u32)query.position, query.sample_index, 0};
        if (draws && !greedy && !truncated)
            philox(words, (u32)query.seed, (u32)(query.seed >> 32));
        for (int j = 0; j < 4 && group * 4 + j < vocabulary; j++)
        {
            int v = group * 4 + j;
            float z = row.logits[v];
            bad += z < INFINITE ? 0.0 : 1.0;
            model = with(model, z);
            if (!draws)
                continue;
            float b = row.biased(v);
            largest = better(largest, b, v);
            if (greedy || truncated)
                continue;
            float x = row.temperature == 1.0f ? b : b / row.temperature;
            drawn = with(drawn, x);
            if (x != -INFINITE)
                best = better(best, x + gumbel(words[j]), v);
        }
    }

    model = block_log_sum(model, shared);
    float log_sum = log_of(model.sum);
    bool nothing = block_total(bad, shared) > 0 || model.top == -INFINITE;
    if (!nothing && query.alternatives_count > 0)
    {
        Best previous = {INFINITE, -1};
        for (int i = 0; i < query.alternatives_count; i++)
        {
            Best next = {-INFINITE, NONE};
            for (int v = threadIdx.x; v < vocabulary; v += THREADS)
            {
                float z = row.logits[v];
                if (z < previous.value || (z == previous.value && v > previous.id))
                    next = better(next, z, v);
            }

            previous = block_best(next, shared);
            if (threadIdx.x == 0)
            {
                alternative_ids[query.alternatives_start + i] = previous.id;
                alternative_log_probs[query.alternatives_start + i] = previous.value - model.top - log_sum;
            }
        }
    }

    int token = query.target;
    float sampling_log_prob = 0;
    if (!nothing && draws)
    {
        largest = block_best(largest, shared);
        float top = largest.value / row.temperature;
        if (greedy || !(top < INFINITE && top > -INFINITE))
        {
            // A temperature so small that the quotient overflows is the limit it stands for.
            token = largest.value == -INFINITE ? -1 : largest.id;
        }
        else
        {
            row.top = top;
            if (truncated)
            {
                if (query.top_k > 0 && query.top_k < vocabulary)
                    row.by_k = find_border(row, query.top_k, false, shared);
                if (query.top_p < 1.0f)
                {
                    float least, most;
                    double total = mass_from(row, -INFINITE, true, least, most, shared);
                    row.by_p = find_border(row, query.top_p * total, true, shared);
                }

                row.min_p = query.min_p;
                for (int group = threadIdx.x; group * 4 < vocabulary; group += THREADS)
                {
                    u32 words[4] = {(u32)group, (u32)query.position, query.sample_index, 0};
                    philox(words, (u32)query.seed, (u32)(query.seed >> 32));
                    for (int j = 0; j < 4 && group * 4 + j < vocabulary; j++)
                    {
                        int v = group * 4 + j;
                        float x = row.x(v);
                        if (x == -INFINITE || !row.keeps(x, v))
                            continue;
                        drawn = with(drawn, x);
                        best = better(best, x + gumbel(words[j]), v);
                    }
                }
            }

            drawn = block_log_sum(drawn, shared);
            best = block_best(best, shared);
            token = best.id == NONE ? -1 : best.id;
            sampling_log_prob = token < 0 ? 0.0f : row.x(token) - drawn.top - log_of(drawn.sum);
        }
    }

    if (threadIdx.x != 0)
        return;
    Result result = {-1, 0, 0};
    if (!nothing && token >= 0)
    {
        result.token = token;
        result.log_prob = row.logits[token] - model.top - log_sum;
        result.sampling_log_prob = draws ? sampling_log_prob : result.log_prob;
    }

    results[q] = result;
}
ROLLOUT_KERNEL(sample)
