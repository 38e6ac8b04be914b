// The driver API. A stream's work is done in order, and as late as possible: only when it is waited for. Code that reads a result, changes
// the source of a copy, or frees memory without having waited for the stream is thus detected. A capturing stream records its work instead.
// Work that waits for other processes (NCCL) runs on another thread, and the next use of its stream waits for it.
#include "sim.h"
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <utility>
#include <unistd.h>
#include <vector>

extern "C" {
struct CUuuid { unsigned char bytes[16]; };
struct CUipcMemHandle { char reserved[64]; };
struct CUipcEventHandle { char reserved[64]; };
struct CUmemLocation { int type, id; };
struct CUmemAllocationProp { int type, handle_types; CUmemLocation location; void* meta; unsigned char flags[8]; };
struct CUmemAccessDesc { CUmemLocation location; int flags; };
struct CUlaunchAttribute { int id; alignas(8) union { int allowed; char bytes[64]; } value; };
struct CUlaunchConfig
{
    sim::Dim grid, block;
    unsigned shared_bytes;
    void* stream;
    CUlaunchAttribute* attributes;
    unsigned attribute_count;
};
static_assert(sizeof(CUlaunchAttribute) == 72 && sizeof(CUlaunchConfig) == 56, "as in cuda.h");
}

using namespace sim;

