// CUDA's execution model on one host thread: what csrc/common/cuda_launch.cuh includes where the compiler is not nvcc.
//
// A CUDA thread is a fiber. Blocks run one after the other in random order; within a block a random thread that can go on
// runs until it has to wait (seeded, see simt_set_seed). Waiting threads are checked: a barrier that only part of the
// block reaches, or that is reached at two places, a collective that lacks a lane, and a deadlock are errors that name
// the threads and the source lines. Shared memory is one heap block of the exact size for each array, filled with 0xFF
// (NaN, -1) and guarded on both sides. Asynchronous copies poison their target and arrive at the latest moment that the
// waits allow. Under ThreadSanitizer each thread is a fiber of its own and only barriers, __syncwarp and the launch order
// memory, so that a missing barrier is a reported race even where the numbers come out right.
//
// Not modelled: warps in lock step, several blocks at once (a block must not wait for another), timing.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

using Site = std::source_location;

enum class Collective { none, block_barrier, warp_sync, shuffle, ballot, match_any };

// One CUDA thread, as its kernel and the scheduler see it.
struct Thread {
  dim3 thread_index, block_index, block_dim, grid_dim;
  int linear = 0;  // within the block
  bool exited = false;

  // what it waits for
  Collective waits_for = Collective::none;
  Site site;
  unsigned mask = 0;
  int source_lane = 0;   // of a shuffle
  uint64_t payload = 0;  // goes in
  uint64_t result = 0;   // comes out

  struct Copy {
    void* to;
    const void* from;
    size_t bytes, from_bytes;  // the rest is zero
  };
  std::vector<Copy> open_copies;
  std::vector<std::vector<Copy>> committed_copies;
};

extern Thread* current;

// Limits of one block and one launch on compute capability 9.0; a launch past them throws std::runtime_error.
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 232448;

struct Parameter {
  const void* data;
  size_t bytes;
};

struct Launch {
  dim3 grid, block;
  size_t dynamic_shared_bytes = 0;
  const void* kernel = nullptr;  // the library's symbols have its name at this address
  std::vector<Parameter> parameters = {};
};

// Runs `body`, the kernel with its arguments, for every thread of the grid. Throws std::runtime_error with the report of
// the first error.
void launch(const Launch& launch, const std::function<void()>& body);

// Something else that runs launches (tests/gpu/ptx_ops.py); returns whether it did so without an error.
using Launcher = bool (*)(const unsigned* grid_and_block, size_t dynamic_shared_bytes, const void* kernel,
                          const Parameter* parameters, size_t num_parameters);

// Block-wide array of the running block, allocated when its first thread comes by; `key` tells arrays apart.
void* shared_array(const void* key, const char* name, size_t bytes);
void* dynamic_shared_array();

[[noreturn]] void fail(const char* what, Site at);
void wait(Collective kind, unsigned mask, uint64_t payload, int source_lane, Site at);

// cp.async: late and poisoned
void copy_async(void* to, const void* from, size_t bytes, size_t from_bytes, Site at);
void commit_copies();
void wait_copies(size_t groups_left);

template <class T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int lane() { return current->linear % 32; }

template <class T>
T shuffle(unsigned mask, T value, int source_lane, Site at) {
  wait(Collective::shuffle, mask, pack(value), source_lane, at);
  return unpack<T>(current->result);
}

}  // namespace simt

#define threadIdx (::simt::current->thread_index)
#define blockIdx (::simt::current->block_index)
#define blockDim (::simt::current->block_dim)
#define gridDim (::simt::current->grid_dim)

inline void __syncthreads(simt::Site at = simt::Site::current()) {
  simt::wait(simt::Collective::block_barrier, 0, 0, 0, at);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Site at = simt::Site::current()) {
  simt::wait(simt::Collective::warp_sync, mask, 0, 0, at);
}

// sub-warp widths are left out: no kernel here uses them
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, simt::Site at = simt::Site::current()) {
  return simt::shuffle(mask, value, lane & 31, at);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, simt::Site at = simt::Site::current()) {
  return simt::shuffle(mask, value, simt::lane() ^ lanes, at);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, simt::Site at = simt::Site::current()) {
  const int from = simt::lane() - static_cast<int>(delta);
  return simt::shuffle(mask, value, from < 0 ? simt::lane() : from, at);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, simt::Site at = simt::Site::current()) {
  const int from = simt::lane() + static_cast<int>(delta);
  return simt::shuffle(mask, value, from > 31 ? simt::lane() : from, at);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site at = simt::Site::current()) {
  simt::wait(simt::Collective::ballot, mask, predicate != 0, 0, at);
  return static_cast<unsigned>(simt::current->result);
}

inline int __any_sync(unsigned mask, int predicate, simt::Site at = simt::Site::current()) {
  return __ballot_sync(mask, predicate, at) != 0;
}

inline int __all_sync(unsigned mask, int predicate, simt::Site at = simt::Site::current()) {
  return __ballot_sync(mask, !predicate, at) == 0;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, simt::Site at = simt::Site::current()) {
  simt::wait(simt::Collective::match_any, mask, simt::pack(value), 0, at);
  return static_cast<unsigned>(simt::current->result);
}

// relaxed, as on the device: an atomic orders no other memory
inline int atomicAdd(int* address, int value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }

inline unsigned atomicOr(unsigned* address, unsigned value) { return __atomic_fetch_or(address, value, __ATOMIC_RELAXED); }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
