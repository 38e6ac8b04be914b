// The operations of a step between its matmuls. One block a row unless said otherwise; strides count elements. Tensors are aligned to 16
// bytes, so that rows whose length is a multiple of four are read and written four elements at a time.
#include "rope.cuh"

#define THREADS 256

// output[row] = table[tokens[row]]; table [vocab][columns]. Token ~q is the one that the previous step sampled for its query q, answers
// [queries][3], token first; where it found none, any token is used.
extern "C" __global__ void __launch_bounds__(THREADS) embed(const stored* table, const int* tokens, const int* answers, float* output, int columns)
{
    wait_for_earlier_kernels();
    int token = tokens[blockIdx.x];
    if (token < 0)
        token = max(0, answers[3 * ~token]);
    const stored* from = table + (long long)token * columns;
    float* to = output + (long long)blockIdx.x * columns;
    if (columns % 4 == 0)
    {
        for (int i = 4 * threadIdx.x; i < columns; i += 4 * THREADS)
            *(float4*)(to + i) = load_four(from + i);
    }
    else
    {
        for (int i = threadIdx.x; i < columns; i += THREADS)
            to[i] = load(from[i]);
    }
}
ROLLOUT_KERNEL(embed)

// output[row] = input[row] / sqrt(mean(input[row]^2) + epsilon) * scale, in a matmul's input type.
extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(const float* input, const float* scale, float epsilon, stored* output, int columns)
{
    __shared__ float parts[THREADS / 32];
    const float* x = input + (long long)blockIdx.x * columns;
    stored* y = output + (long long)blockIdx.x * columns;
    float squares = 0;
    wait_for_earlier_kernels();
    if (columns % 4 == 0)
    {
        for (int i = 4 * threadIdx.x; i < columns; i += 4 * THREADS)
        {
            float4 a = *(const float4*)(x + i);
            squares = fmaf(a.w, a.w, fmaf(a.z, a.z, fmaf(a.y, a.y, fmaf(a.x, a.x, squares))));
        }
    }
    else
    {
        for (int i = threadIdx.x; i < columns; i += THREADS)
            squares = fmaf(x[i], x[i], squares);
    }

    float inverse = 1.0f / sqrtf(block_sum<THREADS>(squares, parts) / columns + epsilon);
    if (columns % 4 == 0)
    {
        for (int i = 4 * threadIdx.x; i < columns; i += 4 * THREADS)
        {
            float4 a = *(const float4*)(x + i), by = *(const float4*)(scale + i);
            store_four(y + i, {a.x * inverse * by.x, a.y * inverse * by.y, a.z * inverse * by.z, a.w * inverse * by.w});
        }
    }
    else
    {
        for (int i = threadIdx.x; i < columns; i += THREADS)
            y[i] = store(x[i] * inverse * scale[i]);
    }
}
ROLLOUT_KERNEL(rms_norm)

// residual[row] += input[row] / sqrt(mean(input[row]^2) + epsilon) * scale.
extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_add(
    const float* input, const float* scale, float epsilon, float* residual, int columns)
{
    __shared__ float parts[THREADS / 32];
    const float* x = input + (long long)blockIdx.x * columns;
    float* y = residual + (long long)blockIdx.x * columns;
    float squares = 0;
    wait_for_earlier_kernels();
    for (int i = threadIdx.x; i < columns; i += THREADS)
        squares = fmaf(x[i], x[i], squares);

    float inverse = 1.0f / sqrtf(block_sum<THREADS>(squares, parts) / columns + epsilon);
    for (int i = threadIdx.x; i < columns; i += THREADS)
        y[i] += x[i] * inverse * scale[i];
}
ROLLOUT_KERNEL(rms_norm_add)

// Some columns of a row [stride], in place: values[row] = values[row] / sqrt(mean(values[row]^2) + epsilon) * scale.
extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_columns(
    float* values, int stride, const float* scale, float epsilon, int columns)
{
    __shared__ float parts[THREADS / 32];
    float* x = values + (long long)blockIdx.x * stride;
    float squares = 0;
    wait_for_earlier_kernels();
    for (int i = threadIdx.x; i < columns; i += THREADS)
        squares = fmaf(x[i], x[i], squares);

    float inverse = 1.0f / sqrtf(block_sum<THREADS>(squares, parts) / columns + epsilon);
    for (int i = threadIdx.x; i < columns; i += THREADS)
        x[i] = x[i] * inverse * scale[i];
}
ROLLOUT_KERNEL(rms_norm_columns)