namespace
{
enum
{
    Success = 0, InvalidValue = 1, OutOfMemory = 2, NotInitialized = 3, InvalidDevice = 101, InvalidImage = 200, InvalidContext = 201,
    NotFound = 500, NotReady = 600, LaunchFailed = 719, InvalidHandle = 400, CaptureUnsupported = 900, CaptureInvalidated = 901,
};

constexpr int GreatestPriority = -5;
constexpr int StartsEarly = 6; // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
constexpr int Major = 9, Minor = 0, Multiprocessors = 8, L2Bytes = 64 * 1024;
constexpr int MostDevices = 8;
constexpr unsigned MostThreads = 1024, MostSharedBytes = 227 * 1024, MostGrid = 65535;
constexpr size_t DefaultBytes = 4ull << 30;

std::recursive_mutex s_gate; // one thing at a time

struct Context { int references; }; // a device's primary context, the only kind
Context s_contexts[MostDevices];
thread_local std::vector<Context*> s_current; // a stack: the last is current

// A stream's pending work.
struct Queue
{
    std::deque<std::function<int()>> work;
    uint64_t submitted = 0, done = 0;
};
std::set<Queue*> s_queues;

struct Stream
{
    Context* context;
    std::shared_ptr<Queue> queue;
    std::vector<std::function<int()>>* recording = nullptr;
    bool invalidated = false; // a call failed while it recorded
    std::shared_future<void> beside; // valid while work runs on another thread
    uint64_t nanoseconds = 0;        // time of its matmuls, as their algorithms say
    int priority = 0;                // reported, and without an effect
};
// What other processes see of an allocation or an event that they may open, in a file that they map.
struct Exported
{
    std::atomic<uint64_t> generation;     // 0: freed; a handle names one
    std::atomic<uint64_t> recorded, done; // times that the event was recorded, and reached
};
struct Event
{
    unsigned flags;
    Exported* exported; // of an event between processes
    Exported* imported; // the other process's entries, where it is that one's
    std::shared_future<void> beside;
    std::shared_ptr<Queue> queue; // of the stream that it was recorded on, up to this point
    uint64_t until;
    std::shared_ptr<uint64_t> nanoseconds;
};
constexpr unsigned DisableTiming = 2, Interprocess = 4;
using Work = std::vector<std::function<int()>>;
struct Graph { Work work; };
struct Executable { std::shared_ptr<Work> work; }; // a launch in flight outlives it
struct Module { Context* context; void* library; };
struct Function
{
    Context* context;
    void (*call)(void**);
    void (*shared_range)(char**, char**);
    std::vector<unsigned> sizes;
    unsigned dynamic_bytes;
};
struct Mapped { std::string handle; size_t bytes; int opened; };
std::map<void*, Mapped> s_mapped; // memory of other processes
std::map<void*, Context*> s_owners; // of allocations and of mapped memory
std::map<void*, uint64_t> s_ids;    // of allocations, where they were asked for
uint64_t s_last_id;

// Memory that is mapped to reserved addresses. Its contents are stored there: it is mapped at one place only.
struct Physical { size_t bytes; void* at; bool accessible, released; };
std::map<void*, Physical*> s_maps;
size_t s_physical_bytes;
constexpr size_t Granularity = 512; // small, so that an access past a tensor's end is soon past its memory's

// Of an allocation or an event: the process, its files, and the entry in them.
struct Handle { int pid, exports, file, entry; uint64_t generation; size_t offset, bytes; char magic[8]; };
static_assert(sizeof(Handle) <= sizeof(CUipcMemHandle), "fits");

constexpr int MostExports = 4096;
constexpr size_t ExportsBytes = MostExports * sizeof(Exported);
constexpr char MemoryMagic[8] = "rollout", EventMagic[8] = "event";
Exported* s_exports;
int s_exports_file;
uint64_t s_generation;
std::map<void*, int> s_exported; // allocations that have been exported: their entries

// A free entry, or -1.
int add_export()
{
    if (s_exports == nullptr)
    {
        s_exports_file = memfd_create("cuda-sim-exports", MFD_CLOEXEC);
        void* p = s_exports_file >= 0 && ftruncate(s_exports_file, ExportsBytes) == 0
            ? mmap(nullptr, ExportsBytes, PROT_READ | PROT_WRITE, MAP_SHARED, s_exports_file, 0) : MAP_FAILED;
        if (p == MAP_FAILED)
            return -1;
        s_exports = (Exported*)p;
    }

    for (int i = 0; i < MostExports; i++)
    {
        if (s_exports[i].generation != 0)
            continue;
        s_exports[i].recorded = s_exports[i].done = 0;
        s_exports[i].generation = ++s_generation;
        return i;
    }

    return -1;
}

int open_of(int pid, int file)
{
    return open(("/proc/" + std::to_string(pid) + "/fd/" + std::to_string(file)).c_str(), O_RDWR | O_CLOEXEC);
}

// The entries of another process, mapped; null where the handle's is gone, or is of another kind.
Exported* open_exports(const Handle& h, const char* magic)
{
    if (memcmp(h.magic, magic, 8) != 0 || h.entry < 0 || h.entry >= MostExports)
        return nullptr;
    int file = open_of(h.pid, h.exports);
    void* p = file >= 0 ? mmap(nullptr, ExportsBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) : MAP_FAILED;
    if (file >= 0)
        close(file);
    if (p == MAP_FAILED)
        return nullptr;
    if (((Exported*)p)[h.entry].generation == h.generation)
        return (Exported*)p;
    munmap(p, ExportsBytes);
    return nullptr;
}

uint64_t s_bytes; // set by cuSimBytes

size_t device_bytes()
{
    if (s_bytes > 0)
        return s_bytes;
    const char* bytes = getenv("ROLLOUT_SIM_BYTES");
    return bytes ? strtoull(bytes, nullptr, 10) : DefaultBytes;
}

// Submitted work is skipped, so that the host's work alone is measured. For this process from its start (ROLLOUT_SIM_IDLE=1), or as set by
// cuSimIdle.
bool s_idle = getenv("ROLLOUT_SIM_IDLE") != nullptr;

int device_count()
{
    const char* count = getenv("ROLLOUT_SIM_DEVICES");
    int devices = count ? atoi(count) : 1;
    return devices < MostDevices ? devices : MostDevices;
}

Context* current() { return s_current.empty() ? nullptr : s_current.back(); }

int ready() { return current() == nullptr || current()->references == 0 ? InvalidContext : fault_text().empty() ? Success : LaunchFailed; }

// A stream of another device's context; the default stream belongs to all contexts.
bool is_foreign(void* stream) { return stream != nullptr && ((Stream*)stream)->context != current(); }

// Whether memory belongs to the current context's device: a real device refuses another's memory without peer access.
int check(const void* p, size_t bytes)
{
    if (bytes == 0)
        return Success;
    void* start;
    size_t all;
    if (!holds(p, bytes) || !allocation_of(p, &start, &all))
        return InvalidValue;
    auto owner = s_owners.find(start);
    return owner == s_owners.end() || owner->second == current() ? Success : InvalidContext;
}

int readable(struct dl_phdr_info* info, size_t, void* base)
{
    if ((void*)info->dlpi_addr != base)
        return 0;
    for (int i = 0; i < info->dlpi_phnum; i++)
    {
        const auto& part = info->dlpi_phdr[i];
        if (part.p_type == PT_LOAD)
            allow_reads((const char*)info->dlpi_addr + part.p_vaddr, (const char*)info->dlpi_addr + part.p_vaddr + part.p_memsz);
    }

    return 1;
}

// Without the gate, so that other threads can continue.
void wait_beside(void* stream)
{
    std::unique_lock<std::recursive_mutex> hold(s_gate);
    std::shared_future<void> beside = stream != nullptr ? ((Stream*)stream)->beside : std::shared_future<void>();
    hold.unlock();
    if (beside.valid())
        beside.wait();
}
}

