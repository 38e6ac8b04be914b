// D = alpha * op(A) * op(B) + beta * C (+ bias), column-major, fp32 sums over ascending k.
#include "sim.h"
#include <cstdint>
#include <cstring>
#include <vector>

namespace
{
enum { Success = 0, InvalidValue = 7, ExecutionFailed = 13, NotSupported = 15 };
enum { Fp32 = 0, Bf16 = 14 };

struct Description { int transpose_a, transpose_b, epilogue; const float* bias; };
enum { EpilogueDefault = 1, EpilogueBias = 4 };
struct Layout { int type; uint64_t rows, columns; int64_t leading; };
struct Algorithm { uint64_t data[8]; };
struct Heuristic { Algorithm algorithm; size_t workspace; int state; float waves; int reserved[4]; };

size_t size_of(int type) { return type == Fp32 ? 4 : 2; }
bool known(const Layout& l) { return (l.type == Fp32 || l.type == Bf16) && l.leading >= (int64_t)l.rows; }
size_t bytes_of(const Layout& l) { return ((l.columns - 1) * (size_t)l.leading + l.rows) * size_of(l.type); }

float load(const void* p, size_t i, int type)
{
    if (type == Fp32)
        return ((const float*)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t*)p)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

void store(void* p, size_t i, int type, float value)
{
    if (type == Fp32)
    {
        ((float*)p)[i] = value;
        return;
    }

    uint32_t bits;
    memcpy(&bits, &value, 4);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    ((uint16_t*)p)[i] = (uint16_t)(nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// op(X) as rows of k fp32 values, one for each row of op(A) or column of op(B).
std::vector<float> rows_over_k(const void* p, const Layout& l, bool k_is_contiguous)
{
    uint64_t outer = k_is_contiguous ? l.columns : l.rows, k = k_is_contiguous ? l.rows : l.columns;
    std::vector<float> rows(outer * k);
    for (uint64_t o = 0; o < outer; o++)
    {
        for (uint64_t i = 0; i < k; i++)
            rows[o * k + i] = load(p, k_is_contiguous ? o * (size_t)l.leading + i : i * (size_t)l.leading + o, l.type);
    }

    return rows;
}
}

extern "C" {
size_t cublasLtGetVersion() { return 130000; }
const char* cublasLtGetStatusString(int status) { return status == NotSupported ? "CUBLAS_STATUS_NOT_SUPPORTED" : status == ExecutionFailed ? "CUBLAS_STATUS_EXECUTION_FAILED" : "CUBLAS_STATUS_INVALID_VALUE"; }

int cublasLtCreate(void** handle)
{
    *handle = new char;
    return Success;
}

int cublasLtDestroy(void* handle)
{
    delete (char*)handle;
    return Success;
}

int cublasLtMatmulDescCreate(void** description, int compute, int scale)
{
    if (compute != 68 || scale != Fp32)
        return NotSupported;
    *description = new Description{0, 0, EpilogueDefault, nullptr};
    return Success;
}

int cublasLtMatmulDescDestroy(void* description)
{
    delete (Description*)description;
    return Success;
}

int cublasLtMatmulDescSetAttribute(void* description, int attribute, const void* value, size_t bytes)
{
    Description& d = *(Description*)description;
    void* to = attribute == 3 ? (void*)&d.transpose_a : attribute == 4 ? (void*)&d.transpose_b : attribute == 7 ? (void*)&d.epilogue
        : attribute == 8 ? (void*)&d.bias : nullptr;
    if (to == nullptr)
        return NotSupported;
    if (bytes != (attribute == 8 ? sizeof(void*) : sizeof(int)))
        return InvalidValue;
    memcpy(to, value, bytes);
    return d.epilogue == EpilogueDefault || d.epilogue == EpilogueBias ? Success : NotSupported;
}

int cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t columns, int64_t leading)
{
    *layout = new Layout{type, rows, columns, leading};
    return known(*(Layout*)*layout) ? Success : InvalidValue;
}

int cublasLtMatrixLayoutSetAttribute(void* layout, int attribute, const void* value, size_t bytes)
{
    if (attribute != 3 || bytes != sizeof(uint64_t))
        return NotSupported;
    memcpy(&((Layout*)layout)->columns, value, bytes);
    return Success;
}

int cublasLtMatrixLayoutDestroy(void* layout)
{
    delete (Layout*)layout;
    return Success;
}

int cublasLtMatmulPreferenceCreate(void** preference)
{
    *preference = new char;
    return Success;
}

int cublasLtMatmulPreferenceDestroy(void* preference)
{
    delete (char*)preference;
    return Success;
}

int cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) { return Success; }

int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int wanted, Heuristic* results, int* found)
{
    *found = wanted < 2 ? wanted : 2; // more than one, so that choosing is exercised
    for (int i = 0; i < *found; i++)
    {
        results[i] = {};
        results[i].algorithm.data[0] = (uint64_t)i;
    }

    return Success;
}

