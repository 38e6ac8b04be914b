// Device memory is host memory between guard zones. Kernels are compiled with -fsanitize=thread,alignment, and its calls at every load and
// store, and at misaligned ones, are handled here instead of by the sanitizer's library.
#include "sim.h"
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <fcntl.h>
#include <map>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

namespace sim
{
void stop_block();

Counters counters;

namespace
{
constexpr size_t Guard = 4096;
constexpr size_t Alignment = 512;
constexpr int Granule = 1; // log2 of the bytes of one shadow word: bf16 values are distinguished

constexpr size_t ArenaBytes = 1ull << 37; // of addresses; memory is allocated when touched
constexpr size_t ReservedFrom = 1ull << 36; // from here on addresses are reserved and backed separately
constexpr size_t Large = 16ull << 20;       // larger allocations are zeroed rather than filled with NaNs: untouched pages cost nothing

std::map<uintptr_t, size_t> s_allocations; // start, bytes
std::map<uintptr_t, size_t> s_reservations;
char* s_arena;
int s_arena_file;
size_t s_allocated;
std::string s_fault;

struct Range { uintptr_t start, end; };
Range s_shared, s_launched_shared;

bool in_shared(uintptr_t p, size_t bytes)
{
    return (p >= s_shared.start && p + bytes <= s_shared.end) || (p >= s_launched_shared.start && p + bytes <= s_launched_shared.end);
}

std::vector<Range> s_readable; // constants of modules, and the variables behind threadIdx
Range s_recent[8];
int s_next_recent;

const Range* find(uintptr_t p)
{
    for (const Range& r : s_recent)
    {
        if (p - r.start < r.end - r.start)
            return &r;
    }

    auto after = s_allocations.upper_bound(p);
    if (after == s_allocations.begin())
        return nullptr;
    auto it = std::prev(after);
    if (p >= it->first + it->second)
        return nullptr;
    Range& r = s_recent[s_next_recent++ & 7];
    r = {it->first, it->first + it->second};
    return &r;
}

// The threads of this block that touched a granule last.
struct Shadow
{
    uintptr_t granule;
    unsigned block;                                  // 0: free
    int writer, reader;                              // threads, or -1
    unsigned write_epoch, write_warp_epoch, read_epoch, read_warp_epoch;
    bool read_by_lanes, read_by_warps;               // others of the reader's warp, of other warps, since the same barrier
};

std::vector<Shadow> s_shadow(1 << 16);
size_t s_used;
unsigned s_block;

Shadow& shadow_of(uintptr_t granule)
{
    if (s_used * 2 > s_shadow.size())
    {
        std::vector<Shadow> old(s_shadow.size() * 2);
        old.swap(s_shadow);
        for (const Shadow& s : old)
        {
            if (s.block != s_block)
                continue;
            size_t i = s.granule * 0x9E3779B97F4A7C15ull >> 20 & (s_shadow.size() - 1);
            while (s_shadow[i].block == s_block)
                i = (i + 1) & (s_shadow.size() - 1);
            s_shadow[i] = s;
        }
    }

    size_t i = granule * 0x9E3779B97F4A7C15ull >> 20 & (s_shadow.size() - 1);
    while (s_shadow[i].block == s_block && s_shadow[i].granule != granule)
        i = (i + 1) & (s_shadow.size() - 1);
    Shadow& s = s_shadow[i];
    if (s.block != s_block)
    {
        s = Shadow{granule, s_block, -1, -1, 0, 0, 0, 0, false, false};
        s_used++;
    }

    return s;
}

std::string place(const void* pointer)
{
    uintptr_t p = (uintptr_t)pointer;
    if (p >= s_shared.start && p < s_shared.end)
        return "shared byte " + std::to_string(p - s_shared.start);
    if (p >= s_launched_shared.start && p < s_launched_shared.end + 4096)
        return "launched shared byte " + std::to_string(p - s_launched_shared.start) + " of " + std::to_string(s_launched_shared.end - s_launched_shared.start);
    if (const Range* r = find(p))
        return "byte " + std::to_string(p - r->start) + " of an allocation of " + std::to_string(r->end - r->start);
    auto after = s_allocations.upper_bound(p);
    if (after != s_allocations.begin())
    {
        auto it = std::prev(after);
        return std::to_string(p - it->first - it->second) + " bytes past an allocation of " + std::to_string(it->second);
    }

    return "an address that nothing holds";
}

[[noreturn]] void fail(const char* what, const void* pointer, int other)
{
    Where w = where();
    fault(std::string(what) + ": thread " + std::to_string(w.thread) + (other >= 0 ? " and thread " + std::to_string(other) : "") + " of block ("
        + std::to_string(sim_index.block.x) + ", " + std::to_string(sim_index.block.y) + ", " + std::to_string(sim_index.block.z) + ") at " + place(pointer));
    stop_block();
    abort();
}

bool ordered(const Where& now, int thread, unsigned epoch, unsigned warp_epoch)
{
    return epoch < now.block_epoch || (thread / 32 == now.warp && warp_epoch < now.warp_epoch);
}
}

void check_waited(const void* pointer)
{
    if (waits_for_earlier_kernels() && find((uintptr_t)pointer) != nullptr)
        fail("touched global memory before it waited for the kernel before it", pointer, -1);
}

void touch(void* pointer, size_t bytes, bool write)
{
    if (!in_kernel() || on_stack(pointer))
        return;
    uintptr_t p = (uintptr_t)pointer;
    if (p - (uintptr_t)&sim_index < sizeof sim_index && !write)
        return; // threadIdx and the like
    if (!in_shared(p, bytes))
    {
        const Range* r = find(p);
        if (r == nullptr || p + bytes > r->end)
        {
            for (const Range& constant : s_readable)
            {
                if (!write && p >= constant.start && p + bytes <= constant.end)
                    return;
            }

            fail(write ? "write out of bounds" : "read out of bounds", pointer, -1);
        }

        check_waited(pointer);
        counters.read_bytes += write ? 0 : bytes;
    }

    Where now = where();
    for (uintptr_t granule = p >> Granule; granule <= (p + bytes - 1) >> Granule; granule++)
    {
        Shadow& s = shadow_of(granule);
        if (s.writer >= 0 && s.writer != now.thread && !ordered(now, s.writer, s.write_epoch, s.write_warp_epoch))
            fail(write ? "race of two writes" : "race of a read with a write", pointer, s.writer);
        if (write)
        {
            bool others = s.reader >= 0 && s.read_epoch == now.block_epoch
                && (s.read_by_warps || (s.reader / 32 != now.warp) || (s.read_warp_epoch == now.warp_epoch && (s.reader != now.thread || s.read_by_lanes)));
            if (others)
                fail("race of a write with a read", pointer, s.reader);
            s.writer = now.thread;
            s.write_epoch = now.block_epoch;
            s.write_warp_epoch = now.warp_epoch;
            continue;
        }

        if (s.reader < 0 || s.read_epoch != now.block_epoch)
            s.read_by_lanes = s.read_by_warps = false;
        else if (s.reader / 32 != now.warp)
            s.read_by_warps = true;
        else if (s.read_warp_epoch != now.warp_epoch)
            s.read_by_lanes = false;
        else if (s.reader != now.thread)
            s.read_by_lanes = true;
        s.reader = now.thread;
        s.read_epoch = now.block_epoch;
        s.read_warp_epoch = now.warp_epoch;
    }
}

void misaligned(const void* pointer)
{
    if (in_kernel())
        fail("misaligned access", pointer, -1);
}

void fault(const std::string& what)
{
    if (s_fault.empty())
        s_fault = what;
}

const std::string& fault_text() { return s_fault; }

// One file, so that another process can map a piece of it, which an IPC handle names.
static bool open_arena()
{
    if (s_arena != nullptr)
        return true;
    s_arena_file = memfd_create("cuda-sim", MFD_CLOEXEC);
    void* p = s_arena_file >= 0 && ftruncate(s_arena_file, ArenaBytes) == 0
        ? mmap(nullptr, ArenaBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, s_arena_file, 0) : MAP_FAILED;
    if (p == MAP_FAILED)
        return false;
    s_arena = (char*)p;
    return true;
}

// The first gap between allocations that is large enough, with a guard before and after. 0 where there is none.
static uintptr_t gap(const std::map<uintptr_t, size_t>& taken, uintptr_t from, uintptr_t end, size_t bytes)
{
    uintptr_t at = from + Guard;
    for (auto it = taken.lower_bound(from); it != taken.end() && it->first < end; ++it)
    {
        if (at + bytes + Guard <= it->first)
            break;
        at = (it->first + it->second + Guard + Alignment - 1) / Alignment * Alignment;
    }

    return at + bytes + Guard <= end ? at : 0;
}

void* allocate(size_t bytes)
{
    if (!open_arena())
        return nullptr;
    uintptr_t at = gap(s_allocations, (uintptr_t)s_arena, (uintptr_t)s_arena + ReservedFrom, bytes);
    if (at == 0)
        return nullptr;
    if (bytes <= Large)
        memset((void*)at, 0xFF, bytes); // NaN in every type that is used
    s_allocations[at] = bytes;
    s_allocated += bytes;
    counters.allocations++;
    return (void*)at;
}

void* reserve(size_t bytes)
{
    if (!open_arena())
        return nullptr;
    uintptr_t at = gap(s_reservations, (uintptr_t)s_arena + ReservedFrom, (uintptr_t)s_arena + ArenaBytes, bytes);
    if (at != 0)
        s_reservations[at] = bytes;
    return (void*)at;
}

bool unreserve(void* pointer, size_t bytes)
{
    auto it = s_reservations.find((uintptr_t)pointer);
    auto inside = s_allocations.lower_bound((uintptr_t)pointer);
    if (it == s_reservations.end() || it->second != bytes || (inside != s_allocations.end() && inside->first < it->first + bytes))
        return false;
    s_reservations.erase(it);
    return true;
}

bool reserved(const void* pointer, size_t bytes)
{
    uintptr_t p = (uintptr_t)pointer;
    auto after = s_reservations.upper_bound(p);
    if (after == s_reservations.begin() || p + bytes > std::prev(after)->first + std::prev(after)->second)
        return false;
    auto next = s_allocations.lower_bound(p);
    return (next == s_allocations.end() || next->first >= p + bytes) && find(p) == nullptr;
}

void back(void* pointer, size_t bytes)
{
    if (bytes <= Large)
        memset(pointer, 0xFF, bytes);
    s_allocations[(uintptr_t)pointer] = bytes;
}

// Whole pages are returned to the system, and read as zeros until they are written again.
static void punch(uintptr_t start, size_t bytes)
{
    constexpr size_t Page = 4096;
    size_t first = (start - (uintptr_t)s_arena + Page - 1) / Page * Page, last = (start - (uintptr_t)s_arena + bytes) / Page * Page;
    if (last > first)
        fallocate(s_arena_file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)first, (off_t)(last - first));
}

