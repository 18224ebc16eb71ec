// The template op on the CPU: out[r, :] = weights[r] * rows[r, :]. Copy this room to start a new one.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "microkernels/convert.h"
#include "microkernels/table.h"

namespace moe {
namespace {

constexpr int64_t kRowsPerTask = 64;

Tensor scale_rows_cpu(const Tensor& rows_in, const Tensor& weights) {
  const Tensor rows = with_contiguous_rows(rows_in);
  MOE_CHECK(rows.dim() == 2 && weights.numel() == rows.size(0),
            "scale_rows: weights must be of shape [num_rows=", rows.size(0), "]");
  const int64_t num_rows = rows.size(0), size = rows.size(1);
  Tensor out = torch::stable::new_empty(rows, {num_rows, size});
  dispatch_float("scale_rows", rows.scalar_type(), [&]<class T>() {
    Scratch scratch;
    acc_t<T>* row_weights = scratch.take<acc_t<T>>(num_rows);
    read_floats(weights, row_weights);
    const T* in = data<T>(rows);
    T* result = mutable_data<T>(out);
    parallel_ranges(num_rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        microkernels<T>().scale(in + row * rows.stride(0), row_weights[row], result + row * size, size);
    });
  });
  return out;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) { m.impl("scale_rows", TORCH_BOX(&moe::scale_rows_cpu)); }
