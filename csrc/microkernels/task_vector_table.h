// The functions on task vectors that are compiled once for each instruction set; as in table.h.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace moe {

// Elements whose bits share the two words of a plane; python/moe_kernels/ops/task_vector/ternary.py has the layout.
constexpr int64_t kTernaryGroup = 64;
// Elements that are worked on at once: the block of the packed format, whose planes (1 KiB a vector) stay in the L1 cache.
constexpr int64_t kTernaryBlock = 4096;

// One vector's planes of a block, two words a group, and the value of t = 1.
template <class Acc>
struct TernarySource {
  const uint64_t* planes;
  Acc value;
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

template <class T>
struct TaskVectorKernels {
  using Acc = acc_t<T>;
  // w = round(w + s), s = sum_i value_i t_i in order in Acc, where any t is not zero and w is not NaN. n <= kTernaryBlock
  void (*apply)(T* weight, int64_t n, const TernarySource<Acc>* sources, int64_t num_sources);
  // and writes what takes it back; returns the number of kept
  int64_t (*apply_undoable)(T* weight, int64_t n, const TernarySource<Acc>* sources, int64_t num_sources,
                            const UndoStream<T>& undo);
  void (*unapply)(T* weight, int64_t n, const TernarySource<Acc>* sources, int64_t num_sources, const UndoStream<T>& undo);
};

struct TaskVectorKernelTable {
  TaskVectorKernels<float> f32;
  TaskVectorKernels<bf16> b16;
  TaskVectorKernels<fp16> f16;
  TaskVectorKernels<double> f64;
};

// The table of the instruction set that common/cpu_isa.h chose, once a process.
const TaskVectorKernelTable& task_vector_kernel_table();

template <class T>
const TaskVectorKernels<T>& task_vector_kernels() {
  const TaskVectorKernelTable& table = task_vector_kernel_table();
  if constexpr (__is_same(T, float))
    return table.f32;
  else if constexpr (__is_same(T, bf16))
    return table.b16;
  else if constexpr (__is_same(T, fp16))
    return table.f16;
  else
    return table.f64;
}

}  // namespace moe