void fill(void* pointer, unsigned char value, size_t bytes)
{
    if (value == 0 && bytes > Large)
    {
        size_t edge = 4096; // whole pages are zeroed without being touched
        memset(pointer, 0, edge);
        memset((char*)pointer + bytes - edge, 0, edge);
        punch((uintptr_t)pointer, bytes);
        return;
    }

    memset(pointer, value, bytes);
}

static void forget(std::map<uintptr_t, size_t>::iterator it)
{
    punch(it->first, it->second);
    s_allocations.erase(it);
    for (Range& r : s_recent)
        r = {};
}

void unback(void* pointer) { forget(s_allocations.find((uintptr_t)pointer)); }

bool release(void* pointer)
{
    auto it = s_allocations.find((uintptr_t)pointer);
    if (it == s_allocations.end() || (char*)pointer >= s_arena + ReservedFrom)
        return false;
    s_allocated -= it->second;
    forget(it);
    return true;
}

bool arena_offset(const void* pointer, int* file, size_t* offset, size_t* bytes)
{
    const Range* r = find((uintptr_t)pointer);
    if (r == nullptr || r->start < (uintptr_t)s_arena || r->start >= (uintptr_t)s_arena + ReservedFrom)
        return false;
    *file = s_arena_file;
    *offset = r->start - (uintptr_t)s_arena;
    *bytes = r->end - r->start;
    return true;
}

