// One block at a time; its threads are fibers of one host thread, switched at barriers and warp collectives only.
#include "sim.h"
#include <sys/mman.h>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

extern "C" {
sim_indices sim_index;

// Saves the callee-saved registers on this stack and its pointer in *from, and continues where `to` was saved.
void sim_switch(void** from, void* to);
}

#if !defined(__x86_64__)
#error "the fibers are written for x86-64"
#endif
asm(R"(
.text
.globl sim_switch
.type sim_switch,@function
sim_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

namespace sim
{
void stop_block();

namespace
{
constexpr size_t StackBytes = 64 * 1024;
constexpr int WarpSize = 32;
constexpr int MostThreads = 1024;

enum class State { Running, AtBarrier, InWarp, Ended };

struct Copy { void* to; const void* from; unsigned present; int group; };

struct Fiber
{
    void* stack_pointer;
    State state;
    Dim thread;
    int barrier; // the line of the barrier that it waits at
    std::vector<Copy> copies; // in flight
    int groups;               // ended
    bool has_waited;          // for earlier kernels
};

struct Warp
{
    unsigned generation;       // of collectives
    unsigned arrived, mask;
    unsigned fragments[2][WarpSize][6]; // of a matrix product, likewise
    unsigned values[2][WarpSize]; // by parity of the generation: the previous values are still being read while the next ones are written
    unsigned ended;            // lanes
};

char* s_stacks;
alignas(16) char s_launched_shared[227 * 1024];
Fiber s_fibers[MostThreads];
Warp s_warps[MostThreads / WarpSize];
int s_count, s_current;
unsigned s_epoch;
bool s_in_kernel;
bool s_early;
void* s_host;
void (*s_kernel)(void**);
void** s_arguments;
bool s_stop;

void resume(int next)
{
    s_current = next;
    sim_index.thread = s_fibers[next].thread;
}

// Switches to the next fiber that can continue, or back to the host when none can.
void yield()
{
    int from = s_current;
    if (!s_stop)
    {
        for (int i = 1; i <= s_count; i++)
        {
            int next = (from + i) % s_count;
            if (s_fibers[next].state != State::Running || next == from)
                continue;
            resume(next);
            sim_switch(&s_fibers[from].stack_pointer, s_fibers[next].stack_pointer);
            return;
        }

        if (s_fibers[from].state == State::Running)
            return;
    }

    sim_switch(&s_fibers[from].stack_pointer, s_host);
}

std::string name(int thread)
{
    return "thread " + std::to_string(thread) + " of block (" + std::to_string(sim_index.block.x) + ", " + std::to_string(sim_index.block.y) + ", "
        + std::to_string(sim_index.block.z) + ")";
}

void entry()
{
    s_kernel(s_arguments);
    Fiber& self = s_fibers[s_current];
    if (waits_for_earlier_kernels())
    {
        // Its kernel would count as ended before earlier ones did.
        fault("ended without having waited for the kernel before it: " + name(s_current));
        stop_block();
    }

    self.state = State::Ended;
    s_warps[s_current / WarpSize].ended |= 1u << (s_current % WarpSize);
    yield();
    abort(); // an ended fiber is never resumed
}

void run_block()
{
    begin_block();
    s_epoch = 0;
    s_stop = false;
    for (int w = 0; w * WarpSize < s_count; w++)
        s_warps[w] = Warp{};
    for (int i = 0; i < s_count; i++)
    {
        Fiber& f = s_fibers[i];
        f.state = State::Running;
        f.copies.clear();
        f.groups = 0;
        f.has_waited = !s_early;
        f.thread = {(unsigned)i % sim_index.block_size.x, (unsigned)i / sim_index.block_size.x % sim_index.block_size.y, (unsigned)i / (sim_index.block_size.x * sim_index.block_size.y)};
        void** top = (void**)(s_stacks + (size_t)(i + 1) * StackBytes);
        *--top = nullptr;               // where entry would return to; also aligns the stack as after a call
        *--top = (void*)&entry;
        for (int r = 0; r < 6; r++)
            *--top = nullptr;
        f.stack_pointer = top;
    }

    while (!s_stop)
    {
        int next = 0;
        while (next < s_count && s_fibers[next].state != State::Running)
            next++;
        if (next < s_count)
        {
            resume(next);
            sim_switch(&s_host, s_fibers[next].stack_pointer);
            continue;
        }

        // No fiber can continue. All at one barrier: it opens. All ended: the block is done. Anything else would hang a device.
        int ended = 0, waiting = 0, first_waiting = -1;
        for (int i = 0; i < s_count; i++)
        {
            ended += s_fibers[i].state == State::Ended;
            if (s_fibers[i].state != State::Ended && first_waiting < 0)
                first_waiting = i;
            waiting += s_fibers[i].state == State::AtBarrier;
        }

        if (ended == s_count)
            return;
        if (waiting != s_count)
        {
            fault("divergent barrier: " + name(first_waiting) + " waits at a " + (s_fibers[first_waiting].state == State::AtBarrier ? "barrier" : "warp collective")
                + " that " + std::to_string(s_count - (waiting > 0 ? waiting : 1)) + " others of its block do not reach");
            return;
        }

        for (int i = 0; i < s_count; i++)
        {
            if (s_fibers[i].barrier != s_fibers[0].barrier)
            {
                fault("divergent barrier: " + name(0) + " and thread " + std::to_string(i) + " wait at different barriers, of lines "
                    + std::to_string(s_fibers[0].barrier) + " and " + std::to_string(s_fibers[i].barrier));
                return;
            }

            s_fibers[i].state = State::Running;
        }

        s_epoch++;
    }
}
}

bool in_kernel() { return s_in_kernel; }

Where where()
{
    int warp = s_current / WarpSize;
    return {s_current, warp, s_epoch, s_warps[warp].generation};
}

char* launched_shared() { return s_launched_shared; }

bool on_stack(const void* pointer)
{
    return pointer >= s_stacks && pointer < s_stacks + (size_t)MostThreads * StackBytes;
}

bool waits_for_earlier_kernels() { return !s_fibers[s_current].has_waited; }

void launch(void (*kernel)(void**), void** arguments, Dim grid, Dim block, bool early)
{
    if (!s_stacks)
    {
        s_stacks = (char*)mmap(nullptr, (size_t)MostThreads * StackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (s_stacks == MAP_FAILED)
            abort();
    }

    s_kernel = kernel;
    s_early = early;
    s_arguments = arguments;
    s_count = (int)(block.x * block.y * block.z);
    sim_index.block_size = {block.x, block.y, block.z};
    sim_index.grid_size = {grid.x, grid.y, grid.z};
    s_in_kernel = true;
    for (unsigned z = 0; z < grid.z; z++)
    {
        for (unsigned y = 0; y < grid.y; y++)
        {
            for (unsigned x = 0; x < grid.x && fault_text().empty(); x++)
            {
                sim_index.block = {x, y, z};
                run_block();
            }
        }
    }

    s_in_kernel = false;
}

// Called from memory.cpp's checks, on a fiber's stack: ends the execution of this block.
void stop_block()
{
    s_stop = true;
    yield();
}
}

using namespace sim;

extern "C" {
void sim_wait_for_earlier_kernels() { s_fibers[s_current].has_waited = true; }

void sim_sync_threads(int line)
{
    Fiber& self = s_fibers[s_current];
    self.barrier = line;
    self.state = State::AtBarrier;
    yield();
}

// Every lane of the mask contributes a value; returns when all have, with the generation whose values are to be read.
static unsigned* meet(unsigned mask, unsigned value)
{
    int lane = s_current % WarpSize;
    Warp& warp = s_warps[s_current / WarpSize];
    unsigned mine = warp.generation;
    unsigned* values = warp.values[mine & 1];
    if (warp.arrived == 0)
        warp.mask = mask;
    int lanes = s_count - s_current / WarpSize * WarpSize;
    unsigned present = lanes >= WarpSize ? 0xffffffffu : (1u << lanes) - 1;
    if (warp.mask != mask || !(mask >> lane & 1) || (mask & present & warp.ended) != 0)
    {
        fault("divergent warp collective: " + name(s_current) + " brings mask " + std::to_string(mask) + ", another brought "
            + std::to_string(warp.mask) + ", ended lanes are " + std::to_string(warp.ended));
        stop_block();
    }

    values[lane] = value;
    warp.arrived |= 1u << lane;
    if (warp.arrived == (mask & present))
    {
        warp.arrived = 0;
        warp.generation++;
        int first = s_current / WarpSize * WarpSize;
        for (int i = first; i < first + WarpSize && i < s_count; i++)
        {
            if (s_fibers[i].state == State::InWarp && (mask >> (i - first) & 1))
                s_fibers[i].state = State::Running;
        }
    }
    else
    {
        s_fibers[s_current].state = State::InWarp;
        yield();
    }

    return values;
}

void sim_sync_warp(unsigned mask) { meet(mask, 0); }

// Lanes hold the elements that the PTX manual gives for "mma.m16n8k16". Sums are chains of fused multiply-adds; a device's are truncated
// differently.
void sim_mma(float* c, const unsigned* a, const unsigned* b)
{
    Warp& warp = s_warps[s_current / WarpSize];
    auto* fragments = warp.fragments[warp.generation & 1];
    int lane = s_current % WarpSize;
    memcpy(fragments[lane], a, 4 * sizeof(unsigned));
    memcpy(fragments[lane] + 4, b, 2 * sizeof(unsigned));
    meet(0xffffffffu, 0);
    auto value = [](unsigned pair, int upper) { unsigned bits = upper ? pair & 0xffff0000u : pair << 16; float x; memcpy(&x, &bits, 4); return x; };
    for (int i = 0; i < 4; i++)
    {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++)
        {
            unsigned left = fragments[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], right = fragments[column * 4 + k % 8 / 2][4 + k / 8];
            c[i] = fmaf(value(left, k % 2), value(right, k % 2), c[i]);
        }
    }
}

// The destination of a copy must not be read before the copy was waited for: until then it holds NaNs.
void sim_copy_async(void* to, const void* from, unsigned present)
{
    if (((uintptr_t)to | (uintptr_t)from) % 16 != 0)
    {
        fault("misaligned copy to shared memory: " + name(s_current));
        stop_block();
    }

    if (present > 0)
        touch((void*)from, present, false);
    touch(to, 16, true);
    memset(to, 0xFF, 16);
    s_fibers[s_current].copies.push_back({to, from, present, s_fibers[s_current].groups});
    counters.staged_bytes += present;
}

void sim_end_copies() { s_fibers[s_current].groups++; }

void sim_wait_copies(int left)
{
    Fiber& self = s_fibers[s_current];
    size_t kept = 0;
    for (const Copy& copy : self.copies)
    {
        if (copy.group >= self.groups - left)
        {
            self.copies[kept++] = copy;
            continue;
        }

        touch(copy.to, 16, true);
        memset(copy.to, 0, 16);
        memcpy(copy.to, copy.from, copy.present);
    }

    self.copies.resize(kept);
}

char* sim_launched_shared() { return s_launched_shared; }

unsigned sim_shuffle(unsigned mask, unsigned value, unsigned lane)
{
    unsigned* values = meet(mask, value);
    return values[lane];
}

unsigned sim_ballot(unsigned mask, int predicate)
{
    unsigned* values = meet(mask, predicate != 0);
    unsigned result = 0;
    for (int lane = 0; lane < WarpSize; lane++)
        result |= (mask >> lane & 1) != 0 && values[lane] ? 1u << lane : 0;
    return result;
}

unsigned sim_atomic_add(unsigned* address, unsigned value)
{
    if (!holds(address, sizeof(unsigned)) && !on_stack(address))
    {
        fault("atomicAdd of " + name(s_current) + " outside every allocation");
        stop_block();
    }

    check_waited(address);

    unsigned before = *address;
    *address += value;
    return before;
}
}
