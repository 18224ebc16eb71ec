// Expert matrices in whatever layout they come, and one function that multiplies rows with a block of their columns.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <span>

#include "common/cpu_isa.h"
#include "common/dispatch.h"
#include "common/kept_memory.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "microkernels/table.h"
#include "ops/grouped_gemm/quantized_header.h"

namespace moe {

// expert_weights [num_experts, out, in], read in place: rows contiguous along in ("dot" layout), or along out ("outer"
// layout: transposed weights, and every matrix as its own gradient sees it), prepacked, or quantised. Any other strides
// are copied once a call.
template <class T>
struct ExpertMatrices {
  Tensor keep_alive;
  const T* data = nullptr;
  int64_t num_experts = 0, out = 0, in = 0;
  int64_t expert_stride = 0;
  bool dot_layout = true;
  int64_t row_stride = 0;                                     // dot: between outputs; outer: between inputs
  int64_t step_stride = 0, panel_rows = 0, panel_stride = 0;  // dot only
  int64_t num_splits = 1, split_stride = 0;                   // prepacked and quantised: gate and up lie apart
  std::optional<QuantizedHeader> header;                      // quantised only

  // Weights as they are; `transposed` exchanges out and in without touching memory.
  static ExpertMatrices view(const char* op, const Tensor& weights, bool transposed = false) {
    MOE_CHECK(weights.dim() == 3, op, ": expert weights must be of shape [num_experts, out, in]");
    const int o = transposed ? 2 : 1, i = transposed ? 1 : 2;
    ExpertMatrices matrices;
    const auto unit = [](const Tensor& w, int dim) { return w.stride(dim) == 1 || w.size(dim) <= 1; };
    matrices.keep_alive = unit(weights, 1) || unit(weights, 2) ? weights : torch::stable::contiguous(weights);
    const Tensor& w = matrices.keep_alive;
    matrices.data = moe::data<T>(w);
    matrices.num_experts = w.size(0);
    matrices.out = w.size(o);
    matrices.in = w.size(i);
    matrices.expert_stride = w.stride(0);
    // where both dimensions are contiguous (one of them has size 1) the other's stride is what counts
    matrices.dot_layout = unit(w, i) && !(w.size(i) <= 1 && w.size(o) > 1 && w.stride(o) == 1);
    matrices.row_stride = matrices.dot_layout ? w.stride(o) : w.stride(i);
    matrices.step_stride = microkernels<T>().dot_step;
    matrices.panel_rows = kPlain;
    return matrices;
  }

  // The layout of prepack: [num_experts, num_splits, panels, steps, panel_rows, step].
  static ExpertMatrices packed(const char* op, const Tensor& weights, int64_t out, int64_t in) {
    const Microkernels<T>& kernels = microkernels<T>();
    MOE_CHECK(weights.dim() == 6 && weights.size(5) == kernels.dot_step && weights.size(4) == kernels.dot_panel_rows, op,
              ": weights were prepacked for another instruction set or version; call prepack on this machine");
    ExpertMatrices matrices;
    matrices.keep_alive = torch::stable::contiguous(weights);
    const Tensor& w = matrices.keep_alive;
    matrices.data = moe::data<T>(w);
    matrices.num_experts = w.size(0);
    matrices.num_splits = w.size(1);
    matrices.out = out;
    matrices.in = in;
    matrices.expert_stride = w.stride(0);
    matrices.split_stride = w.stride(1);
    matrices.panel_rows = w.size(4);
    matrices.panel_stride = w.stride(2);
    matrices.step_stride = w.stride(3);
    matrices.row_stride = w.stride(4);
    MOE_CHECK(out % matrices.num_splits == 0 && w.size(2) * w.size(4) >= out / matrices.num_splits &&
                  w.size(3) * w.size(5) >= in,
              op, ": prepacked weights must hold [out=", out, ", in=", in, "]");
    return matrices;
  }

  // The layout of microkernels/quantized.h.
  static ExpertMatrices quantized(const char* op, const Tensor& weights) {
    MOE_CHECK(microkernels<T>().dot_quantized != nullptr, op,
              ": quantised weights must meet float32, bfloat16 or float16, not float64");
    ExpertMatrices matrices;
    matrices.keep_alive = torch::stable::contiguous(weights);
    matrices.header = QuantizedHeader::read(op, matrices.keep_alive);
    matrices.num_experts = weights.size(0);
    matrices.out = matrices.header->out;
    matrices.in = matrices.header->in;
    matrices.num_splits = matrices.header->num_splits;
    return matrices;
  }

