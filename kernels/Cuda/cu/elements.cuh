// Elements of a checkpoint as numbers. TYPE: 0 bfloat16, 1 fp16, 2 fp32.
#pragma once
#include "common.cuh"

#define TYPE_BF16 0
#define TYPE_F16 1
#define TYPE_F32 2

__device__ __forceinline__ float half_to_float(u32 half)
{
    u32 sign = (half & 0x8000u) << 16, exponent = half >> 10 & 0x1fu, fraction = half & 0x3ffu;
    if (exponent == 31)
        return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent != 0)
        return __uint_as_float(sign | (exponent + 112u) << 23 | fraction << 13);
    float magnitude = (float)fraction * (1.0f / (1 << 24)); // exact: at most 10 bits
    return __uint_as_float(sign | __float_as_uint(magnitude));
}
