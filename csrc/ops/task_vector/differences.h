// tensor - base, block by block: what a fine-tune changed is never there as a whole.
#pragma once

#include <algorithm>
#include <optional>

#include "common/dispatch.h"
#include "microkernels/task_vector_table.h"

namespace moe {

template <class T>
class Differences {
 public:
  Differences(const char* op, const Tensor& tensor, const std::optional<Tensor>& base)
      : x_(data<T>(tensor)), base_(base ? data<T>(*base) : nullptr), numel_(tensor.numel()) {
    MOE_CHECK(tensor.is_contiguous() && (!base || (base->is_contiguous() && base->numel() == tensor.numel() &&
                                                   base->scalar_type() == tensor.scalar_type())),
              op, ": tensor and base must be contiguous, of one shape and dtype");
  }

  int64_t numel() const { return numel_; }
  int64_t num_blocks() const { return (numel_ + kTernaryBlock - 1) / kTernaryBlock; }
  int64_t size(int64_t block) const { return std::min(kTernaryBlock, numel_ - block * kTernaryBlock); }

  // The block's differences: in `buffer`, or where they lie already.
  const float* block(int64_t block, float* buffer) const {
    const int64_t at = block * kTernaryBlock;
    if constexpr (__is_same(T, float))
      if (base_ == nullptr) return x_ + at;
    task_vector_kernels<T>().differences(x_ + at, base_ == nullptr ? nullptr : base_ + at, size(block), buffer);
    return buffer;
  }

 private:
  const T *x_, *base_;
  int64_t numel_;
};

}  // namespace moe