namespace
{
std::map<void*, size_t> s_pinned;
std::map<void*, size_t> s_given_back; // pinned memory that is being freed

// Does a stream's pending work, up to an index.
void drain(Queue& queue, uint64_t until = UINT64_MAX)
{
    while (queue.done < until && !queue.work.empty())
    {
        std::function<int()> work = std::move(queue.work.front());
        queue.work.pop_front();
        queue.done++;
        if (!fault_text().empty())
            continue;
        if (int error = work())
            fault("work of a stream failed when it was done: error " + std::to_string(error));
    }
}

void drain_all()
{
    for (Queue* queue : std::set<Queue*>(s_queues))
        drain(*queue);
}

// Destroyed before everything above.
struct Ending
{
    bool has_begun = false;
    ~Ending()
    {
        std::lock_guard<std::recursive_mutex> hold(s_gate);
        has_begun = true;
    }
} s_ending;

// Another process may wait for this work, which nobody here does: it is done a while later.
void do_later(std::shared_ptr<Queue> queue, uint64_t until)
{
    std::thread([queue, until]
    {
        usleep(20'000);
        std::lock_guard<std::recursive_mutex> hold(s_gate);
        if (!s_ending.has_begun)
            drain(*queue, until);
    }).detach();
}

// Memory of a copy, which may have been freed by the time it is done.
bool there(const char* call, const void* device, const void* host, size_t bytes)
{
    bool gone = device != nullptr && bytes > 0 && !holds(device, bytes);
    for (const auto& [start, length] : s_given_back)
        gone |= host >= start && host < (const char*)start + length;
    if (gone)
        fault(std::string(call) + ": its memory was freed before it was done");
    return !gone;
}
}

#define SIM_ENTER std::lock_guard<std::recursive_mutex> hold(s_gate); if (int not_ready = ready()) return not_ready
#define SIM_ENTER_STREAM(stream) wait_beside(stream); SIM_ENTER; if (is_foreign(stream)) return InvalidContext
#define SIM_CHECK(pointer, bytes) if (int refused = check(pointer, bytes)) return refused

namespace sim
{
int submit(void* stream, std::function<int()> work)
{
    Stream* s = (Stream*)stream;
    if (s != nullptr && s->recording != nullptr)
    {
        s->recording->push_back(std::move(work));
        return Success;
    }

    if (s_idle)
        return Success;
    if (s == nullptr)
        return work();
    s->queue->work.push_back(std::move(work));
    s->queue->submitted++;
    return Success;
}

bool submit_beside(void* stream, std::shared_future<void>* done, std::function<void()> work)
{
    std::lock_guard<std::recursive_mutex> hold(s_gate);
    Stream* s = (Stream*)stream;
    if (s == nullptr || s->recording != nullptr)
        return false;
    drain(*s->queue);
    std::shared_future<void> before = s->beside;
    *done = s->beside = std::async(std::launch::async, [before, work]
    {
        if (before.valid())
            before.wait();
        work();
    }).share();
    return true;
}

bool is_device_memory(const void* pointer, size_t bytes)
{
    std::lock_guard<std::recursive_mutex> hold(s_gate);
    return check(pointer, bytes) == Success;
}

bool is_usable(void* stream)
{
    std::lock_guard<std::recursive_mutex> hold(s_gate);
    return ready() == Success && !is_foreign(stream);
}

void spend(void* stream, uint64_t nanoseconds)
{
    if (stream != nullptr)
        ((Stream*)stream)->nanoseconds += nanoseconds;
}
}

extern "C" {
int cuInit(unsigned) { return Success; }

int cuDriverGetVersion(int* version)
{
    *version = 13000;
    return Success;
}

int cuGetErrorName(int error, const char** name)
{
    switch (error)
    {
        case Success: *name = "CUDA_SUCCESS"; break;
        case InvalidValue: *name = "CUDA_ERROR_INVALID_VALUE"; break;
        case OutOfMemory: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case InvalidDevice: *name = "CUDA_ERROR_INVALID_DEVICE"; break;
        case InvalidImage: *name = "CUDA_ERROR_INVALID_IMAGE"; break;
        case InvalidContext: *name = "CUDA_ERROR_INVALID_CONTEXT"; break;
        case InvalidHandle: *name = "CUDA_ERROR_INVALID_HANDLE"; break;
        case NotReady: *name = "CUDA_ERROR_NOT_READY"; break;
        case NotFound: *name = "CUDA_ERROR_NOT_FOUND"; break;
        case LaunchFailed: *name = "CUDA_ERROR_LAUNCH_FAILED"; break;
        case CaptureInvalidated: *name = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"; break;
        case CaptureUnsupported: *name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; break;
        default: *name = nullptr; return InvalidValue;
    }

    return Success;
}

int cuGetErrorString(int error, const char** text)
{
    static std::string launch;
    launch = fault_text();
    *text = error == LaunchFailed ? launch.c_str() : error == OutOfMemory ? "out of memory" : error == InvalidContext ? "invalid device context"
        : "the simulated device refused it";
    return Success;
}

int cuDeviceGetCount(int* count)
{
    *count = device_count();
    return Success;
}

int cuDeviceGet(int* device, int ordinal)
{
    *device = ordinal;
    return ordinal >= 0 && ordinal < device_count() ? Success : InvalidDevice;
}

int cuDeviceGetName(char* name, int bytes, int)
{
    strncpy(name, "simulated device", (size_t)bytes);
    return Success;
}

int cuDeviceGetUuid_v2(CUuuid* uuid, int device)
{
    memcpy(uuid->bytes, "rollout-cuda-sim", 16);
    uuid->bytes[15] = (unsigned char)(uuid->bytes[15] + device);
    return Success;
}

int cuDeviceGetAttribute(int* value, int attribute, int)
{
    switch (attribute)
    {
        case 16: *value = Multiprocessors; return Success;
        case 38: *value = L2Bytes; return Success;
        case 75: *value = Major; return Success;
        case 76: *value = Minor; return Success;
        case 97: *value = MostSharedBytes; return Success;
        case 102: *value = 1; return Success; // virtual memory management
        default: return InvalidValue;
    }
}

int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active)
{
    std::lock_guard<std::recursive_mutex> hold(s_gate);
    if (device < 0 || device >= device_count())
        return InvalidDevice;
    *flags = 0;
    *active = s_contexts[device].references > 0;
    return Success;
}

int cuDevicePrimaryCtxRetain(void** context, int device)
{
    std::lock_guard<std::recursive_mutex> hold(s_gate);
    if (device < 0 || device >= device_count())
        return InvalidDevice;
    s_contexts[device].references++;
    *context = &s_contexts[device];
    return Success;
}

int cuDevicePrimaryCtxRelease_v2(int device)
{
    std::lock_guard<std::recursive_mutex> hold(s_gate);
    if (device < 0 || device >= device_count())
        return InvalidDevice;
    return s_contexts[device].references-- > 0 ? Success : InvalidContext;
}

int cuCtxGetCurrent(void** context)
{
    *context = current();
    return Success;
}

int cuCtxSetCurrent(void* context)
{
    if (!s_current.empty())
        s_current.pop_back();
    if (context != nullptr)
        s_current.push_back((Context*)context);
    return Success;
}

int cuCtxPushCurrent_v2(void* context)
{
    if (context == nullptr)
        return InvalidContext;
    s_current.push_back((Context*)context);
    return Success;
}

int cuCtxPopCurrent_v2(void** context)
{
    if (s_current.empty())
        return InvalidContext;
    *context = s_current.back();
    s_current.pop_back();
    return Success;
}

int cuMemGetInfo_v2(size_t* free, size_t* total)
{
    SIM_ENTER;
    size_t taken = allocated_bytes() + s_physical_bytes;
    *total = device_bytes();
    *free = *total - (taken < *total ? taken : *total); // as if all devices shared one memory
    return Success;
}

int cuMemAlloc_v2(void** pointer, size_t bytes)
{
    SIM_ENTER;
    if (bytes == 0)
        return InvalidValue;
    *pointer = allocated_bytes() + s_physical_bytes + bytes <= device_bytes() ? allocate(bytes) : nullptr;
    if (*pointer == nullptr)
        return OutOfMemory;
    s_owners[*pointer] = current();
    return Success;
}

int cuMemFree_v2(void* pointer)
{
    std::lock_guard<std::recursive_mutex> hold(s_gate);
    void* start;
    size_t bytes;
    if (s_mapped.count(pointer) != 0 || !allocation_of(pointer, &start, &bytes) || start != pointer)
        return InvalidValue;
    if (s_owners[pointer] != current())
        return InvalidContext;
    drain_all(); // the only way of freeing memory that waits
    if (auto exported = s_exported.find(pointer); exported != s_exported.end())
    {
        s_exports[exported->second].generation = 0;
        s_exported.erase(exported);
    }

    release(pointer);
    s_owners.erase(pointer);
    s_ids.erase(pointer);
    return Success;
}

// Pinned by this process now.
size_t cuSimPinnedBytes()
{
    std::lock_guard<std::recursive_mutex> gate(s_gate);
    size_t sum = 0;
    for (auto& [pointer, bytes] : s_pinned)
        sum += bytes;
    return sum;
}

int cuMemGetAddressRange_v2(void** start, size_t* bytes, void* pointer)
{
    SIM_ENTER;
    return allocation_of(pointer, start, bytes) ? Success : InvalidValue;
}

int cuPointerGetAttribute(void* value, int attribute, void* pointer)
{
    SIM_ENTER;
    int file;
    void* start;
    size_t offset, bytes;
    if (!allocation_of(pointer, &start, &bytes))
        return InvalidValue;
    switch (attribute)
    {
        case 7: // BUFFER_ID: never given to two allocations, even at the same address
            if (s_ids.count(start) == 0)
                s_ids[start] = ++s_last_id;
            *(uint64_t*)value = s_ids[start];
            return Success;
        case 9: // DEVICE_ORDINAL
            *(int*)value = (int)(s_owners[start] - s_contexts);
            return Success;
        case 10: // IS_LEGACY_CUDA_IPC_CAPABLE
            *(int*)value = arena_offset(pointer, &file, &offset, &bytes);
            return Success;
        default:
            return InvalidValue;
    }
}

int cuMemAllocHost_v2(void** pointer, size_t bytes)
{
    SIM_ENTER;
    size_t whole = (bytes + 4095) / 4096 * 4096;
    *pointer = aligned_alloc(4096, whole);
    if (*pointer != nullptr)
    {
        memset(*pointer, 0, whole); // the results of an idle device
        s_pinned[*pointer] = whole;
    }

    return *pointer ? Success : OutOfMemory;
}

int cuMemFreeHost(void* pointer)
{
    std::lock_guard<std::recursive_mutex> hold(s_gate);
    s_given_back[pointer] = s_pinned[pointer];
    drain_all();
    s_given_back.erase(pointer);
    s_pinned.erase(pointer);
    free(pointer);
    return Success;
}

int cuMemcpyHtoDAsync_v2(void* destination, const void* source, size_t bytes, void* stream)
{
    SIM_ENTER_STREAM(stream);
    SIM_CHECK(destination, bytes);
    return submit(stream, [=]
    {
        if (!there("cuMemcpyHtoDAsync_v2", destination, source, bytes))
            return (int)LaunchFailed;
        memcpy(destination, source, bytes);
        counters.host_to_device_bytes += bytes;
        return (int)Success;
    });
}

int cuMemcpyDtoHAsync_v2(void* destination, const void* source, size_t bytes, void* stream)
{
    SIM_ENTER_STREAM(stream);
    SIM_CHECK(source, bytes);
    return submit(stream, [=]
    {
        if (!there("cuMemcpyDtoHAsync_v2", source, destination, bytes))
            return (int)LaunchFailed;
        memcpy(destination, source, bytes);
        counters.device_to_host_bytes += bytes;
        return (int)Success;
    });
}

int cuMemcpyDtoDAsync_v2(void* destination, const void* source, size_t bytes, void* stream)
{
    SIM_ENTER_STREAM(stream);
    SIM_CHECK(destination, bytes);
    SIM_CHECK(source, bytes);
    return submit(stream, [=]
    {
        if (!there("cuMemcpyDtoDAsync_v2", destination, nullptr, bytes) || !there("cuMemcpyDtoDAsync_v2", source, nullptr, bytes))
            return (int)LaunchFailed;
        memmove(destination, source, bytes);
        return (int)Success;
    });
}

int cuMemsetD8Async(void* pointer, unsigned char value, size_t bytes, void* stream)
{
    SIM_ENTER_STREAM(stream);
    SIM_CHECK(pointer, bytes);
    return submit(stream, [=]
    {
        if (!there("cuMemsetD8Async", pointer, nullptr, bytes))
            return (int)LaunchFailed;
        fill(pointer, value, bytes);
        return (int)Success;
    });
}

// ---- Virtual memory management.

int cuMemGetAllocationGranularity(size_t* bytes, const CUmemAllocationProp* prop, int)
{
    *bytes = Granularity;
    return prop->type == 1 && prop->location.type == 1 ? Success : InvalidValue;
}

int cuMemAddressReserve(void** pointer, size_t bytes, size_t, void*, unsigned long long)
{
    SIM_ENTER;
    if (bytes == 0 || bytes % Granularity != 0)
        return InvalidValue;
    *pointer = reserve(bytes);
    return *pointer ? Success : OutOfMemory;
}

int cuMemAddressFree(void* pointer, size_t bytes)
{
    std::lock_guard<std::recursive_mutex> hold(s_gate);
    return unreserve(pointer, bytes) ? Success : InvalidValue;
}

int cuMemCreate(unsigned long long* handle, size_t bytes, const CUmemAllocationProp* prop, unsigned long long)
{
    SIM_ENTER;
    if (bytes == 0 || bytes % Granularity != 0 || prop->type != 1 || prop->location.type != 1 || prop->location.id < 0 || prop->location.id >= device_count())
        return InvalidValue;
    if (allocated_bytes() + s_physical_bytes + bytes > device_bytes())
        return OutOfMemory;
    s_physical_bytes += bytes;
    counters.allocations++;
    *handle = (unsigned long long)new Physical{bytes, nullptr, false, false};
    return Success;
}

static void drop(Physical* p)
{
    if (p->at != nullptr || !p->released)
        return;
    s_physical_bytes -= p->bytes;
    delete p;
}

int cuMemRelease(unsigned long long handle)
{
    std::lock_guard<std::recursive_mutex> hold(s_gate);
    ((Physical*)handle)->released = true;
    drop((Physical*)handle);
    return Success;
}

int cuMemMap(void* pointer, size_t bytes, size_t offset, unsigned long long handle, unsigned long long)
{
    SIM_ENTER;
    Physical* p = (Physical*)handle;
    if (p->at != nullptr || offset != 0 || bytes != p->bytes || !reserved(pointer, bytes))
        return InvalidValue;
    p->at = pointer;
    s_maps[pointer] = p;
    return Success;
}

int cuMemSetAccess(void* pointer, size_t bytes, const CUmemAccessDesc* access, size_t count)
{
    SIM_ENTER;
    auto it = s_maps.find(pointer);
    if (it == s_maps.end() || it->second->bytes != bytes || count != 1 || access->location.type != 1 || access->flags != 3)
        return InvalidValue;
    if (!it->second->accessible)
        back(pointer, bytes);
    s_owners[pointer] = current();
    it->second->accessible = true;
    return Success;
}

int cuMemUnmap(void* pointer, size_t bytes)
{
    std::lock_guard<std::recursive_mutex> hold(s_gate);
    auto it = s_maps.find(pointer);
    if (it == s_maps.end() || it->second->bytes != bytes)
        return InvalidValue;
    Physical* p = it->second;
    if (p->accessible)
        unback(pointer);
    s_owners.erase(pointer);
    s_ids.erase(pointer);
    s_maps.erase(it);
    p->at = nullptr;
    p->accessible = false;
    drop(p);
    return Success;
}

// ---- Memory and events of another process: a piece of its file, and an entry of what it exports.

int cuIpcGetMemHandle(CUipcMemHandle* handle, void* pointer)
{
    SIM_ENTER;
    Handle h = {getpid(), 0, 0, 0, 0, 0, 0, ""};
    if (!arena_offset(pointer, &h.file, &h.offset, &h.bytes))
        return InvalidValue;
    void* start;
    size_t bytes;
    allocation_of(pointer, &start, &bytes);
    if (s_exported.count(start) == 0)
    {
        int entry = add_export();
        if (entry < 0)
            return OutOfMemory;
        s_exported[start] = entry;
    }

    h.exports = s_exports_file;
    h.entry = s_exported[start];
    h.generation = s_exports[h.entry].generation;
    memcpy(h.magic, MemoryMagic, sizeof h.magic);
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &h, sizeof h);
    return Success;
}