// Rows [heads | kv_heads | kv_heads] of head_dim: norms over query and key heads where scales are given, rotation by the row's position,
// queries in place, keys and values into the row's slot of the cache [blocks][kv_heads][block_tokens][head_dim]. rope
// [positions][2][head_dim / 2]: cosines, then sines. One warp a head: blockIdx (row, heads + 2 * kv_heads), 32 threads. When all sequences
// have one row, attention.cu does this itself.
extern "C" __global__ void __launch_bounds__(32) rope_store(
    float* qkv, int stride, int heads, int kv_heads, int head_dim, const float* query_norm, const float* key_norm, float epsilon,
    const float* rope, const StepHeader* step, const int* positions, const int* sequences, int block_tokens, stored* keys, stored* values)
{
    wait_for_earlier_kernels();
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

__device__ __forceinline__ stored gated(stored gate, stored up)
{
    float x = load(gate);
    return store(x / (1.0f + exp_of(-x)) * load(up));
}

// output[row, i] = silu(gate_up[row, i]) * gate_up[row, width + i]. A thread computes WIDE columns.
extern "C" __global__ void __launch_bounds__(THREADS) gated_silu(const stored* gate_up, stored* output, int width)
{
    wait_for_earlier_kernels();
    int i = (blockIdx.y * THREADS + threadIdx.x) * WIDE;
    const stored* gates = gate_up + (long long)blockIdx.x * 2 * width + i;
    stored* to = output + (long long)blockIdx.x * width + i;
    if (width % WIDE == 0 && i < width)
    {
        Wide gate = *(const Wide*)gates, up = *(const Wide*)(gates + width), product;
#pragma unroll
        for (int k = 0; k < WIDE; k++)
            product.x[k] = gated(gate.x[k], up.x[k]);
        *(Wide*)to = product;
        return;
    }

    for (int k = 0; k < WIDE && i + k < width; k++)
        to[k] = gated(gates[k], gates[width + k]);
}
ROLLOUT_KERNEL(gated_silu)

// output[k] = input[rows[k]].
extern "C" __global__ void __launch_bounds__(THREADS) gather(const float* input, const int* rows, float* output, int columns)
{
    wait_for_earlier_kernels();
    const float* from = input + (long long)rows[blockIdx.x] * columns;
    float* to = output + (long long)blockIdx.x * columns;
    if (columns % 4 == 0)
    {
        for (int i = 4 * threadIdx.x; i < columns; i += 4 * THREADS)
            *(float4*)(to + i) = *(const float4*)(from + i);
    }
    else
    {
        for (int i = threadIdx.x; i < columns; i += THREADS)
            to[i] = from[i];
    }
}
ROLLOUT_KERNEL(gather)

// fp32 to a matmul's input type. A thread converts four.
extern "C" __global__ void __launch_bounds__(THREADS) round_values(const float* input, stored* output, long long count)
{
    wait_for_earlier_kernels();
    long long i = 4 * ((long long)blockIdx.x * THREADS + threadIdx.x);
    if (i + 4 <= count)
        store_four(output + i, *(const float4*)(input + i));
    else
    {
        for (; i < count; i++)
            output[i] = store(input[i]);
    }
}
ROLLOUT_KERNEL(round_values)

// And back to fp32.
extern "C" __global__ void __launch_bounds__(THREADS) widen_values(const stored* input, float* output, long long count)
{
    wait_for_earlier_kernels();
    long long i = 4 * ((long long)blockIdx.x * THREADS + threadIdx.x);
    if (i + 4 <= count)
        *(float4*)(output + i) = load_four(input + i);
    else
    {
        for (; i < count; i++)
            output[i] = load(input[i]);
    }
}
ROLLOUT_KERNEL(widen_values)