  static ExpertMatrices of_any_layout(const char* op, const Tensor& weights, int64_t out, int64_t in) {
    if (is_quantized(weights)) return quantized(op, weights);
    return weights.dim() == 6 ? packed(op, weights, out, in) : view(op, weights);
  }

  // Rows of the one panel that a plain matrix is; more than any matrix has.
  static constexpr int64_t kPlain = int64_t{1} << 40;

  // Every block is a multiple of this many columns.
  static constexpr int64_t kBlockUnit = 16;

  // Columns of the result that one task computes, and tasks for every thread. Dot: the weights they read (bytes a column:
  // in * sizeof(T), at most a chunk) should stay in L2 beside the rows and the weights that are fetched for the next
  // task. Outer: see kOuterColumns.
  int64_t block(int64_t columns, int64_t other_tasks) const {
    const Microkernels<T>& kernels = microkernels<T>();
    const auto split = [&](int64_t block, int64_t down_to, int64_t wanted_tasks) {
      while (block > down_to && (columns + block - 1) / block * other_tasks < wanted_tasks) block = half_block(block);
      return block;
    };
    if (!dot_layout) {
      const int64_t block = split(2 * kOuterColumns, kOuterColumns, 16 * num_threads());
      return split(block, std::max(kBlockUnit, kernels.outer_panel), 2 * num_threads());
    }
    int64_t block = kernels.outer_max_block;
    // packing is repaid by 64 columns already; many tasks even out threads that other work holds up
    if (kernels.dot_packs || header) {
      const int64_t smallest = header ? kQuantizedPanel : std::max(kBlockUnit, kernels.outer_panel);
      return split(split(block, 64, 16 * num_threads()), smallest, 4 * num_threads());
    }
    const int64_t column_bytes = std::clamp<int64_t>(in * static_cast<int64_t>(sizeof(T)), 1, kDotChunkBytes);
    const int64_t fits = l2_bytes() * kWeightShare / 16 / column_bytes;
    block = std::clamp<int64_t>(fits / kBlockUnit * kBlockUnit, kBlockUnit, block);
    return split(block, kBlockUnit, 4 * num_threads());
  }
  // Rows of an outer layout are read in runs of a block's columns, each step's in a page of its own: narrow blocks come
  // back to every page many times, and looking a page up costs more than reading 256 bytes of it. (Zen 3, one thread,
  // backward of 2048 x 768 x 32 experts of 32 rows, fp32: blocks of 64 to 256 columns 41 GFLOP/s, of 512 and more 60.)
  static constexpr int64_t kOuterColumns = 512;
  // In sixteenths of L2. (Zen 4, 1 MiB of L2, shape 2048 x 5632 x 8 experts, 2048 tokens, bf16, one thread: 2.5, 5, 7.5,
  // 10 sixteenths give 154, 171, 189, 179 GFLOP/s.)
  static constexpr int64_t kWeightShare = 7;

  // Half a block, rounded up to whole units (dot) or panels (outer).
  int64_t half_block(int64_t block) const {
    const int64_t unit = header ? kQuantizedPanel : dot_layout ? kBlockUnit : std::max(kBlockUnit, microkernels<T>().outer_panel);
    return (block / 2 + unit - 1) / unit * unit;
  }

  // Rows that are multiplied together. Dot: they and their results stay in L2 beside the weights. Outer: as many as a
  // packed block of the weights serves.
  int64_t row_block() const { return dot_layout ? 96 : microkernels<T>().outer_max_block; }

  // Row stride of c for a block of n columns: outer writes whole panels.
  int64_t ldc(int64_t n) const {
    const int64_t panel = microkernels<T>().outer_panel;
    return dot_layout ? n : (n + panel - 1) / panel * panel;
  }

  // Columns [column, column + n) of the result, and where they go.
  struct Columns {
    int64_t column, n;
    acc_t<T>* c;
  };

