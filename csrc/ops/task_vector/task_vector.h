// The vectors of a call: planes of a block each, whatever they are kept as.
#pragma once

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "common/dispatch.h"
#include "ops/task_vector/packed.h"

namespace moe {

template <class Acc>
class TernarySources {
 public:
  // deltas: planes [ceil(numel / 64), 2] int64, or packed vectors, uint8; values: of t = 1, one for each
  TernarySources(const char* op, const std::vector<Tensor>& deltas, const std::vector<double>& values, int64_t numel)
      : numel_(numel) {
    MOE_CHECK(deltas.size() == values.size(), op, ": there must be as many coefficients as deltas");
    const int64_t groups = (numel + kTernaryGroup - 1) / kTernaryGroup;
    for (size_t i = 0; i < deltas.size(); ++i) {
      all_.push_back({{nullptr, static_cast<Acc>(values[i])}, nullptr});
      packed_.emplace_back();
      if (deltas[i].scalar_type() == ScalarType::Byte) {
        packed_[i].emplace(op, deltas[i]);
        MOE_CHECK(packed_[i]->kind() != PackedKind::patch, op, ": a patch is no task vector; use apply_patch_");
        has_terms_ |= packed_[i]->kind() == PackedKind::values;
        MOE_CHECK(packed_[i]->numel() == numel, op, ": the packed task vector must be of ", numel, " elements, got ",
                  packed_[i]->numel());
        continue;
      }
      MOE_CHECK(deltas[i].scalar_type() == ScalarType::Long && deltas[i].is_contiguous() && deltas[i].dim() == 2 &&
                    deltas[i].size(0) == groups && deltas[i].size(1) == 2,
                op, ": the planes of ", numel, " elements must be int64 of shape [", groups, ", 2]");
      all_[i].planes = reinterpret_cast<const uint64_t*>(data<int64_t>(deltas[i]));
    }
  }

  int64_t count() const { return static_cast<int64_t>(all_.size()); }
  int64_t num_blocks() const { return (numel_ + kTernaryBlock - 1) / kTernaryBlock; }
  int64_t block_size(int64_t block) const { return std::min(kTernaryBlock, numel_ - block * kTernaryBlock); }

  // The sources of one block; valid until this thread asks again. A packed block that is damaged counts as zero.
  const VectorSource<Acc>* block(int64_t block) const {
    static thread_local std::vector<VectorSource<Acc>> here;
    static thread_local std::vector<uint64_t> decoded;
    static thread_local std::vector<Acc> terms;
    here = all_;
    decoded.resize(all_.size() * kWords);
    if (has_terms_) terms.resize(all_.size() * kTernaryBlock);
    for (size_t i = 0; i < here.size(); ++i) {
      if (!packed_[i]) {
        here[i].planes += block * kWords;
        continue;
      }
      uint64_t* planes = decoded.data() + i * kWords;
      const bool is_ternary = packed_[i]->kind() == PackedKind::ternary;
      Acc* these = is_ternary ? nullptr : terms.data() + static_cast<int64_t>(i) * kTernaryBlock;
      if (!packed_[i]->template decode<Acc>(block, here[i].value, planes, these)) {
        std::fill_n(planes, kWords, 0);
        damaged_ = true;
      }
      here[i].planes = planes;
      here[i].terms = these;
    }
    return here.data();
  }

  // To be called after the last block.
  void check_whole(const char* op) const {
    MOE_CHECK(!damaged_, op, ": a packed task vector was damaged after it was checked; its damaged blocks counted as zero");
  }

  // No fewer elements than a block has in any vector, and no more than there are.
  int64_t most_touched(int64_t block) const {
    const int64_t size = block_size(block), groups = (size + kTernaryGroup - 1) / kTernaryGroup;
    int64_t sum = 0;
    for (size_t i = 0; i < all_.size(); ++i) {
      if (packed_[i]) {
        sum += packed_[i]->count(block);
        continue;
      }
      const uint64_t* planes = all_[i].planes + block * kWords;
      for (int64_t g = 0; g < groups; ++g) sum += __builtin_popcountll(planes[2 * g]);
    }
    return std::min(sum, size);
  }

 private:
  static constexpr int64_t kWords = kTernaryBlock / kTernaryGroup * 2;
  int64_t numel_;
  std::vector<VectorSource<Acc>> all_;
  std::vector<std::optional<PackedView>> packed_;
  bool has_terms_ = false;
  mutable std::atomic<bool> damaged_{false};
};

}  // namespace moe
