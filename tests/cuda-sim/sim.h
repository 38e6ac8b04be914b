// The interfaces between the parts of the simulated device.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <future>
#include <string>

namespace sim
{
struct Dim { unsigned x, y, z; };
} // namespace sim

// The indices of the running fiber, behind threadIdx and the like.
extern "C" struct sim_indices { sim::Dim thread, block, block_size, grid_size; } sim_index;

namespace sim
{

// Ends the running launch: its cuLaunchKernel fails, and every later call returns the same error, as on a real device.
void fault(const std::string& what);
const std::string& fault_text();

// ---- memory.cpp
void* allocate(size_t bytes);
bool release(void* pointer);
bool holds(const void* pointer, size_t bytes);   // whether one allocation contains the range
bool allocation_of(const void* pointer, void** start, size_t* bytes);
size_t allocated_bytes();
void* reserve(size_t bytes);                     // addresses without memory
bool unreserve(void* pointer, size_t bytes);     // false where memory is still mapped
bool reserved(const void* pointer, size_t bytes); // and without memory
void back(void* pointer, size_t bytes);          // memory for reserved addresses
void unback(void* pointer);
void fill(void* pointer, unsigned char value, size_t bytes);
// Of the allocation that holds an address, for another process to map; false where its memory is mapped to reserved addresses.
bool arena_offset(const void* pointer, int* file, size_t* offset, size_t* bytes);
void adopt(void* pointer, size_t bytes);         // memory of another process, mapped here
void disown(void* pointer);
void allow_reads(const char* start, const char* end);
void begin_block();                              // resets the record of touched memory
void set_shared(char* start, char* end);         // the range of the module's __shared__ variables
void set_launched_shared(size_t bytes);          // the launch's dynamic shared memory
void touch(void* pointer, size_t bytes, bool write); // checks, as every access of a kernel is
void check_waited(const void* pointer);          // that no earlier kernel may still use this address

// ---- block.cpp
struct Where { int thread, warp; unsigned block_epoch, warp_epoch; };
bool in_kernel();
Where where();                                    // of the fiber that runs now
bool on_stack(const void* pointer);               // of any fiber, or of the host
char* launched_shared();
// early: the kernel may start before the previous one has ended.
void launch(void (*kernel)(void**), void** arguments, Dim grid, Dim block, bool early);
bool waits_for_earlier_kernels();                 // whether the running fiber still has to

// ---- driver.cpp
// Does work now, or when the graph that the stream records is launched.
int submit(void* stream, std::function<int()> work);
// Does work on another thread, after the stream's earlier work; later work of the stream waits for it. False where the stream records.
bool submit_beside(void* stream, std::shared_future<void>* done, std::function<void()> work);
bool is_device_memory(const void* pointer, size_t bytes); // of the current context's device
bool is_usable(void* stream);                             // of the current context, and nothing has faulted
void spend(void* stream, uint64_t nanoseconds);           // adds to the stream's time, which events read

// ---- counters, for tests
struct Counters
{
    uint64_t launches, host_to_device_bytes, device_to_host_bytes, synchronisations, allocations, matmul_weight_bytes, staged_bytes, graphs;
    uint64_t early_launches; // of kernels that may start before those before them have ended
    uint64_t read_bytes; // of device memory, by kernels; staged_bytes among them
    uint64_t mapped; // allocations of other processes that are open now
};
extern Counters counters;
}
