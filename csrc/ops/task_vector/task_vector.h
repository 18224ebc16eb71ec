// The vectors of a call: planes of a block each, whatever they are kept as.
#pragma once

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "microkernels/task_vector_table.h"

namespace moe {

template <class Acc>
class TernarySources {
 public:
  // deltas: planes [ceil(numel / 64), 2] int64 each; values: of t = 1, one for each
  TernarySources(const char* op, const std::vector<Tensor>& deltas, const std::vector<double>& values, int64_t numel)
      : numel_(numel) {
    MOE_CHECK(deltas.size() == values.size(), op, ": there must be as many coefficients as deltas");
    const int64_t groups = (numel + kTernaryGroup - 1) / kTernaryGroup;
    for (size_t i = 0; i < deltas.size(); ++i) {
      MOE_CHECK(deltas[i].scalar_type() == ScalarType::Long && deltas[i].is_contiguous() && deltas[i].dim() == 2 &&
                    deltas[i].size(0) == groups && deltas[i].size(1) == 2,
                op, ": the planes of ", numel, " elements must be int64 of shape [", groups, ", 2]");
      all_.push_back({reinterpret_cast<const uint64_t*>(data<int64_t>(deltas[i])), static_cast<Acc>(values[i])});
    }
  }

  int64_t count() const { return static_cast<int64_t>(all_.size()); }
  int64_t num_blocks() const { return (numel_ + kTernaryBlock - 1) / kTernaryBlock; }
  int64_t block_size(int64_t block) const { return std::min(kTernaryBlock, numel_ - block * kTernaryBlock); }

  // The sources of one block; valid until this thread asks again.
  const TernarySource<Acc>* block(int64_t block) const {
    static thread_local std::vector<TernarySource<Acc>> here;
    here = all_;
    for (TernarySource<Acc>& source : here) source.planes += block * (kTernaryBlock / kTernaryGroup) * 2;
    return here.data();
  }

  // No fewer elements than a block has in any vector, and no more than there are.
  int64_t most_touched(int64_t block) const {
    const int64_t size = block_size(block), groups = (size + kTernaryGroup - 1) / kTernaryGroup;
    int64_t sum = 0;
    for (const TernarySource<Acc>& source : all_) {
      const uint64_t* planes = source.planes + block * (kTernaryBlock / kTernaryGroup) * 2;
      for (int64_t g = 0; g < groups; ++g) sum += __builtin_popcountll(planes[2 * g]);
    }
    return std::min(sum, size);
  }

 private:
  int64_t numel_;
  std::vector<TernarySource<Acc>> all_;
};

}  // namespace moe
