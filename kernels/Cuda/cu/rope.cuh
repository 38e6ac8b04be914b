// Rotary position embedding (Su et al. 2021, halves paired) of one head, after an optional RMS norm of it. One warp a head.
#pragma once
#include "common.cuh"

// put(i, value) is called with each of the head_dim numbers. cosines [head_dim / 2] of the position, then sines.
template <class Put>
__device__ __forceinline__ void rotate_head(const float* x, const float* norm, float epsilon, const float* cosines, int head_dim, int lane, Put put)
{
    int half = head_dim / 2;
    const float* sines = cosines + half;
    float inverse = 1;
    if (norm != nullptr)
    {
        float squares = 0;
        for (int i = lane; i < head_dim; i += 32)
            squares = fmaf(x[i], x[i], squares);
        inverse = 1.0f / sqrtf(warp_sum(squares) / head_dim + epsilon);
    }

    for (int i = lane; i < half; i += 32)
    {
        float a = x[i], b = x[i + half];
        if (norm != nullptr)
        {
            a = a * inverse * norm[i];
            b = b * inverse * norm[i + half];
        }

        put(i, a * cosines[i] - b * sines[i]);
        put(i + half, b * cosines[i] + a * sines[i]);
    }
}
