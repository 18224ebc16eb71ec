// Task vectors added to a weight in place, and taken away again, on the CPU.
//
//   apply    W' = round(W + sum_i value_i t_i) where any t_i is not zero
//   unapply  W from W', bit for bit, with what apply_undoable kept (UndoStream in microkernels/task_vector_table.h)
//
// One pass: every block of 4096 weights is read and written once, whatever the number of vectors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/parallel.h"
#include "common/workspace.h"
#include "ops/task_vector/task_vector.h"

namespace moe {
namespace {

constexpr int64_t kBlocksPerTask = 16;  // 128 KiB of bfloat16

void check_weight(const char* op, const Tensor& weight) {
  MOE_CHECK(weight.is_contiguous(), op, ": the weight must be contiguous");
}

void apply_cpu(Tensor weight, std::vector<Tensor> deltas, std::vector<double> values) {
  check_weight("apply_", weight);
  dispatch_float("apply_", weight.scalar_type(), [&]<class T>() {
    const TernarySources<acc_t<T>> sources("apply_", deltas, values, weight.numel());
    T* w = mutable_data<T>(weight);
    parallel_ranges(sources.num_blocks(), kBlocksPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        task_vector_kernels<T>().apply(w + b * kTernaryBlock, sources.block_size(b), sources.block(b), sources.count());
    });
    sources.check_whole("apply_");
  });
}

// Where the bits of each block begin: [num_blocks + 1], in words of one of the two strings.
template <class Acc>
Tensor string_offsets(const TernarySources<Acc>& sources, const Tensor& like) {
  Tensor offsets = torch::stable::new_empty(like, {sources.num_blocks() + 1}, ScalarType::Long);
  int64_t* words = mutable_data<int64_t>(offsets);
  parallel_ranges(sources.num_blocks(), kBlocksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) words[b + 1] = (sources.most_touched(b) + 63) / 64;
  });
  words[0] = 0;
  for (int64_t b = 0; b < sources.num_blocks(); ++b) words[b + 1] += words[b];
  return offsets;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> apply_undoable_cpu(Tensor weight, std::vector<Tensor> deltas,
                                                              std::vector<double> values) {
  check_weight("apply_", weight);
  Tensor offsets, strings, kept, kept_offsets;
  dispatch_float("apply_", weight.scalar_type(), [&]<class T>() {
    const TernarySources<acc_t<T>> sources("apply_", deltas, values, weight.numel());
    const int64_t num_blocks = sources.num_blocks();
    offsets = string_offsets(sources, weight);
    const int64_t* words = data<int64_t>(offsets);
    strings = torch::stable::new_empty(weight, {2, words[num_blocks]}, ScalarType::Long);
    uint64_t* moved = reinterpret_cast<uint64_t*>(mutable_data<int64_t>(strings));
    uint64_t* other = moved + words[num_blocks];
    kept_offsets = torch::stable::new_empty(weight, {num_blocks + 1}, ScalarType::Long);
    int64_t* kept_at = mutable_data<int64_t>(kept_offsets);
    std::vector<std::vector<T>> kept_of(static_cast<size_t>(num_blocks));
    T* w = mutable_data<T>(weight);
    parallel_ranges(num_blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
      T kept_here[kTernaryBlock];
      for (int64_t b = begin; b < end; ++b) {
        const int64_t size = words[b + 1] - words[b];
        fill_zero(moved + words[b], size);
        fill_zero(other + words[b], size);
        kept_at[b + 1] = task_vector_kernels<T>().apply_undoable(
            w + b * kTernaryBlock, sources.block_size(b), sources.block(b), sources.count(),
            {moved + words[b], other + words[b], kept_here});
        kept_of[static_cast<size_t>(b)].assign(kept_here, kept_here + kept_at[b + 1]);
      }
    });
    sources.check_whole("apply_");
    kept_at[0] = 0;
    for (int64_t b = 0; b < num_blocks; ++b) kept_at[b + 1] += kept_at[b];
    kept = torch::stable::new_empty(weight, {kept_at[num_blocks]});
    T* all = mutable_data<T>(kept);
    for (const std::vector<T>& block : kept_of) all = std::copy(block.begin(), block.end(), all);
  });
  return {offsets, strings, kept, kept_offsets};
}

void unapply_cpu(Tensor weight, std::vector<Tensor> deltas, std::vector<double> values, Tensor offsets, Tensor strings,
                 Tensor kept, Tensor kept_offsets) {
  check_weight("unapply_", weight);
  dispatch_float("unapply_", weight.scalar_type(), [&]<class T>() {
    const TernarySources<acc_t<T>> sources("unapply_", deltas, values, weight.numel());
    const int64_t num_blocks = sources.num_blocks();
    MOE_CHECK(offsets.numel() == num_blocks + 1 && kept_offsets.numel() == num_blocks + 1 && strings.dim() == 2 &&
                  kept.scalar_type() == weight.scalar_type(),
              "unapply_: the undo must be that of this weight");
    const int64_t *words = data<int64_t>(offsets), *kept_at = data<int64_t>(kept_offsets);
    const int64_t num_words = strings.size(1);
    for (int64_t b = 0; b < num_blocks; ++b)
      MOE_CHECK(words[b] >= 0 && words[b + 1] >= words[b] + (sources.most_touched(b) + 63) / 64 &&
                    words[b + 1] <= num_words && kept_at[b] >= 0 && kept_at[b + 1] >= kept_at[b] &&
                    kept_at[b + 1] <= kept.numel(),
                "unapply_: the undo must be that of these deltas");
    uint64_t* moved = reinterpret_cast<uint64_t*>(mutable_data<int64_t>(strings));
    T *w = mutable_data<T>(weight), *all = mutable_data<T>(kept);
    parallel_ranges(num_blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        task_vector_kernels<T>().unapply(
            w + b * kTernaryBlock, sources.block_size(b), sources.block(b), sources.count(),
            {moved + words[b], moved + num_words + words[b], all + kept_at[b]});
    });
    sources.check_whole("unapply_");
  });
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("apply_ternary", TORCH_BOX(&moe::apply_cpu));
  m.impl("apply_ternary_undoable", TORCH_BOX(&moe::apply_undoable_cpu));
  m.impl("unapply_ternary", TORCH_BOX(&moe::unapply_cpu));
}
