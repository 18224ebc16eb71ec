// Merging of experts' tensors on the CPU: one pass over the base and all experts, a block of 1024 elements at a time;
// nothing is allocated but the result. Experts may be task vectors, which stay compressed. python/moe_kernels/ops/merge/recipe.py has the equations.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <deque>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/kept_memory.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "microkernels/merge_table.h"
#include "ops/task_vector/task_vector.h"

namespace moe {
namespace {

constexpr int64_t kBlocksPerTask = 64;
constexpr int64_t kBounds = 5;   // lower, lower_end, upper, upper_end, keep_below
constexpr int64_t kFactors = 4;  // rescale, before, after, divisor

// A call's tensors: weights, or task vectors (planes or packed) that are decoded a block of the packed format at a time.
template <class T>
struct Call {
  using Acc = acc_t<T>;
  const T* base;
  int64_t numel;
  std::vector<const T*> experts;            // null: a task vector
  std::deque<TernarySources<Acc>> vectors;  // of one each; they do not move
  std::vector<size_t> vector_of;            // the expert that each of them is
  std::vector<MergeSource<Acc>> sources;

  // scales: of the task vectors
  Call(const std::optional<Tensor>& base_in, const std::vector<Tensor>& tensors, const std::vector<double>& scales,
       const std::vector<int64_t>& bounds, const std::vector<int64_t>& keys, const std::vector<double>& factors)
      : base(base_in ? data<T>(*base_in) : nullptr), numel(base_in ? base_in->numel() : tensors[0].numel()) {
    const size_t count = tensors.size();
    MOE_CHECK(bounds.size() == count * kBounds && factors.size() == count * kFactors && keys.size() == count &&
                  scales.size() == count,
              "merge: there must be scales, bounds, keys and factors for each expert");
    MOE_CHECK(!base_in || base_in->is_contiguous(), "merge: base must be contiguous");
    const ScalarType dtype = (base_in ? *base_in : tensors[0]).scalar_type();
    for (size_t k = 0; k < count; ++k) {
      if (is_task_vector(tensors[k])) {
        MOE_CHECK(base_in, "merge: task vectors must have a base");
        experts.push_back(nullptr);
        vectors.emplace_back("merge", std::vector<Tensor>{tensors[k]}, std::vector<double>{scales[k]}, numel);
        vector_of.push_back(k);
      } else {
        MOE_CHECK(tensors[k].is_contiguous() && tensors[k].numel() == numel && tensors[k].scalar_type() == dtype,
                  "merge: base and experts must be contiguous, of one shape and dtype");
        experts.push_back(data<T>(tensors[k]));
      }
      const int64_t* bound = bounds.data() + k * kBounds;
      const double* factor = factors.data() + k * kFactors;
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

  static bool is_task_vector(const Tensor& tensor) {
    return tensor.scalar_type() == ScalarType::Byte || tensor.scalar_type() == ScalarType::Long;
  }

  int64_t num_blocks() const { return (numel + kMergeBlock - 1) / kMergeBlock; }

  // Calls each(experts, first element, count) for blocks [begin, end), which are whole blocks of the packed format.
  template <class F>
  void blocks(int64_t begin, int64_t end, const F& each) const {
    Scratch scratch;
    MergeExpert<T>* here = scratch.take<MergeExpert<T>>(static_cast<int64_t>(experts.size()));
    Acc* given = scratch.take<Acc>(static_cast<int64_t>(vectors.size()) * kTernaryBlock);
    for (size_t k = 0; k < experts.size(); ++k) here[k] = {experts[k], nullptr};
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kMergeBlock, inside = first % kTernaryBlock;
      for (size_t v = 0; v < vectors.size(); ++v) {
        Acc* t = given + static_cast<int64_t>(v) * kTernaryBlock;
        if (inside == 0) {  // value t added to zeros is itself
          const int64_t size = vectors[v].block_size(first / kTernaryBlock);
          fill_zero(t, size);
          task_vector_kernels<Acc>().apply(t, size, vectors[v].block(first / kTernaryBlock), 1);
        }
        here[vector_of[v]].given = t + inside;
      }
      each(here, first, std::min(kMergeBlock, numel - first));
    }
  }

  void check_whole() const {
    for (const auto& vector : vectors) vector.check_whole("merge");
  }
};
static_assert(kBlocksPerTask * kMergeBlock % kTernaryBlock == 0);

// What a run over a tensor finds.
struct Found {
  std::vector<int64_t> undecided;  // ranges of kBlocksPerTask blocks in which an element waits for a zero_sign
  int64_t signs = 0;               // sum of the signs of the election's sums
};

// Runs over all ranges of blocks, or over some; writes the merged tensor where there is an `out`.
template <class T>
Found run(const Call<T>& call, const MergeRule<acc_t<T>>& rule, T* out, bool counts_signs,
          const std::vector<int64_t>* ranges = nullptr) {
  Found found;
  std::mutex lock;
  const int64_t count = static_cast<int64_t>(call.sources.size());
  const int64_t all = (call.num_blocks() + kBlocksPerTask - 1) / kBlocksPerTask;
  parallel_tasks(ranges == nullptr ? all : static_cast<int64_t>(ranges->size()), [&](int64_t task) {
    const int64_t range = ranges == nullptr ? task : (*ranges)[static_cast<size_t>(task)];
    Scratch scratch;
    acc_t<T>* deltas = scratch.take<acc_t<T>>(count * kMergeBlock);
    int64_t undecided = 0, signs = 0;
    const int64_t begin = range * kBlocksPerTask, end = std::min(begin + kBlocksPerTask, call.num_blocks());
    call.blocks(begin, end, [&](const MergeExpert<T>* experts, int64_t first, int64_t n) {
      undecided += merge_kernels<T>().merge(call.base, experts, first, n, call.sources.data(), count, rule, deltas, out,
                                            counts_signs ? &signs : nullptr);
    });
    const std::lock_guard guard(lock);
    found.signs += signs;
    if (undecided > 0) found.undecided.push_back(range);
  });
  call.check_whole();
  return found;
}

// What the result is like: task vectors have no dtype of weights.
const Tensor& like(const std::optional<Tensor>& base, const std::vector<Tensor>& experts) {
  MOE_CHECK(!experts.empty(), "merge: there must be an expert");
  return base ? *base : experts[0];
}

template <class Acc>
MergeRule<Acc> rule_of(int64_t election, int64_t divisor, double constant, int64_t zero_sign, double lambda) {
  return {.election = static_cast<Election>(election),
          .divisor = static_cast<Divisor>(divisor),
          .constant = static_cast<Acc>(constant),
          .zero_sign = static_cast<Acc>(zero_sign),
          .lambda = static_cast<Acc>(lambda)};
}

// And the ranges of elements that wait for a zero_sign, for merge_ranges, and the sum of the signs where it is wanted.
std::tuple<Tensor, Tensor, int64_t> merge_cpu(std::optional<Tensor> base, std::vector<Tensor> experts,
                                              std::vector<double> scales, std::vector<int64_t> bounds,
                                              std::vector<int64_t> keys, std::vector<double> factors, int64_t election,
                                              int64_t divisor, double constant, int64_t zero_sign, double lambda) {
  const Tensor& model = like(base, experts);
  Tensor out = new_result(model, {model.numel()}), undecided;
  int64_t signs = 0;
  dispatch_float("merge", model.scalar_type(), [&]<class T>() {
    const Call<T> call(base, experts, scales, bounds, keys, factors);
    const auto rule = rule_of<acc_t<T>>(election, divisor, constant, zero_sign, lambda);
    const bool waits = rule.election == Election::sign_of_sum && zero_sign == 0;
    const Found found = run<T>(call, rule, mutable_data<T>(out), waits);
    signs = found.signs;
    undecided = torch::stable::new_empty(model, {static_cast<int64_t>(found.undecided.size())}, ScalarType::Long);
    std::copy(found.undecided.begin(), found.undecided.end(), mutable_data<int64_t>(undecided));
  });
  return {out, undecided, signs};
}

// Those ranges of `out` again.
void merge_ranges_cpu(Tensor out, Tensor ranges, std::optional<Tensor> base, std::vector<Tensor> experts,
                      std::vector<double> scales, std::vector<int64_t> bounds, std::vector<int64_t> keys,
                      std::vector<double> factors, int64_t election, int64_t divisor, double constant,
                      int64_t zero_sign, double lambda) {
  const Tensor& model = like(base, experts);
  MOE_CHECK(out.is_contiguous() && out.numel() == model.numel() && out.scalar_type() == model.scalar_type(),
            "merge: out must be contiguous, of the models' shape and dtype");
  dispatch_float("merge", model.scalar_type(), [&]<class T>() {
    const Call<T> call(base, experts, scales, bounds, keys, factors);
    const int64_t* first = data<int64_t>(ranges);
    const std::vector<int64_t> wanted(first, first + ranges.numel());
    for (const int64_t range : wanted)
      MOE_CHECK(range >= 0 && range * kBlocksPerTask < call.num_blocks(), "merge: no such range of elements");
    run<T>(call, rule_of<acc_t<T>>(election, divisor, constant, zero_sign, lambda), mutable_data<T>(out), false, &wanted);
  });
}

// Sum over all elements of the sign of the experts' sum.
int64_t elected_signs_cpu(std::optional<Tensor> base, std::vector<Tensor> experts, std::vector<double> scales,
                          std::vector<int64_t> bounds, std::vector<int64_t> keys, std::vector<double> factors) {
  int64_t signs = 0;
  dispatch_float("merge", like(base, experts).scalar_type(), [&]<class T>() {
    const Call<T> call(base, experts, scales, bounds, keys, factors);
    signs = run<T>(call, {Election::sign_of_sum, Divisor::one, 1, 1, 1}, nullptr, true).signs;
  });
  return signs;
}

// [num_experts, 2] float64: sums of |t|, over all elements and over those that are kept, without rescaling
Tensor kept_magnitudes_cpu(std::optional<Tensor> base, std::vector<Tensor> experts, std::vector<double> scales,
                           std::vector<int64_t> bounds, std::vector<int64_t> keys, std::vector<double> factors) {
  const int64_t count = static_cast<int64_t>(experts.size());
  Tensor result = torch::stable::new_empty(like(base, experts), {count, 2}, ScalarType::Double);
  dispatch_float("merge", like(base, experts).scalar_type(), [&]<class T>() {
    const Call<T> call(base, experts, scales, bounds, keys, factors);
    const int64_t num_tasks = (call.num_blocks() + kBlocksPerTask - 1) / kBlocksPerTask;
    Scratch scratch;
    double* partial = scratch.take<double>(2 * num_tasks * count);
    fill_zero(partial, 2 * num_tasks * count);
    parallel_tasks(num_tasks, [&](int64_t task) {
      const int64_t end = std::min(call.num_blocks(), (task + 1) * kBlocksPerTask);
      call.blocks(task * kBlocksPerTask, end, [&](const MergeExpert<T>* here, int64_t first, int64_t n) {
        for (int64_t k = 0; k < count; ++k)
          merge_kernels<T>().magnitudes(call.base, here[k], first, n, call.sources[static_cast<size_t>(k)],
                                        partial + 2 * (k * num_tasks + task));
      });
    });
    call.check_whole();
    for (int64_t k = 0; k < count; ++k) {
      double* sums = mutable_data<double>(result) + 2 * k;
      sums[0] = sums[1] = 0;
      for (int64_t i = 0; i < 2 * num_tasks; ++i) sums[i % 2] += partial[2 * k * num_tasks + i];
    }
  });
  return result;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("merge_experts", TORCH_BOX(&moe::merge_cpu));
  m.impl("merge_ranges", TORCH_BOX(&moe::merge_ranges_cpu));
  m.impl("elected_signs", TORCH_BOX(&moe::elected_signs_cpu));
  m.impl("kept_magnitudes", TORCH_BOX(&moe::kept_magnitudes_cpu));
}