int cuIpcOpenMemHandle_v2(void** pointer, CUipcMemHandle handle, unsigned)
{
    SIM_ENTER;
    Handle h;
    memcpy(&h, &handle, sizeof h);
    if (memcmp(h.magic, MemoryMagic, 8) != 0)
        return InvalidValue;
    if (h.pid == getpid())
        return InvalidContext; // a driver's result in the process that created it
    std::string name((const char*)&handle, sizeof handle);
    for (auto& [start, mapped] : s_mapped)
    {
        if (mapped.handle != name || s_owners[start] != current())
            continue;
        mapped.opened++;
        *pointer = start;
        return Success;
    }

    Exported* exports = open_exports(h, MemoryMagic);
    if (exports == nullptr)
        return InvalidValue;
    munmap(exports, ExportsBytes);
    int file = open_of(h.pid, h.file);
    if (file < 0)
        return InvalidValue;
    size_t skipped = h.offset % 4096;
    char* p = (char*)mmap(nullptr, h.bytes + skipped, PROT_READ | PROT_WRITE, MAP_SHARED, file, (off_t)(h.offset - skipped));
    close(file);
    if (p == MAP_FAILED)
        return OutOfMemory;
    *pointer = p + skipped;
    s_mapped[*pointer] = {name, h.bytes, 1};
    counters.mapped = s_mapped.size();
    s_owners[*pointer] = current();
    adopt(*pointer, h.bytes);
    return Success;
}

