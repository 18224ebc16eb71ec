// The functions on experts' tensors that are compiled once for each instruction set; as in table.h.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace moe {

constexpr int64_t kMergeBlock = 1024;  // elements at once: differences of eight experts, 32 KiB in float32

// Same order as ELECTIONS and DIVISORS in python/moe_kernels/ops/merge/recipe.py, which has the equations.
enum class Election : int64_t { none, sign_of_sum, sum_not_negative };
enum class Divisor : int64_t { one, count, weights, constant };

// What of one expert's difference t is kept, and what it counts. Magnitudes are compared as bits of float32, an element
// whose bits are just `lower` is kept before index lower_end, one whose bits are just `upper` from upper_end on.
template <class Acc>
struct MergeSource {
  int64_t lower, lower_end, upper, upper_end;
  uint64_t keep_below;  // of 32 random bits; 2^32: all
  uint64_t key;
  Acc rescale;  // kept entries are divided by it
  Acc before;   // weight in the election
  Acc after;    // weight after it
  Acc divisor;  // what an agreeing entry adds to the divisor
};

template <class Acc>
struct MergeRule {
  Election election;
  Divisor divisor;
  Acc constant;   // of Divisor::constant
  Acc zero_sign;  // what sign_of_sum elects where the sum is zero
  Acc lambda;
};

// One expert's tensor; or the differences themselves of the elements that are merged, where they come from a task vector.
template <class T>
struct MergeExpert {
  const T* values;
  const acc_t<T>* given = nullptr;
};

template <class T>
struct MergeKernels {
  using Acc = acc_t<T>;
  // out = base + lambda * merged of the n <= kMergeBlock elements from `first` on; base may be null (zero). Returns how
  // many elements wait for a zero_sign that is 0. Adds the signs of the election's sums to *signs, if that is wanted; with
  // an `out` of null no more is done. deltas: room for kMergeBlock a source
  int64_t (*merge)(const T* base, const MergeExpert<T>* experts, int64_t first, int64_t n, const MergeSource<Acc>* sources,
                   int64_t num_sources, const MergeRule<Acc>& rule, Acc* deltas, T* out, int64_t* signs);
  // sums of |t| over all and over what is kept, in double
  void (*magnitudes)(const T* base, const MergeExpert<T>& expert, int64_t first, int64_t n, const MergeSource<Acc>& source,
                     double* sums);
};

struct MergeKernelTable {
  MergeKernels<float> f32;
  MergeKernels<bf16> b16;
  MergeKernels<fp16> f16;
  MergeKernels<double> f64;
};

// The table of the instruction set that common/cpu_isa.h chose, once a process.
const MergeKernelTable& merge_kernel_table();

template <class T>
const MergeKernels<T>& merge_kernels() {
  return of_dtype<T>(merge_kernel_table());
}

}  // namespace moe