int cublasLtMatmulAlgoCheck(void*, void*, void*, void*, void*, void*, const Algorithm* algorithm, Heuristic* result)
{
    *result = {};
    result->algorithm = *algorithm;
    return Success;
}

int cublasLtMatmulAlgoConfigGetAttribute(const Algorithm*, int attribute, void* value, size_t bytes, size_t* written)
{
    int answer = attribute == 2 ? 1 : 0; // one split of k, no reduction between splits
    if (bytes < sizeof answer)
        return InvalidValue;
    memcpy(value, &answer, sizeof answer);
    *written = sizeof answer;
    return Success;
}

int cublasLtMatmul(void*, void* description, const float* alpha, const void* a, void* a_layout, const void* b, void* b_layout, const float* beta,
    const void* c, void* c_layout, void* d, void* d_layout, const Algorithm*, void*, size_t, void* stream)
{
    Description op = *(Description*)description;
    Layout la = *(Layout*)a_layout, lb = *(Layout*)b_layout, lc = *(Layout*)c_layout, ld = *(Layout*)d_layout;
    uint64_t m = op.transpose_a ? la.columns : la.rows, k = op.transpose_a ? la.rows : la.columns;
    uint64_t n = op.transpose_b ? lb.rows : lb.columns, kb = op.transpose_b ? lb.columns : lb.rows;
    if (k != kb || ld.rows != m || ld.columns != n || lc.rows != m || lc.columns != n)
        return InvalidValue;
    if (!sim::holds(a, bytes_of(la)) || !sim::holds(b, bytes_of(lb)) || !sim::holds(d, bytes_of(ld)) || (*beta != 0 && !sim::holds(c, bytes_of(lc))))
        return ExecutionFailed;
    const float* bias = op.epilogue == EpilogueBias ? op.bias : nullptr;
    if (op.epilogue == EpilogueBias && !sim::holds(bias, m * sizeof(float)))
        return ExecutionFailed;
    float by = *alpha, keep = *beta;
    return sim::submit(stream, [=]
    {
        std::vector<float> rows = rows_over_k(a, la, op.transpose_a != 0), columns = rows_over_k(b, lb, op.transpose_b == 0);
        sim::counters.launches++;
        sim::counters.matmul_weight_bytes += bytes_of(la);
        for (uint64_t j = 0; j < n; j++)
        {
            for (uint64_t i = 0; i < m; i++)
            {
                float sum = 0;
                for (uint64_t x = 0; x < k; x++)
                    sum = __builtin_fmaf(rows[i * k + x], columns[j * k + x], sum);
                float before = keep == 0 ? 0 : keep * load(c, j * (size_t)lc.leading + i, lc.type);
                store(d, j * (size_t)ld.leading + i, ld.type, by * sum + before + (bias ? bias[i] : 0));
            }
        }

        return (int)Success;
    });
}
}
