// Merging of experts' tensors on the CPU: one pass over the base and all experts, a block of 1024 elements at a time;
// nothing is allocated but the result. python/moe_kernels/ops/merge/recipe.py has the equations.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/kept_memory.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "microkernels/merge_table.h"

namespace moe {
namespace {

constexpr int64_t kBlocksPerTask = 64;
constexpr int64_t kBounds = 5;   // lower, lower_end, upper, upper_end, keep_below
constexpr int64_t kFactors = 4;  // rescale, before, after, divisor

template <class T>
struct Call {
  const T* base;
  std::vector<const T*> experts;
  std::vector<MergeSource<acc_t<T>>> sources;
  int64_t numel;

  Call(const std::optional<Tensor>& base_in, const std::vector<Tensor>& tensors, const std::vector<int64_t>& bounds,
       const std::vector<int64_t>& keys, const std::vector<double>& factors)
      : base(base_in ? data<T>(*base_in) : nullptr), numel(tensors.empty() ? 0 : tensors[0].numel()) {
    const size_t count = tensors.size();
    MOE_CHECK(count > 0 && bounds.size() == count * kBounds && factors.size() == count * kFactors && keys.size() == count,
              "merge: there must be bounds, keys and factors for each expert");
    MOE_CHECK(!base_in || (base_in->is_contiguous() && base_in->numel() == numel &&
                           base_in->scalar_type() == tensors[0].scalar_type()),
              "merge: base must be contiguous, of the experts' shape and dtype");
    for (size_t k = 0; k < count; ++k) {
      MOE_CHECK(tensors[k].is_contiguous() && tensors[k].numel() == numel &&
                    tensors[k].scalar_type() == tensors[0].scalar_type(),
                "merge: experts must be contiguous, of one shape and dtype");
      experts.push_back(data<T>(tensors[k]));
      const int64_t* bound = bounds.data() + k * kBounds;
      const double* factor = factors.data() + k * kFactors;
      using Acc = acc_t<T>;
      sources.push_back({.lower = bound[0],
                         .lower_end = bound[1],
                         .upper = bound[2],
                         .upper_end = bound[3],
                         .keep_below = static_cast<uint64_t>(bound[4]),
                         .key = static_cast<uint64_t>(keys[k]),
                         .rescale = static_cast<Acc>(factor[0]),
                         .before = static_cast<Acc>(factor[1]),
                         .after = static_cast<Acc>(factor[2]),
                         .divisor = static_cast<Acc>(factor[3])});
    }
  }

  int64_t num_blocks() const { return (numel + kMergeBlock - 1) / kMergeBlock; }
  int64_t size(int64_t block) const { return std::min(kMergeBlock, numel - block * kMergeBlock); }
};

// The sum of what the kernel returns; writes the merged tensor where there is an `out`.
template <class T>
int64_t run(const Call<T>& call, const MergeRule<acc_t<T>>& rule, T* out) {
  std::atomic<int64_t> sum{0};
  const int64_t count = static_cast<int64_t>(call.sources.size());
  parallel_ranges(call.num_blocks(), kBlocksPerTask, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    acc_t<T>* deltas = scratch.take<acc_t<T>>(count * kMergeBlock);
    int64_t here = 0;
    for (int64_t b = begin; b < end; ++b)
      here += merge_kernels<T>().merge(call.base, call.experts.data(), b * kMergeBlock, call.size(b), call.sources.data(),
                                       count, rule, deltas, out);
    sum += here;
  });
  return sum;
}

// And how many elements wait for a zero_sign.
std::tuple<Tensor, int64_t> merge_cpu(std::optional<Tensor> base, std::vector<Tensor> experts, std::vector<int64_t> bounds,
                 std::vector<int64_t> keys, std::vector<double> factors, int64_t election, int64_t divisor,
                 double constant, int64_t zero_sign, double lambda) {
  MOE_CHECK(!experts.empty(), "merge: there must be an expert");
  Tensor out = new_result(experts[0], {experts[0].numel()});
  int64_t undecided = 0;
  dispatch_float("merge", experts[0].scalar_type(), [&]<class T>() {
    using Acc = acc_t<T>;
    const Call<T> call(base, experts, bounds, keys, factors);
    undecided = run<T>(
        call,
           {.election = static_cast<Election>(election),
            .divisor = static_cast<Divisor>(divisor),
            .constant = static_cast<Acc>(constant),
            .zero_sign = static_cast<Acc>(zero_sign),
            .lambda = static_cast<Acc>(lambda)},
           mutable_data<T>(out));
  });
  return {out, undecided};
}

// Sum over all elements of the sign of the experts' sum.
int64_t elected_signs_cpu(std::optional<Tensor> base, std::vector<Tensor> experts, std::vector<int64_t> bounds,
                          std::vector<int64_t> keys, std::vector<double> factors) {
  MOE_CHECK(!experts.empty(), "merge: there must be an expert");
  int64_t signs = 0;
  dispatch_float("merge", experts[0].scalar_type(), [&]<class T>() {
    const Call<T> call(base, experts, bounds, keys, factors);
    signs = run<T>(call, {Election::sign_of_sum, Divisor::one, 1, 0, 1}, nullptr);
  });
  return signs;
}

// [num_experts, 2] float64: sums of |t|, over all elements and over those that are kept, without rescaling
Tensor kept_magnitudes_cpu(std::optional<Tensor> base, std::vector<Tensor> experts, std::vector<int64_t> bounds,
                           std::vector<int64_t> keys, std::vector<double> factors) {
  MOE_CHECK(!experts.empty(), "merge: there must be an expert");
  const int64_t count = static_cast<int64_t>(experts.size());
  Tensor result = torch::stable::new_empty(experts[0], {count, 2}, ScalarType::Double);
  dispatch_float("merge", experts[0].scalar_type(), [&]<class T>() {
    const Call<T> call(base, experts, bounds, keys, factors);
    const int64_t num_tasks = (call.num_blocks() + kBlocksPerTask - 1) / kBlocksPerTask;
    for (int64_t k = 0; k < count; ++k) {
      Scratch scratch;
      double* partial = scratch.take<double>(2 * num_tasks);
      fill_zero(partial, 2 * num_tasks);
      parallel_tasks(num_tasks, [&](int64_t task) {
        const int64_t end = std::min(call.num_blocks(), (task + 1) * kBlocksPerTask);
        const auto expert = static_cast<size_t>(k);
        for (int64_t b = task * kBlocksPerTask; b < end; ++b)
          merge_kernels<T>().magnitudes(call.base, call.experts[expert], b * kMergeBlock, call.size(b),
                                        call.sources[expert], partial + 2 * task);
      });
      double* sums = mutable_data<double>(result) + 2 * k;
      sums[0] = sums[1] = 0;
      for (int64_t i = 0; i < 2 * num_tasks; ++i) sums[i % 2] += partial[i];
    }
  });
  return result;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("merge", TORCH_BOX(&moe::merge_cpu));
  m.impl("elected_signs", TORCH_BOX(&moe::elected_signs_cpu));
  m.impl("kept_magnitudes", TORCH_BOX(&moe::kept_magnitudes_cpu));
}
