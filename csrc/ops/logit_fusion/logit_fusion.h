// The sources of a fusion and what one row makes of them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>
#include <vector>

#include "common/dispatch.h"
#include "common/workspace.h"
#include "microkernels/convert.h"
#include "microkernels/logit_table.h"
#include "ops/logit_fusion/threshold.h"

namespace moe {

inline LogitDtype logit_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return LogitDtype::f32;
    case ScalarType::BFloat16: return LogitDtype::b16;
    case ScalarType::Half: return LogitDtype::f16;
    case ScalarType::Double: return LogitDtype::f64;
    default: MOE_CHECK(false, "fuse_logits: sources must be float32, bfloat16, float16 or float64");
  }
  __builtin_unreachable();
}

// Exponentials of a row summed block by block: sum = sum_i exp(z_i - top), in double from the second block on.
template <class Acc>
struct RowSum {
  Acc top = -std::numeric_limits<Acc>::infinity();
  double sum = 0;

  // Returns the block's own largest value.
  Acc add(const Acc* z, int64_t n) {
    const Acc block_top = logit_kernels<Acc>().largest(z, n);
    if (!(block_top > -std::numeric_limits<Acc>::infinity())) return block_top;
    add(block_top, static_cast<double>(logit_kernels<Acc>().exp_sum(z, n, block_top)));
    return block_top;
  }
  void add(Acc block_top, double block_sum) {
    if (block_top > top) {
      sum *= std::exp(static_cast<double>(top) - static_cast<double>(block_top));
      top = block_top;
      sum += block_sum;
    } else {
      sum += block_sum * std::exp(static_cast<double>(block_top) - static_cast<double>(top));
    }
  }
  bool empty() const { return !(top > -std::numeric_limits<Acc>::infinity()); }
};

// Every source of every row: K tensors [num_rows, >= vocab_size], or one tensor of which `rows` [num_rows, K] picks rows.
template <class Acc>
class Sources {
 public:
  Sources(const std::vector<Tensor>& sources, const std::optional<Tensor>& rows, const Tensor& weights,
          int64_t vocab_size, Scratch& scratch)
      : num_rows_(weights.size(0)), num_sources_(weights.size(1)), vocab_size_(vocab_size) {
    MOE_CHECK(vocab_size < (int64_t{1} << 31), "fuse_logits: vocab must be below 2**31");
    MOE_CHECK(rows ? sources.size() == 1 : static_cast<int64_t>(sources.size()) == num_sources_,
              "fuse_logits: weights must be of shape [num_rows, num_sources=", sources.size(), "]");
    for (const Tensor& source : sources) {
      MOE_CHECK(source.dim() == 2 && source.size(1) >= vocab_size && (rows || source.size(0) == num_rows_),
                "fuse_logits: sources must be of shape [num_rows=", num_rows_, ", at least ", vocab_size, "]");
      MOE_CHECK((source.scalar_type() == ScalarType::Double) == (sizeof(Acc) == sizeof(double)),
                "fuse_logits: sources must be all float64 or none");
      tensors_.push_back(with_contiguous_rows(source));
    }
    if (rows) {
      MOE_CHECK(rows->scalar_type() == ScalarType::Long && rows->numel() == weights.numel(),
                "fuse_logits: rows must be int64 of shape [num_rows, num_sources]");
      rows_ = torch::stable::contiguous(*rows);
      for (int64_t i = 0; i < rows_->numel(); ++i) {
        const int64_t row = data<int64_t>(*rows_)[i];
        MOE_CHECK(row >= 0 && row < sources[0].size(0), "fuse_logits: rows must be in [0, ", sources[0].size(0),
                  "), got ", row);
      }
    }
    weights_ = scratch.take<Acc>(num_rows_ * num_sources_);
    read_floats(weights, weights_);
  }

  int64_t num_rows() const { return num_rows_; }
  int64_t num_sources() const { return num_sources_; }
  int64_t vocab_size() const { return vocab_size_; }
  Acc weight(int64_t row, int64_t k) const { return weights_[row * num_sources_ + k]; }

  LogitSource<Acc> source(int64_t row, int64_t k) const {
    const Tensor& tensor = tensors_[rows_ ? 0 : static_cast<size_t>(k)];
    const int64_t at = rows_ ? data<int64_t>(*rows_)[row * num_sources_ + k] : row;
    const char* start = static_cast<const char*>(tensor.const_data_ptr());
    return {.row = start + at * tensor.stride(0) * static_cast<int64_t>(tensor.element_size()),
            .dtype = logit_dtype(tensor),
            .weight = weight(row, k),
            .floor = -std::numeric_limits<Acc>::infinity(),
            .top = 0,
            .log_sum = 0,
            .shift = 0};
  }

 private:
  int64_t num_rows_, num_sources_, vocab_size_;
  std::vector<Tensor> tensors_;
  std::optional<Tensor> rows_;
  Acc* weights_;
};

// What backward needs of one source in one row: the floor, or a mixture's largest logit (-inf where there is none) and the
// logarithm of the sum of exp(logit - largest).
template <class Acc>
struct SourceStats {
  Acc floor_or_top, log_sum;
};

template <class Acc>
void prepare_mixture(LogitSource<Acc>& source, const SourceStats<Acc>& stats) {
  if (!(stats.floor_or_top > -std::numeric_limits<Acc>::infinity())) return;
  source.top = stats.floor_or_top;
  source.log_sum = stats.log_sum;
  source.shift = static_cast<Acc>(std::log(static_cast<double>(source.weight)) - static_cast<double>(stats.log_sum));
}

// The sum over one source's row. False where it holds NaN or +inf.
template <class Acc>
bool sum_row(const LogitSource<Acc>& source, int64_t n, RowSum<Acc>& sum) {
  Acc block[kLogitBlock];
  for (int64_t begin = 0; begin < n; begin += kLogitBlock) {
    const int64_t size = std::min(kLogitBlock, n - begin);
    if (!logit_kernels<Acc>().load(source, begin, size, block)) return false;
    sum.add(block, size);
  }
  return true;
}

}  // namespace moe
