// The functions on task vectors that are compiled once for each instruction set; as in table.h.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace moe {

// Elements whose bits share the two words of a plane; python/moe_kernels/ops/task_vector/ternary.py has the layout.
constexpr int64_t kTernaryGroup = 64;
// Elements that are worked on at once: the block of the packed format, whose planes (1 KiB a vector) stay in the L1 cache.
constexpr int64_t kTernaryBlock = 4096;

// One ternary vector's planes of a block, two words a group, and the value of t = 1.
template <class Acc>
struct TernarySource {
  const uint64_t* planes;
  Acc value;
};

// One vector; of one whose t are no signs `terms` has value t of each element that is not zero, and is null for others.
template <class Acc>
struct VectorSource : TernarySource<Acc> {
  const Acc* terms = nullptr;
};

// What makes the weights of a block come back. s is the sum of the vectors and C = round(W' - s); an element where any
// vector is not zero has a bit in `moved` and one in `other`, in order of position:
//   moved other   bits of W
//       0     0   those of C
//       1     0   of C, plus one
//       1     1   of C, minus one
//       0     1   the next of `kept`
// A NaN is never changed, and 0 0.
template <class T>
struct UndoStream {
  uint64_t* moved;  // all words zero before apply writes
  uint64_t* other;
  T* kept;
};

// How a block of the packed format is written; the numbers are those of the format.
enum class PackedMode : int { empty, rice, bitmap, all, rice_of_zeros };
constexpr int kLargestRice = 11;  // gaps are below 4096: more low bits than 12 are never set, and 12 never pay

struct PackedChoice {
  PackedMode mode;
  int k;
  int64_t count, num_bits;
};

// 16 bytes after the last bit may be read.
struct PackedBlock {
  const uint8_t* bytes;
  int64_t num_bits;  // no more than these belong to it
  int64_t size, count;
  PackedMode mode;
  int k;
};

// dtypes of magnitudes and of patched weights; the numbers are those of the format
enum class PackedDtype : int { none, f32, b16, f16, f64 };

constexpr int kMomentLanes = 32;  // sums that run beside each other
constexpr int kLowBits = 15;  // of a magnitude's 31 bits, those that the second histogram counts

// On blocks of at most kTernaryBlock elements.
struct TernaryCodecKernels {
  void (*count_magnitudes)(const float* t, int64_t n, uint32_t* counts);
  void (*count_low_magnitudes)(const float* t, int64_t n, uint32_t high, uint32_t* counts);
  void (*count_window)(const float* t, int64_t n, int32_t first, int32_t last, uint32_t* counts);
  void (*add_moments)(const float* t, int64_t n, double* moments);
  int64_t (*select_ternary)(const float* t, int64_t n, uint32_t threshold, bool equal, uint64_t* planes);
  PackedChoice (*choose_block)(const uint64_t* planes, int64_t size);
  void (*encode_block)(const uint64_t* planes, int64_t size, const PackedChoice& choice, uint8_t* out);
  // the bit after the last one, -1 where the block is damaged
  int64_t (*decode_block)(const PackedBlock& block, uint64_t* planes);
  // the magnitudes |t| of the elements that a plane has, in [0, 1], written as dtype after each other
  void (*encode_magnitudes)(const float* t, float inverse_scale, int64_t n, const uint64_t* planes, PackedDtype dtype, uint8_t* out);
};

template <class T>
struct TaskVectorKernels {
  using Acc = acc_t<T>;
  void (*differences)(const T* x, const T* base, int64_t n, float* t);
  // w = round(w + s), s = sum_i value_i t_i in order in Acc, where any t is not zero and w is not NaN. n <= kTernaryBlock
  void (*apply)(T* weight, int64_t n, const VectorSource<Acc>* sources, int64_t num_sources);
  // and writes what takes it back; returns the number of kept
  int64_t (*apply_undoable)(T* weight, int64_t n, const VectorSource<Acc>* sources, int64_t num_sources,
                            const UndoStream<T>& undo);
  void (*unapply)(T* weight, int64_t n, const VectorSource<Acc>* sources, int64_t num_sources, const UndoStream<T>& undo);
  // terms = value t of the elements that the planes have, from `count` magnitudes; false where one is not in [0, 1]
  bool (*decode_magnitudes)(const uint8_t* bytes, PackedDtype dtype, int64_t size, const uint64_t* planes, Acc value, Acc* terms);
  // planes of where the bits differ and of which go down; returns the bits of encode_steps
  int64_t (*find_steps)(const T* x, const T* base, int64_t n, uint64_t* planes);
  void (*encode_steps)(const T* x, const T* base, int64_t n, const uint64_t* planes, uint8_t* out);
  // the weights go their steps, or back; false, and nothing changed, where the code is damaged
  bool (*move_steps)(const PackedBlock& block, bool back, T* weight);
};

struct TaskVectorKernelTable {
  TaskVectorKernels<float> f32;
  TaskVectorKernels<bf16> b16;
  TaskVectorKernels<fp16> f16;
  TaskVectorKernels<double> f64;
  TernaryCodecKernels codec;
};

// The table of the instruction set that common/cpu_isa.h chose, once a process.
const TaskVectorKernelTable& task_vector_kernel_table();

template <class T>
const TaskVectorKernels<T>& task_vector_kernels() {
  return of_dtype<T>(task_vector_kernel_table());
}

}  // namespace moe
