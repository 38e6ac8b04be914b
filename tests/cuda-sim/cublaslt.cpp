// D = alpha * op(A) * op(B) + beta * C (+ bias), column-major, sums in fp32. The library proposes several algorithms, which sum in
// different orders; tests choose which ones, and their behaviour: see candidates().
#include "sim.h"
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>
#include <sstream>
#include <string>
#include <vector>

namespace
{
enum { Success = 0, InvalidValue = 7, ExecutionFailed = 13, InternalError = 14, NotSupported = 15 };
enum { Fp32 = 0, Bf16 = 14 };

struct Description { int transpose_a, transpose_b, epilogue; const void* bias; };
enum { EpilogueDefault = 1, EpilogueBias = 4 };
struct Layout { int type; uint64_t rows, columns; int64_t leading; };

// An algorithm's behaviour is encoded in its bytes, so that one stored on disk behaves the same in another process.
enum Order : uint8_t { Up, Down, Halves };
enum When : uint8_t { Always, WithBias, WithBeta };
enum Fails : uint8_t { Never, AtCheck, AtRun };
struct Algorithm
{
    uint32_t magic;
    Order order;
    When when;
    Fails fails;
    uint8_t reserved;
    uint64_t above;    // above this many columns of B it sums in another order
    uint64_t every;    // and for every column whose index is a multiple of this
    uint64_t time;     // nanoseconds a column of B
    uint64_t from;     // columns of B from which it is proposed
    uint64_t workspace;
    uint64_t least, most; // columns of B that it supports
};
static_assert(sizeof(Algorithm) == 64, "as in cublasLt.h");
constexpr uint32_t Magic = 0x73696d31;
struct Heuristic { Algorithm algorithm; size_t workspace; int state; float waves; int reserved[4]; };

struct Candidates { std::vector<Algorithm> algorithms; uint64_t supported = UINT64_MAX; };

thread_local std::string s_candidates; // set by the tests of this thread

// "up; down time=5 from=64; halves fails=run": the heuristic's proposals, best first. For each its order of summation: "up", "down", or
// "halves" one after the other; then optionally time=, from=, above=, every=, when=bias or beta (the other order then only), fails=check or
// run, least= and most= (columns of B that it supports), workspace=. "supported above=64" makes the heuristic refuse more columns.
Candidates candidates()
{
    const char* variable = getenv("ROLLOUT_SIM_MATMUL");
    std::istringstream text(!s_candidates.empty() ? s_candidates : variable != nullptr ? variable : "up; down");
    Candidates all;
    std::string entry;
    while (std::getline(text, entry, ';'))
    {
        std::istringstream words(entry);
        std::string name, word;
        words >> name;
        Algorithm a = {};
        a.magic = Magic;
        a.order = name == "down" ? Down : name == "halves" ? Halves : Up;
        a.above = a.most = UINT64_MAX;
        a.time = 1000;
        while (words >> word)
        {
            std::string key = word.substr(0, word.find('=')), value = word.substr(word.find('=') + 1);
            uint64_t number = strtoull(value.c_str(), nullptr, 10);
            if (key == "above") a.above = number;
            else if (key == "every") a.every = number;
            else if (key == "time") a.time = number;
            else if (key == "from") a.from = number;
            else if (key == "least") a.least = number;
            else if (key == "most") a.most = number;
            else if (key == "workspace") a.workspace = number;
            else if (key == "when") a.when = value == "bias" ? WithBias : WithBeta;
            else if (key == "fails") a.fails = value == "check" ? AtCheck : AtRun;
        }

        if (name == "supported")
            all.supported = a.above;
        else
            all.algorithms.push_back(a);
    }

    return all;
}

size_t size_of(int type) { return type == Fp32 ? 4 : 2; }
bool known(const Layout& l) { return (l.type == Fp32 || l.type == Bf16) && l.leading >= (int64_t)l.rows; }
size_t bytes_of(const Layout& l) { return ((l.columns - 1) * (size_t)l.leading + l.rows) * size_of(l.type); }

// The heuristic's default.
bool aligned(const void* p) { return (uintptr_t)p % 256 == 0; }

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

// op(A) as rows of k values.
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

constexpr uint64_t Lanes = 8;

// Sums of k products for 8 columns of B, whose values for one k are contiguous: one chain of fused multiply-adds for each, in one order.
__m256 sum(const float* a, const float* b, uint64_t from, uint64_t to, bool down)
{
    __m256 total = _mm256_setzero_ps();
    for (uint64_t x = from; x < to; x++)
    {
        uint64_t at = down ? from + to - 1 - x : x;
        total = _mm256_fmadd_ps(_mm256_set1_ps(a[at]), _mm256_loadu_ps(b + at * Lanes), total);
    }

    return total;
}

__m256 sum(Order order, const float* a, const float* b, uint64_t k)
{
    return order == Halves ? _mm256_add_ps(sum(a, b, 0, k / 2, false), sum(a, b, k / 2, k, false)) : sum(a, b, 0, k, order == Down);
}

int check(const Algorithm& algorithm, const Layout& a, const Layout& d, const Description& op)
{
    if (algorithm.magic != Magic || algorithm.order > Halves || algorithm.fails > AtRun)
        return InvalidValue;
    bool types = d.type == Fp32 || (a.type == Bf16 && op.epilogue != EpilogueBias);
    return types && algorithm.fails != AtCheck && d.columns >= algorithm.least && d.columns <= algorithm.most ? Success : NotSupported;
}
}