  // c[r, j] = sum_i a[r][i] * W[expert][column + j][i] for num_rows rows (at most row_block()), j in [0, n), for each of
  // at most two ranges of columns (gate and up). `next`: blocks() of what the same thread will probably multiply next.
  void multiply(int64_t expert, const T* const* a, int64_t num_rows, std::span<const Columns> ranges, int64_t ldc,
                const DotBlocks<T>& next = {}) const {
    Scratch scratch;
    void* packed = scratch.take<char>(microkernels<T>().scratch_bytes);
    if (header) return multiply_quantized(expert, a, num_rows, ranges, ldc, packed);
    if (!dot_layout) {
      for (const Columns& range : ranges)
        microkernels<T>().outer(a, num_rows, data + expert * expert_stride + range.column, row_stride, range.n, in, range.c,
                                ldc, packed);
      return;
    }
    microkernels<T>().dot(a, num_rows, blocks(expert, ranges), in, ldc, next, packed);
  }

  // The blocks that make up the ranges: a range may straddle gate and up where they were packed apart. None but in the dot
  // layout: quantised weights are read as a stream, which needs no hint of what is next.
  DotBlocks<T> blocks(int64_t expert, std::span<const Columns> ranges) const {
    DotBlocks<T> all;
    if (!dot_layout || header) return all;
    const int64_t split_size = num_splits == 1 ? kPlain : out / num_splits;
    for (Columns range : ranges)
      while (range.n > 0) {
        const int64_t split = range.column / split_size, at = range.column - split * split_size;
        const int64_t here = std::min(range.n, split_size - at);
        all.blocks[all.num_blocks++] = {
            {data + expert * expert_stride + split * split_stride, row_stride, step_stride, panel_rows, panel_stride},
            at, here, range.c};
        range = {range.column + here, range.n - here, range.c + here};
      }
    return all;
  }