void adopt(void* pointer, size_t bytes) { s_allocations[(uintptr_t)pointer] = bytes; }

void disown(void* pointer)
{
    s_allocations.erase((uintptr_t)pointer);
    for (Range& r : s_recent)
        r = {};
}

bool holds(const void* pointer, size_t bytes)
{
    uintptr_t p = (uintptr_t)pointer;
    if (in_shared(p, bytes))
        return true;
    const Range* r = find(p);
    return r != nullptr && p + bytes <= r->end;
}

bool allocation_of(const void* pointer, void** start, size_t* bytes)
{
    const Range* r = find((uintptr_t)pointer);
    if (r == nullptr)
        return false;
    *start = (void*)r->start;
    *bytes = r->end - r->start;
    return true;
}

size_t allocated_bytes() { return s_allocated; }

void begin_block()
{
    s_block++;
    s_used = 0;
}

void set_shared(char* start, char* end) { s_shared = {(uintptr_t)start, (uintptr_t)end}; }

void set_launched_shared(size_t bytes)
{
    s_launched_shared = {(uintptr_t)launched_shared(), (uintptr_t)launched_shared() + bytes};
    memset(launched_shared(), 0xFF, bytes);
}

void allow_reads(const char* start, const char* end) { s_readable.push_back({(uintptr_t)start, (uintptr_t)end}); }
}

#define SIM_ACCESS(bytes) \
    void __tsan_read##bytes(void* p) { sim::touch(p, bytes, false); } \
    void __tsan_write##bytes(void* p) { sim::touch(p, bytes, true); } \
    void __tsan_unaligned_read##bytes(void* p) { sim::touch(p, bytes, false); } \
    void __tsan_unaligned_write##bytes(void* p) { sim::touch(p, bytes, true); }

extern "C" {
SIM_ACCESS(1)
SIM_ACCESS(2)
SIM_ACCESS(4)
SIM_ACCESS(8)
SIM_ACCESS(16)
void __tsan_read_range(void* p, unsigned long bytes) { if (bytes > 0) sim::touch(p, bytes, false); }
void __tsan_write_range(void* p, unsigned long bytes) { if (bytes > 0) sim::touch(p, bytes, true); }
void __ubsan_handle_type_mismatch_v1(void*, unsigned long pointer) { sim::misaligned((const void*)pointer); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