int cuIpcCloseMemHandle(void* pointer)
{
    std::lock_guard<std::recursive_mutex> hold(s_gate);
    auto it = s_mapped.find(pointer);
    if (it == s_mapped.end())
        return InvalidValue;
    if (--it->second.opened > 0)
        return Success;
    drain_all(); // work that was submitted may read it
    size_t skipped = (uintptr_t)pointer % 4096;
    munmap((char*)pointer - skipped, it->second.bytes + skipped);
    disown(pointer);
    s_mapped.erase(it);
    s_owners.erase(pointer);
    counters.mapped = s_mapped.size();
    return Success;
}

int cuIpcGetEventHandle(CUipcEventHandle* handle, void* event)
{
    SIM_ENTER;
    const Event& e = *(Event*)event;
    if (e.exported == nullptr || e.imported != nullptr)
        return InvalidValue;
    Handle h = {getpid(), s_exports_file, 0, (int)(e.exported - s_exports), e.exported->generation, 0, 0, ""};
    memcpy(h.magic, EventMagic, sizeof h.magic);
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &h, sizeof h);
    return Success;
}

int cuIpcOpenEventHandle(void** event, CUipcEventHandle handle)
{
    SIM_ENTER;
    Handle h;
    memcpy(&h, &handle, sizeof h);
    if (h.pid == getpid() && memcmp(h.magic, EventMagic, 8) == 0)
        return InvalidContext;
    Exported* exports = open_exports(h, EventMagic);
    if (exports == nullptr)
        return InvalidValue;
    *event = new Event{DisableTiming | Interprocess, exports + h.entry, exports, {}, nullptr, 0, std::make_shared<uint64_t>(0)};
    return Success;
}