extern "C" {
// Sets the heuristic's proposals for the calling thread: see candidates(). "" for the default.
void cuSimMatMul(const char* candidates) { s_candidates = candidates; }

size_t cublasLtGetVersion() { return 130000; }
const char* cublasLtGetStatusString(int status)
{
    return status == NotSupported ? "CUBLAS_STATUS_NOT_SUPPORTED" : status == ExecutionFailed ? "CUBLAS_STATUS_EXECUTION_FAILED"
        : status == InternalError ? "CUBLAS_STATUS_INTERNAL_ERROR" : "CUBLAS_STATUS_INVALID_VALUE";
}

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

int cublasLtMatmulAlgoGetHeuristic(
    void*, void* description, void* a, void* b, void*, void* d, void*, int wanted, Heuristic* results, int* found)
{
    *found = 0;
    Candidates all = candidates();
    uint64_t columns = ((Layout*)b)->columns;
    if (columns > all.supported)
        return NotSupported;
    for (const Algorithm& algorithm : all.algorithms)
    {
        if (*found == wanted || columns < algorithm.from)
            continue;
        Heuristic& result = results[(*found)++];
        result = {};
        result.algorithm = algorithm;
        result.workspace = algorithm.workspace;
        if (algorithm.fails != AtCheck)
            result.state = check(algorithm, *(Layout*)a, *(Layout*)d, *(Description*)description);
    }

    return *found > 0 ? Success : NotSupported;
}

int cublasLtMatmulAlgoCheck(void*, void* description, void* a, void*, void*, void* d, const Algorithm* algorithm, Heuristic* result)
{
    *result = {};
    result->algorithm = *algorithm;
    result->workspace = algorithm->workspace;
    return result->state = check(*algorithm, *(Layout*)a, *(Layout*)d, *(Description*)description);
}

int cublasLtMatmulAlgoConfigGetAttribute(const Algorithm* algorithm, int attribute, void* value, size_t bytes, size_t* written)
{
    constexpr int InnerShape = 7, ClusterShape = 8;
    if (attribute < 0 || attribute > ClusterShape)
        return InvalidValue;
    int answer = attribute == 0 ? algorithm->order : attribute == 2 ? 1 : 0; // one split of k, no reduction between splits
    *written = attribute == InnerShape || attribute == ClusterShape ? sizeof(uint16_t) : sizeof answer;
    if (bytes < *written)
        return InvalidValue;
    memcpy(value, &answer, *written);
    return Success;
}

int cublasLtMatmul(void*, void* description, const float* alpha, const void* a, void* a_layout, const void* b, void* b_layout,
    const float* beta, const void* c, void* c_layout, void* d, void* d_layout, const Algorithm* chosen, void* workspace,
    size_t workspace_bytes, void* stream)
{
    Description op = *(Description*)description;
    Algorithm algorithm = *chosen;
    Layout la = *(Layout*)a_layout, lb = *(Layout*)b_layout, lc = *(Layout*)c_layout, ld = *(Layout*)d_layout;
    uint64_t m = op.transpose_a ? la.columns : la.rows, k = op.transpose_a ? la.rows : la.columns;
    uint64_t n = op.transpose_b ? lb.rows : lb.columns, kb = op.transpose_b ? lb.columns : lb.rows;
    if (k != kb || ld.rows != m || ld.columns != n || lc.rows != m || lc.columns != n || la.type != lb.type || lc.type != ld.type)
        return InvalidValue;
    if (!aligned(a) || !aligned(b) || !aligned(c) || !aligned(d) || workspace_bytes < algorithm.workspace)
        return InvalidValue;
    if (int refused = check(algorithm, la, ld, op))
        return refused;
    if (algorithm.fails == AtRun)
        return InternalError;
    if (!sim::is_usable(stream) || (workspace_bytes > 0 && !sim::is_device_memory(workspace, workspace_bytes)))
        return ExecutionFailed;
    if (!sim::is_device_memory(a, bytes_of(la)) || !sim::is_device_memory(b, bytes_of(lb)) || !sim::is_device_memory(d, bytes_of(ld))
        || (*beta != 0 && !sim::is_device_memory(c, bytes_of(lc))))
        return ExecutionFailed;
    const float* bias = op.epilogue == EpilogueBias ? (const float*)op.bias : nullptr;
    if (op.epilogue == EpilogueBias && !sim::is_device_memory(bias, m * sizeof(float)))
        return ExecutionFailed;
    float by = *alpha, keep = *beta;
    return sim::submit(stream, [=]
    {
        std::vector<float> rows = rows_over_k(a, la, op.transpose_a != 0), together(k * Lanes);
        sim::counters.launches++;
        sim::counters.matmul_weight_bytes += bytes_of(la);
        sim::spend(stream, n * algorithm.time);
        bool may = algorithm.when == Always || (algorithm.when == WithBias ? bias != nullptr : keep != 0);
        bool conditional = algorithm.when != Always && algorithm.every == 0 && algorithm.above == UINT64_MAX;
        Order other = algorithm.order == Up ? Down : Up;
        for (uint64_t first = 0; first < n; first += Lanes)
        {
            for (uint64_t lane = 0; lane < Lanes; lane++)
            {
                uint64_t j = first + lane < n ? first + lane : n - 1;
                for (uint64_t x = 0; x < k; x++)
                    together[x * Lanes + lane] = load(b, op.transpose_b ? x * (size_t)lb.leading + j : j * (size_t)lb.leading + x, lb.type);
            }

            for (uint64_t i = 0; i < m; i++)
            {
                alignas(32) float sums[Lanes], others[Lanes];
                _mm256_store_ps(sums, sum(algorithm.order, &rows[i * k], together.data(), k));
                if (may && (conditional || n > algorithm.above || algorithm.every > 0))
                    _mm256_store_ps(others, sum(other, &rows[i * k], together.data(), k));
                for (uint64_t j = first; j < n && j < first + Lanes; j++)
                {
                    bool nth = algorithm.every > 0 && j % algorithm.every == algorithm.every - 1;
                    bool differs = may && (conditional || n > algorithm.above || nth);
                    float value = differs ? others[j - first] : sums[j - first];
                    float before = keep == 0 ? 0 : keep * load(c, j * (size_t)lc.leading + i, lc.type);
                    store(d, j * (size_t)ld.leading + i, ld.type, by * value + before + (bias ? bias[i] : 0));
                }
            }
        }

        return (int)Success;
    });
}
}
