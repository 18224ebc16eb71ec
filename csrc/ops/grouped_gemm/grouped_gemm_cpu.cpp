// grouped_gemm, its gradients and prepack on the CPU.
#include <torch/csrc/stable/library.h>

#include "ops/grouped_gemm/grouped_gemm.h"

namespace moe {
namespace {

template <class T>
const T** row_pointers(Scratch& scratch, const Tensor& rows) {
  const T** pointers = scratch.take<const T*>(rows.size(0));
  const T* first = data<T>(rows);
  for (int64_t row = 0; row < rows.size(0); ++row) pointers[row] = first + row * rows.stride(0);
  return pointers;
}

Tensor grouped_gemm_cpu(const Tensor& rows_in, const Tensor& expert_weights, const Tensor& expert_offsets,
                        const std::optional<Tensor>& bias_in, int64_t out_features) {
  const Tensor rows = with_contiguous_rows(rows_in);
  const Tensor offsets = torch::stable::contiguous(expert_offsets);
  MOE_CHECK(rows.dim() == 2 && offsets.scalar_type() == ScalarType::Int &&
                (is_quantized(expert_weights) || expert_weights.scalar_type() == rows.scalar_type()),
            "grouped_gemm: rows must be 2-dimensional, of the dtype of expert_weights, and expert_offsets int32");
  const int64_t num_rows = rows.size(0), num_experts = expert_weights.size(0);
  MOE_CHECK(offsets.numel() == num_experts + 1, "grouped_gemm: expert_offsets must be of shape [num_experts + 1]");
  const int32_t* offset = data<int32_t>(offsets);
  check_offsets("grouped_gemm", offset, num_experts, num_rows);
  std::optional<Tensor> bias;
  if (bias_in) bias = torch::stable::contiguous(*bias_in);
  MOE_CHECK(!bias || (bias->numel() == num_experts * out_features && bias->scalar_type() == rows.scalar_type()),
            "grouped_gemm: bias must be of shape [num_experts, out] and the dtype of rows");
  Tensor out = new_result(rows, {num_rows, out_features});
  dispatch_float("grouped_gemm", rows.scalar_type(), [&]<class T>() {
    const auto weights = ExpertMatrices<T>::of_any_layout("grouped_gemm", expert_weights, out_features, rows.size(1));
    MOE_CHECK(weights.in == rows.size(1) && weights.out == out_features && !(weights.header && weights.num_splits > 1),
              "grouped_gemm: expert_weights must be of shape [num_experts, out, in=", rows.size(1), "], not split");
    Scratch scratch;
    const T* const* a = row_pointers<T>(scratch, rows);
    const int64_t row_tasks = expert_tasks(offset, num_experts, 1, 1, nullptr);
    const int64_t block = weights.block(out_features, row_tasks);
    T* result = mutable_data<T>(out);
    using Columns = typename ExpertMatrices<T>::Columns;
    const auto width = [&](const ExpertTask& task) { return std::min(block, out_features - task.column); };
    over_expert_tasks(
        offset, num_experts, out_features, block, weights.row_block(), [&](const ExpertTask& part, const ExpertTask* next) {
          const int64_t n = width(part), ldc = weights.ldc(n), height = part.row_end - part.row_begin;
          Scratch task_scratch;
          acc_t<T>* c = task_scratch.take<acc_t<T>>(height * ldc);
          const Columns columns[] = {{part.column, n, c}};
          DotBlocks<T> next_blocks;
          if (next != nullptr) {
            const Columns next_columns[] = {{next->column, width(*next), nullptr}};
            next_blocks = weights.blocks(next->expert, next_columns);
          }
          weights.multiply(part.expert, a + part.row_begin, height, columns, ldc, next_blocks);
          const T* expert_bias = bias ? data<T>(*bias) + part.expert * out_features + part.column : nullptr;
          for (int64_t r = 0; r < height; ++r)
            microkernels<T>().store_row(c + r * ldc, expert_bias,
                                        result + (part.row_begin + r) * out_features + part.column, n);
        });
    fill_zero(result + offset[num_experts] * out_features, (num_rows - offset[num_experts]) * out_features);
  });
  return out;
}

Tensor grouped_gemm_weight_grad_cpu(const Tensor& grad_out_in, const Tensor& rows_in, const Tensor& expert_offsets,
                                    bool transposed) {
  const Tensor grad_out = with_contiguous_rows(grad_out_in), rows = with_contiguous_rows(rows_in);
  const Tensor offsets = torch::stable::contiguous(expert_offsets);
  const int64_t num_experts = offsets.numel() - 1;
  MOE_CHECK(grad_out.dim() == 2 && rows.dim() == 2 && grad_out.size(0) == rows.size(0) &&
                grad_out.scalar_type() == rows.scalar_type() && offsets.scalar_type() == ScalarType::Int,
            "grouped_gemm: the gradient must have the shape and dtype of the output");
  check_offsets("grouped_gemm", data<int32_t>(offsets), num_experts, rows.size(0));
  Tensor grad_weights = new_weight_grad(rows, num_experts, grad_out.size(1), rows.size(1), transposed);
  dispatch_float("grouped_gemm", rows.scalar_type(), [&]<class T>() {
    Scratch scratch;
    weight_grad(data<int32_t>(offsets), num_experts, grad_out.size(1), rows.size(1), transposed,
                row_pointers<T>(scratch, grad_out), row_pointers<T>(scratch, rows), mutable_data<T>(grad_weights));
  });
  return grad_weights;
}

Tensor grouped_gemm_bias_grad_cpu(const Tensor& grad_out_in, const Tensor& expert_offsets) {
  const Tensor grad_out = with_contiguous_rows(grad_out_in);
  const Tensor offsets = torch::stable::contiguous(expert_offsets);
  const int64_t num_experts = offsets.numel() - 1;
  MOE_CHECK(grad_out.dim() == 2 && offsets.scalar_type() == ScalarType::Int,
            "grouped_gemm: the gradient must have the shape of the output");
  check_offsets("grouped_gemm", data<int32_t>(offsets), num_experts, grad_out.size(0));
  Tensor grad_bias = torch::stable::new_empty(grad_out, {num_experts, grad_out.size(1)});
  dispatch_float("grouped_gemm", grad_out.scalar_type(), [&]<class T>() {
    Scratch scratch;
    bias_grad<T>(data<int32_t>(offsets), num_experts, grad_out.size(1), row_pointers<T>(scratch, grad_out), nullptr,
                 mutable_data<T>(grad_bias));
  });
  return grad_bias;
}

// data[e, s, p, step, r, i] = weights[e, row(s, p * panel_rows + r), step * dot_step + i], zero past the edges
Tensor prepack_cpu(const Tensor& expert_weights, int64_t num_splits, bool interleaved) {
  MOE_CHECK(expert_weights.dim() == 3 && (num_splits == 1 || num_splits == 2) && expert_weights.size(1) % num_splits == 0,
            "prepack: expert_weights must be of shape [num_experts, out, in] with out a multiple of num_splits");
  const int64_t num_experts = expert_weights.size(0), split = expert_weights.size(1) / num_splits;
  const int64_t in = expert_weights.size(2);
  Tensor packed;
  dispatch_float("prepack", expert_weights.scalar_type(), [&]<class T>() {
    const int64_t step = microkernels<T>().dot_step, panel_rows = microkernels<T>().dot_panel_rows;
    const int64_t panels = (split + panel_rows - 1) / panel_rows, steps = (in + step - 1) / step;
    packed = new_result(expert_weights, {num_experts, num_splits, panels, steps, panel_rows, step});
    const T* weights = data<T>(expert_weights);
    const int64_t expert_stride = expert_weights.stride(0), row_stride = expert_weights.stride(1),
                  column_stride = expert_weights.stride(2);
    T* out = mutable_data<T>(packed);
    parallel_tasks(num_experts * num_splits * panels, [&](int64_t task) {
      const int64_t expert = task / (num_splits * panels), s = task / panels % num_splits, panel = task % panels;
      T* panel_out = out + task * steps * panel_rows * step;
      fill_zero(panel_out, steps * panel_rows * step);
      for (int64_t r = 0; r < std::min(panel_rows, split - panel * panel_rows); ++r) {
        const int64_t at = panel * panel_rows + r, row = interleaved ? at * num_splits + s : s * split + at;
        const T* row_in = weights + expert * expert_stride + row * row_stride;
        for (int64_t k = 0; k < in; ++k)
          panel_out[(k / step * panel_rows + r) * step + k % step] = row_in[k * column_stride];
      }
    });
  });
  return packed;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("grouped_gemm", TORCH_BOX(&moe::grouped_gemm_cpu));
  m.impl("grouped_gemm_weight_grad", TORCH_BOX(&moe::grouped_gemm_weight_grad_cpu));
  m.impl("grouped_gemm_bias_grad", TORCH_BOX(&moe::grouped_gemm_bias_grad_cpu));
  m.impl("prepack", TORCH_BOX(&moe::prepack_cpu));
}