// ---- Streams, events, graphs.

int cuCtxGetStreamPriorityRange(int* least, int* greatest)
{
    SIM_ENTER;
    *least = 0;
    *greatest = GreatestPriority;
    return Success;
}

int cuStreamCreateWithPriority(void** stream, unsigned, int priority)
{
    SIM_ENTER;
    auto queue = std::make_shared<Queue>();
    s_queues.insert(queue.get());
    *stream = new Stream{current(), queue, nullptr, false, {}, 0, std::clamp(priority, GreatestPriority, 0)};
    return Success;
}

int cuStreamCreate(void** stream, unsigned flags) { return cuStreamCreateWithPriority(stream, flags, 0); }

int cuStreamGetPriority(void* stream, int* priority)
{
    SIM_ENTER_STREAM(stream);
    *priority = stream != nullptr ? ((Stream*)stream)->priority : 0;
    return Success;
}

int cuStreamDestroy_v2(void* stream)
{
    wait_beside(stream);
    std::lock_guard<std::recursive_mutex> hold(s_gate);
    drain(*((Stream*)stream)->queue);
    s_queues.erase(((Stream*)stream)->queue.get());
    delete (Stream*)stream;
    return Success;
}

int cuStreamSynchronize(void* stream)
{
    SIM_ENTER_STREAM(stream);
    if (stream != nullptr && ((Stream*)stream)->recording != nullptr)
        return CaptureUnsupported;
    counters.synchronisations++;
    if (stream != nullptr)
        drain(*((Stream*)stream)->queue);
    return ready();
}

