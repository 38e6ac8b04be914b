// The operations of a step between its matmuls. One block a row unless said otherwise; strides count elements.
#include "rope.cuh"

#define THREADS 256

// output[row] = table[tokens[row]]; table [vocab][columns]. Token ~q is what the step before sampled for its query q, answers [queries][3], token first;
// where it found none, any does.
extern "C" __global__ void __launch_bounds__(THREADS) embed(const stored* table, const int* tokens, const int* answers, float* output, int columns)
{
    int token = tokens[blockIdx.x];
    if (token < 0)
        token = max(0, answers[3 * ~token]);
    const stored* from = table + (long long)token * columns;
    float* to = output + (long long)blockIdx.x * columns;
    for (int i = threadIdx.x; i < columns; i += THREADS)
        to[i] = load(from[i]);
}
ROLLOUT_KERNEL(embed)

// output[row] = input[row] / sqrt(mean(input[row]^2) + epsilon) * scale, as a matmul takes it.
extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(const float* input, const float* scale, float epsilon, stored* output, int columns)
{
    __shared__ float parts[THREADS / 32];
    const float* x = input + (long long)blockIdx.x * columns;
    stored* y = output + (long long)blockIdx.x * columns;
    float squares = 0;
    for (int i = threadIdx.x; i < columns; i += THREADS)
        squares = fmaf(x[i], x[i], squares);
    float inverse = 1.0f / sqrtf(block_sum<THREADS>(squares, parts) / columns + epsilon);
    for (int i = threadIdx.x; i < columns; i += THREADS)
        y[i] = store(x[i] * inverse * scale[i]);
}
ROLLOUT_KERNEL(rms_norm)

// Rows [heads | kv_heads | kv_heads] of head_dim: norms over query and key heads where scales are given, rotation by the row's position, queries in
// place, keys and values into the row's slot of the cache [blocks][kv_heads][block_tokens][head_dim]. rope [positions][2][head_dim / 2]: cosines,
// then sines. One warp a head: blockIdx (row, heads + 2 * kv_heads), 32 threads. Where all sequences have one row, attention.cu does this by itself.
extern "C" __global__ void __launch_bounds__(32) rope_store(
    float* qkv, int stride, int heads, int kv_heads, int head_dim, const float* query_norm, const float* key_norm, float epsilon,
    const float* rope, const StepHeader* step, const int* positions, const int* sequences, int block_tokens, stored* keys, stored* values)
{
    int row = blockIdx.x, head = blockIdx.y, lane = threadIdx.x, position = positions[row];
    float* x = qkv + (long long)row * stride + (long long)head * head_dim;
    const float* cosines = rope + (long long)position * head_dim;
    if (head < heads)
    {
        rotate_head(x, query_norm, epsilon, cosines, head_dim, lane, [&](int i, float value) { x[i] = value; });
        return;
    }

    int block = step->table(sequences[row])[position / block_tokens];
    long long slot = (((long long)block * kv_heads + (head - heads) % kv_heads) * block_tokens + position % block_tokens) * head_dim;
    if (head < heads + kv_heads)
    {
        rotate_head(x, key_norm, epsilon, cosines, head_dim, lane, [&](int i, float value) { keys[slot + i] = store(value); });
        return;
    }

    for (int i = lane; i < head_dim; i += 32)
        values[slot + i] = store(x[i]);
}
ROLLOUT_KERNEL(rope_store)

// output[row, i] = silu(gate_up[row, i]) * gate_up[row, width + i].
extern "C" __global__ void __launch_bounds__(THREADS) gated_silu(const float* gate_up, stored* output, int width)
{
    int i = blockIdx.y * THREADS + threadIdx.x;
    if (i >= width)
        return;
    const float* row = gate_up + (long long)blockIdx.x * 2 * width;
    float gate = row[i];
    output[(long long)blockIdx.x * width + i] = store(gate / (1.0f + exp_of(-gate)) * row[width + i]);
}
ROLLOUT_KERNEL(gated_silu)

// output[k] = input[rows[k]].
extern "C" __global__ void __launch_bounds__(THREADS) gather(const float* input, const int* rows, float* output, int columns)
{
    const float* from = input + (long long)rows[blockIdx.x] * columns;
    float* to = output + (long long)blockIdx.x * columns;
    for (int i = threadIdx.x; i < columns; i += THREADS)
        to[i] = from[i];
}
ROLLOUT_KERNEL(gather)

// fp32 to what a matmul takes.
extern "C" __global__ void __launch_bounds__(THREADS) round_values(const float* input, stored* output, long long count)
{
    long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i < count)
        output[i] = store(input[i]);
}
ROLLOUT_KERNEL(round_values)

// And back, for whoever needs fp32.
extern "C" __global__ void __launch_bounds__(THREADS) widen_values(const stored* input, float* output, long long count)
{
    long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i < count)
        output[i] = load(input[i]);
}
ROLLOUT_KERNEL(widen_values)