 private:
  // A range begins with a panel: callers take blocks of whole panels, gate and up apart.
  void multiply_quantized(int64_t expert, const T* const* a, int64_t num_rows, std::span<const Columns> ranges, int64_t ldc,
                          void* scratch) const {
    if constexpr (__is_same(acc_t<T>, float)) {
      QuantizedBlock blocks[kMaxDotBlocks];
      int64_t num_blocks = 0;
      for (const Columns& range : ranges) {
        const int64_t split = range.column / (out / num_splits), column = range.column - split * (out / num_splits);
        const uint8_t* bytes = moe::data<uint8_t>(keep_alive) + expert * keep_alive.stride(0);
        blocks[num_blocks++] = {header->matrix(bytes, split), column, range.n, range.c};
      }
      microkernels<T>().dot_quantized(a, num_rows, blocks, num_blocks, ldc, scratch);
    }
  }
};

// Rows of one expert that one task takes, so that one hot expert is shared among threads.
constexpr int64_t kRowsPerTask = 512;

struct ExpertTask {
  int32_t expert;
  int32_t row_begin, row_end;  // permuted rows
  int64_t column;
};

// Tasks over (expert, rows, columns): consecutive tasks share an expert's rows. Experts without rows have none.
// Writes at most the returned number; call with tasks == nullptr to count.
inline int64_t expert_tasks(const int32_t* expert_offsets, int64_t num_experts, int64_t columns, int64_t block,
                            ExpertTask* tasks) {
  int64_t count = 0;
  for (int64_t e = 0; e < num_experts; ++e)
    for (int64_t row = expert_offsets[e]; row < expert_offsets[e + 1]; row += kRowsPerTask)
      for (int64_t column = 0; column < columns; column += block, ++count)
        if (tasks != nullptr)
          tasks[count] = {static_cast<int32_t>(e), static_cast<int32_t>(row),
                          static_cast<int32_t>(std::min<int64_t>(expert_offsets[e + 1], row + kRowsPerTask)), column};
  return count;
}

// Runs f(part, next) over (expert, rows, columns [column, column + block)), where a part is a task's rows, at most
// row_block of them. `next` is the task that the same thread will probably take next; null where that is not near.
template <class F>
void over_expert_tasks(const int32_t* expert_offsets, int64_t num_experts, int64_t columns, int64_t block,
                       int64_t row_block, const F& f) {
  Scratch scratch;
  const int64_t num_tasks = expert_tasks(expert_offsets, num_experts, columns, block, nullptr);
  ExpertTask* tasks = scratch.take<ExpertTask>(num_tasks);
  expert_tasks(expert_offsets, num_experts, columns, block, tasks);
  parallel_tasks(num_tasks, [&](int64_t i) {
    ExpertTask part = tasks[i];
    const int64_t num_rows = part.row_end - part.row_begin, num_parts = (num_rows + row_block - 1) / row_block;
    for (int64_t p = 0; p < num_parts; ++p) {  // of nearly equal height
      part.row_begin = tasks[i].row_begin + static_cast<int32_t>(p * num_rows / num_parts);
      part.row_end = tasks[i].row_begin + static_cast<int32_t>((p + 1) * num_rows / num_parts);
      f(part, p + 1 == num_parts && i + num_threads() < num_tasks ? tasks + i + num_threads() : nullptr);
    }
  });
}

inline void check_offsets(const char* op, const int32_t* offsets, int64_t num_experts, int64_t num_rows) {
  MOE_CHECK(offsets[0] == 0, op, ": expert_offsets must start at 0, got ", offsets[0]);
  for (int64_t e = 0; e < num_experts; ++e)
    MOE_CHECK(offsets[e] <= offsets[e + 1], op, ": expert_offsets must never fall, got ", offsets[e], " and then ",
              offsets[e + 1], " for expert ", e);
  MOE_CHECK(offsets[num_experts] <= num_rows, op, ": expert_offsets must end at or below num_permuted=", num_rows,
            ", got ", offsets[num_experts]);
}

// grad_weights[e] = sum over e's rows of grad_out[r] (x) rows[r], in memory [e, out, in] or, transposed, [e, in, out].
// grad_rows and input_rows hold a pointer for each permuted row.
template <class T>
void weight_grad(const int32_t* expert_offsets, int64_t num_experts, int64_t out_features, int64_t in_features,
                 bool transposed, const T* const* grad_rows, const T* const* input_rows, T* grad_weights) {
  const Microkernels<T>& kernels = microkernels<T>();
  if (transposed) {
    std::swap(out_features, in_features);
    std::swap(grad_rows, input_rows);
  }
  const int64_t block = kernels.outer_max_block;
  // a gradient that no cache holds
  const bool stream = num_experts * out_features * in_features * static_cast<int64_t>(sizeof(T)) > (int64_t{64} << 20);
  const int64_t blocks_out = (out_features + block - 1) / block, blocks_in = (in_features + block - 1) / block;
  parallel_tasks(num_experts * blocks_out * blocks_in, [&](int64_t task) {
    const int64_t expert = task / (blocks_out * blocks_in);
    const int64_t i = task / blocks_in % blocks_out * block, j = task % blocks_in * block;
    const int64_t begin = expert_offsets[expert], num_rows = expert_offsets[expert + 1] - begin;
    Scratch scratch;
    void* packed = scratch.take<char>(kernels.scratch_bytes);
    kernels.weight_grad(grad_rows + begin, i, std::min(block, out_features - i), input_rows + begin, j,
                        std::min(block, in_features - j), num_rows,
                        grad_weights + (expert * out_features + i) * in_features + j, in_features, stream, packed);
  });
}

// grad_bias[e] = sum over e's rows of weights[r] * grad_rows[r]; weights may be null (all 1).
template <class T>
void bias_grad(const int32_t* expert_offsets, int64_t num_experts, int64_t out_features, const T* const* grad_rows,
               const acc_t<T>* weights, T* grad_bias) {
  parallel_tasks(num_experts, [&](int64_t expert) {
    const int64_t begin = expert_offsets[expert], num_rows = expert_offsets[expert + 1] - begin;
    Scratch scratch;
    acc_t<T>* row_weights = scratch.take<acc_t<T>>(num_rows);
    for (int64_t row = 0; row < num_rows; ++row) row_weights[row] = weights == nullptr ? 1 : weights[begin + row];
    microkernels<T>().weighted_sum(grad_rows + begin, row_weights, num_rows, grad_bias + expert * out_features,
                                   out_features);
  });
}

// [num_experts, out, in] with the memory order of the weights it belongs to.
inline Tensor new_weight_grad(const Tensor& like, int64_t num_experts, int64_t out_features, int64_t in_features,
                              bool transposed) {
  if (transposed) std::swap(out_features, in_features);
  const Tensor grad = new_result(like, {num_experts, out_features, in_features});
  return transposed ? torch::stable::transpose(grad, 1, 2) : grad;
}

inline bool is_transposed(const Tensor& weights) { return weights.stride(1) == 1 && weights.stride(2) != 1; }

}  // namespace moe