int cuStreamWaitEvent(void* stream, void* event, unsigned)
{
    SIM_ENTER_STREAM(stream);
    if (stream == nullptr)
        return InvalidValue;
    Event& e = *(Event*)event;
    ((Stream*)stream)->beside = e.beside;
    return submit(stream, [queue = e.queue, until = e.until, exported = e.imported != nullptr ? e.exported : nullptr]
    {
        if (queue != nullptr)
            drain(*queue, until);
        // Nothing of this process is done meanwhile, which the other process does not need.
        while (exported != nullptr && exported->done < exported->recorded)
            usleep(100);
        return (int)Success;
    });
}

int cuEventCreate(void** event, unsigned flags)
{
    SIM_ENTER;
    Exported* exported = nullptr;
    if ((flags & Interprocess) != 0)
    {
        if ((flags & DisableTiming) == 0)
            return InvalidValue;
        int entry = add_export();
        if (entry < 0)
            return OutOfMemory;
        exported = s_exports + entry;
    }

    *event = new Event{flags, exported, nullptr, {}, nullptr, 0, std::make_shared<uint64_t>(0)};
    return Success;
}

int cuEventDestroy_v2(void* event)
{
    std::lock_guard<std::recursive_mutex> hold(s_gate);
    Event* e = (Event*)event;
    if (e->imported != nullptr)
    {
        drain_all(); // work that was submitted may wait for it
        munmap(e->imported, ExportsBytes);
    }
    else if (e->exported != nullptr)
    {
        drain_all();
        e->exported->generation = 0;
    }

    delete e;
    return Success;
}

int cuEventRecord(void* event, void* stream)
{
    SIM_ENTER;
    if (is_foreign(stream))
        return InvalidContext;
    Event& e = *(Event*)event;
    Stream* s = (Stream*)stream;
    e.beside = s != nullptr ? s->beside : std::shared_future<void>();
    e.nanoseconds = std::make_shared<uint64_t>(0);
    e.queue = s != nullptr ? s->queue : nullptr;
    uint64_t times = e.exported != nullptr ? ++e.exported->recorded : 0;
    int result = submit(stream, [s, nanoseconds = e.nanoseconds, exported = e.exported, times]
    {
        *nanoseconds = s != nullptr ? s->nanoseconds : 0;
        if (exported != nullptr && exported->done < times)
            exported->done = times;
        return (int)Success;
    });
    e.until = s != nullptr ? s->queue->submitted : 0;
    if (e.exported != nullptr && s != nullptr && s->recording == nullptr)
        do_later(s->queue, e.until);
    return result;
}

// Only matmuls take time here, as their algorithms say: the host's clock is not used.
int cuEventElapsedTime(float* milliseconds, void* from, void* to)
{
    SIM_ENTER;
    const Event &first = *(Event*)from, &last = *(Event*)to;
    if (((first.flags | last.flags) & DisableTiming) != 0)
        return InvalidHandle;
    if ((first.queue != nullptr && first.queue->done < first.until) || (last.queue != nullptr && last.queue->done < last.until))
        return NotReady;
    *milliseconds = (float)((double)(*last.nanoseconds - *first.nanoseconds) / 1e6);
    return Success;
}

int cuEventQuery(void* event)
{
    SIM_ENTER;
    const Event& e = *(Event*)event;
    if (e.beside.valid() && e.beside.wait_for(std::chrono::seconds(0)) != std::future_status::ready)
        return NotReady;
    if (e.imported != nullptr && e.exported->done < e.exported->recorded)
        return NotReady;
    if (e.queue != nullptr)
        drain(*e.queue, e.until); // repeated polling waits
    return ready();
}

int cuEventSynchronize(void* event)
{
    std::shared_future<void> beside = ((Event*)event)->beside;
    if (beside.valid())
        beside.wait();
    const Event& e = *(Event*)event;
    while (e.imported != nullptr && e.exported->done < e.exported->recorded)
        usleep(100);
    SIM_ENTER;
    counters.synchronisations++;
    if (((Event*)event)->queue != nullptr)
        drain(*((Event*)event)->queue, ((Event*)event)->until);
    return ready();
}

int cuStreamBeginCapture_v2(void* stream, int)
{
    SIM_ENTER_STREAM(stream);
    Stream* s = (Stream*)stream;
    if (s == nullptr || s->recording != nullptr)
        return InvalidValue;
    s->recording = &(new Graph())->work;
    return Success;
}

int cuStreamEndCapture(void* stream, void** graph)
{
    SIM_ENTER;
    Stream* s = (Stream*)stream;
    if (s == nullptr || s->recording == nullptr)
        return InvalidValue;
    *graph = s->invalidated ? nullptr : s->recording; // the first member of a Graph
    s->recording = nullptr;
    return std::exchange(s->invalidated, false) ? CaptureInvalidated : Success;
}

int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long)
{
    SIM_ENTER;
    *executable = new Executable{std::make_shared<Work>(((Graph*)graph)->work)};
    counters.graphs++;
    return Success;
}

int cuGraphLaunch(void* executable, void* stream)
{
    SIM_ENTER_STREAM(stream);
    return submit(stream, [all = ((Executable*)executable)->work]
    {
        for (const auto& work : *all)
        {
            if (int error = work())
                return error;
        }

        return (int)Success;
    });
}

int cuGraphExecDestroy(void* executable)
{
    delete (Executable*)executable;
    return Success;
}

