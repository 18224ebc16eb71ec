// plan_dispatch, permute, unpermute on the CPU. permute and unpermute move each element once: their floor is memcpy.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/dispatch.h"
#include "common/kept_memory.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "microkernels/convert.h"
#include "microkernels/table.h"
#include "ops/permute/permute.h"

namespace moe {
namespace {

// rows of a task: enough bytes (64 KiB) that handing out tasks costs nothing
int64_t rows_per_task(int64_t row_bytes) { return std::max<int64_t>(1, (int64_t{64} << 10) / std::max<int64_t>(1, row_bytes)); }

std::tuple<Tensor, Tensor, Tensor> plan_dispatch_cpu(const Tensor& topk_ids, int64_t num_experts) {
  MOE_CHECK(topk_ids.dim() == 2, "plan_dispatch: topk_ids must be of shape [num_tokens, top_k]");
  MOE_CHECK(num_experts >= 0, "plan_dispatch: num_experts must be at least 0, got ", num_experts);
  const int64_t num_tokens = topk_ids.size(0), top_k = topk_ids.size(1), num_pairs = num_tokens * top_k;
  MOE_CHECK(num_pairs < (int64_t{1} << 31), "plan_dispatch: num_tokens * top_k must be below 2**31, got ", num_pairs);
  Tensor expert_offsets = torch::stable::new_empty(topk_ids, {num_experts + 1}, ScalarType::Int);
  Tensor source_rows = torch::stable::new_empty(topk_ids, {num_pairs}, ScalarType::Int);
  Tensor permuted_rows = torch::stable::new_empty(topk_ids, {num_tokens, top_k}, ScalarType::Int);
  int32_t* offsets = mutable_data<int32_t>(expert_offsets);
  int32_t* source = mutable_data<int32_t>(source_rows);
  dispatch_id("plan_dispatch", topk_ids.scalar_type(), [&]<class Id>() {
    sort_pairs(data<Id>(topk_ids), topk_ids.stride(0), topk_ids.stride(1), num_tokens, top_k, num_experts, offsets,
               source, mutable_data<int32_t>(permuted_rows));
  });
  const int64_t num_permuted = offsets[num_experts];
  for (int64_t row = 0; row < num_permuted; ++row) source[row] /= static_cast<int32_t>(top_k);
  for (int64_t row = num_permuted; row < num_pairs; ++row) source[row] = -1;
  return {expert_offsets, source_rows, permuted_rows};
}

Tensor permute_cpu(const Tensor& hidden_states_in, const Tensor& source_rows_in) {
  const Tensor hidden_states = with_contiguous_rows(hidden_states_in);
  const Tensor source_rows = torch::stable::contiguous(source_rows_in);
  MOE_CHECK(hidden_states.dim() == 2 && source_rows.dim() == 1 && source_rows.scalar_type() == ScalarType::Int,
            "permute: hidden_states must be 2-dimensional and source_rows 1-dimensional int32");
  const int64_t num_tokens = hidden_states.size(0), hidden_size = hidden_states.size(1);
  const int64_t num_rows = source_rows.size(0);
  Tensor rows = new_result(hidden_states, {num_rows, hidden_size});
  const int32_t* source = data<int32_t>(source_rows);
  for (int64_t row = 0; row < num_rows; ++row)
    MOE_CHECK(source[row] < num_tokens, "permute: source_rows must be below num_tokens=", num_tokens, ", got ",
              source[row], "; the plan was made for other tokens");
  const int64_t row_bytes = hidden_size * static_cast<int64_t>(hidden_states.element_size());
  const int64_t stride_bytes = hidden_states.stride(0) * static_cast<int64_t>(hidden_states.element_size());
  const char* in = static_cast<const char*>(hidden_states.const_data_ptr());
  char* out = static_cast<char*>(rows.mutable_data_ptr());
  parallel_ranges(num_rows, rows_per_task(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (source[row] < 0)
        fill_zero(out + row * row_bytes, row_bytes);
      else if (row_bytes > 0)
        std::memcpy(out + row * row_bytes, in + source[row] * stride_bytes, static_cast<size_t>(row_bytes));
    }
  });
  return rows;
}

Tensor unpermute_cpu(const Tensor& rows_in, const Tensor& permuted_rows_in, const std::optional<Tensor>& topk_weights) {
  const Tensor rows = with_contiguous_rows(rows_in);
  const Tensor permuted_rows = torch::stable::contiguous(permuted_rows_in);
  MOE_CHECK(rows.dim() == 2 && permuted_rows.dim() == 2 && permuted_rows.scalar_type() == ScalarType::Int,
            "unpermute: rows must be 2-dimensional and permuted_rows 2-dimensional int32");
  const int64_t num_rows = rows.size(0), hidden_size = rows.size(1);
  const int64_t num_tokens = permuted_rows.size(0), top_k = permuted_rows.size(1), num_pairs = num_tokens * top_k;
  MOE_CHECK(!topk_weights || topk_weights->numel() == num_pairs,
            "unpermute: topk_weights must be of shape [num_tokens, top_k]");
  Tensor out = new_result(rows, {num_tokens, hidden_size});
  const int32_t* source = data<int32_t>(permuted_rows);
  for (int64_t pair = 0; pair < num_pairs; ++pair)
    MOE_CHECK(source[pair] < num_rows, "unpermute: permuted_rows must be below num_permuted=", num_rows, ", got ",
              source[pair], "; the plan was made for other rows");
  dispatch_float("unpermute", rows.scalar_type(), [&]<class T>() {
    using Acc = acc_t<T>;
    Scratch scratch;
    Acc* weights = nullptr;
    if (topk_weights) read_floats(*topk_weights, weights = scratch.take<Acc>(num_pairs));
    const T* in = data<T>(rows);
    const int64_t row_stride = rows.stride(0);
    T* result = mutable_data<T>(out);
    parallel_ranges(num_tokens, rows_per_task(top_k * hidden_size * static_cast<int64_t>(sizeof(T))),
                    [&](int64_t begin, int64_t end) {
                      Scratch task_scratch;
                      const T** picked = task_scratch.take<const T*>(top_k);
                      Acc* picked_weights = task_scratch.take<Acc>(top_k);
                      for (int64_t t = begin; t < end; ++t) {
                        int64_t count = 0;
                        for (int64_t pair = t * top_k; pair < (t + 1) * top_k; ++pair) {
                          if (source[pair] < 0) continue;
                          picked[count] = in + source[pair] * row_stride;
                          picked_weights[count++] = weights == nullptr ? Acc{1} : weights[pair];
                        }
                        microkernels<T>().weighted_sum(picked, picked_weights, count, result + t * hidden_size,
                                                       hidden_size);
                      }
                    });
  });
  return out;
}

std::tuple<Tensor, Tensor> unpermute_backward_cpu(const Tensor& grad_out_in, const Tensor& rows_in,
                                                  const Tensor& topk_weights, const Tensor& source_rows,
                                                  const Tensor& permuted_rows_in) {
  const Tensor grad_out = with_contiguous_rows(grad_out_in);
  const Tensor rows = with_contiguous_rows(rows_in);
  const Tensor permuted_rows = torch::stable::contiguous(permuted_rows_in);
  const int64_t num_rows = rows.size(0), hidden_size = rows.size(1);
  const int64_t num_tokens = permuted_rows.size(0), top_k = permuted_rows.size(1), num_pairs = num_tokens * top_k;
  MOE_CHECK(grad_out.size(0) == num_tokens && grad_out.size(1) == hidden_size && topk_weights.numel() == num_pairs &&
                grad_out.scalar_type() == rows.scalar_type() && source_rows.size(0) == num_rows && num_rows == num_pairs,
            "unpermute: the gradient must have the shape and dtype of the output");
  Tensor grad_rows = new_result(rows, {num_rows, hidden_size});
  Tensor grad_weights = torch::stable::new_empty(topk_weights, {num_tokens, top_k});
  const int32_t* permuted = data<int32_t>(permuted_rows);
  dispatch_float("unpermute", rows.scalar_type(), [&]<class T>() {
    using Acc = acc_t<T>;
    Scratch scratch;
    Acc* weights = scratch.take<Acc>(num_pairs);
    Acc* inner = scratch.take<Acc>(num_pairs);
    read_floats(topk_weights, weights);
    const T *grad = data<T>(grad_out), *in = data<T>(rows);
    T* out = mutable_data<T>(grad_rows);
    const int64_t grad_stride = grad_out.stride(0), row_stride = rows.stride(0);
    char* owned = scratch.take<char>(num_rows);  // rows that no pair owns get gradient zero
    fill_zero(owned, num_rows);
    for (int64_t pair = 0; pair < num_pairs; ++pair) {
      if (permuted[pair] < 0) continue;
      MOE_CHECK(permuted[pair] < num_rows && !owned[permuted[pair]], "unpermute: permuted_rows must be below num_permuted=",
                num_rows, " and each its own, got ", permuted[pair], "; make the plan with plan_dispatch");
      owned[permuted[pair]] = 1;
    }
    for (int64_t row = 0; row < num_rows; ++row)
      if (!owned[row]) fill_zero(out + row * hidden_size, hidden_size);
    parallel_ranges(num_tokens, rows_per_task(top_k * hidden_size * static_cast<int64_t>(sizeof(T))),
                    [&](int64_t begin, int64_t end) {
                      for (int64_t t = begin; t < end; ++t)
                        for (int64_t pair = t * top_k; pair < (t + 1) * top_k; ++pair) {
                          inner[pair] = 0;
                          if (permuted[pair] < 0) continue;
                          const T* grad_row = grad + t * grad_stride;
                          inner[pair] =
                              microkernels<T>().inner_product(grad_row, in + permuted[pair] * row_stride, hidden_size);
                          microkernels<T>().scale(grad_row, weights[pair], out + permuted[pair] * hidden_size,
                                                  hidden_size);
                        }
                    });
    write_floats(inner, grad_weights);
  });
  return {grad_rows, grad_weights};
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("plan_dispatch", TORCH_BOX(&moe::plan_dispatch_cpu));
  m.impl("permute", TORCH_BOX(&moe::permute_cpu));
  m.impl("unpermute", TORCH_BOX(&moe::unpermute_cpu));
  m.impl("unpermute_backward", TORCH_BOX(&moe::unpermute_backward_cpu));
}
