// Asynchronous copies from global to shared memory (`cp.async`). A thread puts copies into groups and waits for its own; other threads'
// copies are visible after their wait and a barrier.
#pragma once
#include "common.cuh"

#if defined(ROLLOUT_SIM)
__device__ __forceinline__ void copy_16(void* to, const void* from, bool present) { sim_copy_async(to, from, present ? 16 : 0); }
__device__ __forceinline__ void end_group() { sim_end_copies(); }
template <int LEFT> __device__ __forceinline__ void wait_for_groups() { sim_wait_copies(LEFT); }
#else
// 16 bytes, aligned to 16 on both sides; zeros where they are not present.
__device__ __forceinline__ void copy_16(void* to, const void* from, bool present)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(shared_address(to)), "l"(from), "r"(present ? 16 : 0) : "memory");
}

__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most this many of the thread's newest groups are in flight.
template <int LEFT> __device__ __forceinline__ void wait_for_groups() { asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory"); }
#endif