int cuGraphDestroy(void* graph)
{
    delete (Graph*)graph;
    return Success;
}

// ---- Kernels.

int cuModuleLoadData(void** module, const void* image)
{
    SIM_ENTER;
    // The image's length is read from it: an ELF file written by ld ends with its section headers.
    const ElfW(Ehdr)* elf = (const ElfW(Ehdr)*)image;
    if (memcmp(elf->e_ident, ELFMAG, SELFMAG) != 0)
        return InvalidImage;
    size_t bytes = elf->e_shoff + (size_t)elf->e_shentsize * elf->e_shnum;
    int file = memfd_create("cuda-sim-module", MFD_CLOEXEC);
    if (file < 0 || write(file, image, bytes) != (ssize_t)bytes)
        return OutOfMemory;
    std::string path = "/proc/self/fd/" + std::to_string(file);
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL); // stays open: the loader knows a library by its path
    if (library == nullptr)
    {
        fault(dlerror());
        return InvalidImage;
    }

    link_map* map;
    dlinfo(library, RTLD_DI_LINKMAP, &map);
    dl_iterate_phdr(readable, (void*)map->l_addr);
    *module = new Module{current(), library};
    return Success;
}

int cuModuleUnload(void* module)
{
    if (((Module*)module)->context != current())
        return InvalidContext;
    // The library stays loaded, and its readable ranges stay registered.
    delete (Module*)module;
    return Success;
}

int cuModuleGetFunction(void** function, void* module, const char* name)
{
    SIM_ENTER;
    Module* m = (Module*)module;
    auto call = (void (*)(void**))dlsym(m->library, (std::string("sim_kernel_") + name).c_str());
    auto sizes = (int (*)(unsigned*))dlsym(m->library, (std::string("sim_sizes_") + name).c_str());
    if (call == nullptr || sizes == nullptr)
        return NotFound;
    auto range = (void (*)(char**, char**))dlsym(m->library, "sim_shared_range");
    unsigned bytes[64];
    int count = sizes(bytes);
    *function = new Function{m->context, call, range, std::vector<unsigned>(bytes, bytes + count), 48 * 1024};
    return Success;
}

int cuFuncSetAttribute(void* function, int attribute, int value)
{
    SIM_ENTER;
    if (attribute != 8 || value < 0 || (unsigned)value > MostSharedBytes)
        return InvalidValue;
    ((Function*)function)->dynamic_bytes = (unsigned)value;
    return Success;
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int threads, size_t shared_bytes)
{
    SIM_ENTER;
    constexpr unsigned Multiprocessor = 228 * 1024, Reserved = 1024, Threads = 2048;
    if (function == nullptr || threads <= 0 || threads > (int)MostThreads || shared_bytes > ((Function*)function)->dynamic_bytes)
        return InvalidValue;
    *blocks = (int)std::min(Threads / (unsigned)threads, Multiprocessor / ((unsigned)shared_bytes + Reserved));
    return Success;
}

int cuLaunchKernelEx(const CUlaunchConfig* config, void* function, void** arguments, void** extra)
{
    SIM_ENTER_STREAM(config->stream);
    Function* f = (Function*)function;
    Dim grid = config->grid, block = config->block;
    unsigned shared_bytes = config->shared_bytes;
    if (f == nullptr || extra != nullptr || grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.y == 0 || block.z == 0
        || (uint64_t)block.x * block.y * block.z > MostThreads || block.z > 64 || grid.x > 0x7fffffff || grid.y > MostGrid || grid.z > MostGrid
        || shared_bytes > f->dynamic_bytes)
    {
        if (config->stream != nullptr && ((Stream*)config->stream)->recording != nullptr)
            ((Stream*)config->stream)->invalidated = true;
        return InvalidValue;
    }

    if (f->context != current())
        return InvalidContext;
    bool early = false;
    for (unsigned i = 0; i < config->attribute_count; i++)
    {
        if (config->attributes[i].id != StartsEarly)
            return InvalidValue;
        early = config->attributes[i].value.allowed != 0;
    }

    std::vector<std::string> values;
    for (size_t i = 0; i < f->sizes.size(); i++)
        values.emplace_back((const char*)arguments[i], f->sizes[i]);
    return submit(config->stream, [=]() mutable
    {
        std::vector<void*> pointers;
        for (std::string& value : values)
            pointers.push_back(value.data());
        char *start, *end;
        f->shared_range(&start, &end);
        set_shared(start, end);
        set_launched_shared(shared_bytes);
        counters.launches++;
        counters.early_launches += early;
        launch(f->call, pointers.data(), grid, block, early);
        return fault_text().empty() ? (int)Success : (int)LaunchFailed;
    });
}

void cuSimIdle(int idle)
{
    std::lock_guard<std::recursive_mutex> hold(s_gate);
    drain_all();
    s_idle = idle != 0;
}

void cuSimBytes(uint64_t bytes)
{
    std::lock_guard<std::recursive_mutex> hold(s_gate);
    s_bytes = bytes;
}

void cuSimCounters(Counters* out)
{
    std::lock_guard<std::recursive_mutex> hold(s_gate);
    drain_all();
    *out = counters;
}
}
