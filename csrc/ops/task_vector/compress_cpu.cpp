// What a dense difference keeps, on the CPU: its largest magnitudes.
//
// Finding the k largest of n magnitudes takes two histograms (their high 16 bits, then the low 15 of those that share the
// threshold's high ones): two passes over the tensor, no copy of it, exact. t = tensor - base is made block by block.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "common/parallel.h"
#include "common/workspace.h"
#include "ops/task_vector/differences.h"

namespace moe {
namespace {

constexpr int64_t kBlocksPerTask = 16;
constexpr int64_t kHighCounts = int64_t{1} << 16, kLowCounts = int64_t{1} << kLowBits;
constexpr int64_t kHistogramBlocks = 1024;  // 4M elements into one 32-bit histogram

const TernaryCodecKernels& codec() { return task_vector_kernel_table().codec; }

// Adds what `count(t, n, counts)` counts in each block into [size] int64.
template <class F>
Tensor histogram(const Tensor& tensor, const std::optional<Tensor>& base, int64_t size, const F& count) {
  Tensor counts = torch::stable::new_empty(tensor, {size}, ScalarType::Long);
  int64_t* totals = mutable_data<int64_t>(counts);
  fill_zero(totals, size);
  dispatch_float("compress", tensor.scalar_type(), [&]<class T>() {
    const Differences<T> differences("compress", tensor, base);
    // whole numbers: the order in which threads add theirs does not matter
    parallel_ranges(differences.num_blocks(), kHistogramBlocks, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      uint32_t* here = scratch.take<uint32_t>(size);
      float* buffer = scratch.take<float>(kTernaryBlock);
      fill_zero(here, size);
      for (int64_t b = begin; b < end; ++b) count(differences.block(b, buffer), differences.size(b), here);
      for (int64_t i = 0; i < size; ++i)
        if (here[i] != 0) __atomic_fetch_add(&totals[i], here[i], __ATOMIC_RELAXED);
    });
  });
  return counts;
}

// prefix < 0: how often each high half of a magnitude's bits occurs; else how often each low one beside that high one.
Tensor count_magnitudes_cpu(Tensor tensor, std::optional<Tensor> base, int64_t prefix) {
  return histogram(tensor, base, prefix < 0 ? kHighCounts : kLowCounts, [&](const float* t, int64_t n, uint32_t* counts) {
    if (prefix < 0)
      codec().count_magnitudes(t, n, counts);
    else
      codec().count_low_magnitudes(t, n, static_cast<uint32_t>(prefix), counts);
  });
}

// The first of these for the high halves from `first` to `last`; the others are summed up in the bins beside those.
Tensor count_window_cpu(Tensor tensor, std::optional<Tensor> base, int64_t first, int64_t last) {
  MOE_CHECK(0 <= first && first <= last && last + 1 < (0x7f800000 >> kLowBits), "compress: no such window of magnitudes");
  return histogram(tensor, base, kHighCounts, [&](const float* t, int64_t n, uint32_t* counts) {
    codec().count_window(t, n, static_cast<int32_t>(first), static_cast<int32_t>(last), counts);
  });
}

// [sum, sum of squares] in float64, in one order whatever the threads and the instruction set
Tensor moments_cpu(Tensor tensor, std::optional<Tensor> base) {
  Tensor result = torch::stable::new_empty(tensor, {2}, ScalarType::Double);
  double* out = mutable_data<double>(result);
  dispatch_float("compress", tensor.scalar_type(), [&]<class T>() {
    const Differences<T> differences("compress", tensor, base);
    Scratch scratch;
    const int64_t num_tasks = (differences.num_blocks() + kBlocksPerTask - 1) / kBlocksPerTask;
    double* partial = scratch.take<double>(num_tasks * 2 * kMomentLanes);
    fill_zero(partial, num_tasks * 2 * kMomentLanes);
    parallel_tasks(num_tasks, [&](int64_t task) {
      float buffer[kTernaryBlock];
      const int64_t end = std::min(differences.num_blocks(), (task + 1) * kBlocksPerTask);
      for (int64_t b = task * kBlocksPerTask; b < end; ++b)
        codec().add_moments(differences.block(b, buffer), differences.size(b), partial + task * 2 * kMomentLanes);
    });
    out[0] = out[1] = 0;
    for (int64_t i = 0; i < num_tasks * 2 * kMomentLanes; ++i) out[i / kMomentLanes % 2] += partial[i];
  });
  return result;
}

// Planes of the elements whose magnitude's bits are above the threshold, and of the first num_ties that are just that.
Tensor select_ternary_cpu(Tensor tensor, std::optional<Tensor> base, int64_t threshold, int64_t num_ties) {
  const int64_t groups = (tensor.numel() + kTernaryGroup - 1) / kTernaryGroup;
  constexpr int64_t kWords = kTernaryBlock / kTernaryGroup * 2;
  Tensor planes = torch::stable::new_empty(tensor, {groups, 2}, ScalarType::Long);
  uint64_t* words = reinterpret_cast<uint64_t*>(mutable_data<int64_t>(planes));
  MOE_CHECK(threshold >= 0 && threshold < (int64_t{1} << 31), "compress: threshold must be the bits of a magnitude");
  dispatch_float("compress", tensor.scalar_type(), [&]<class T>() {
    const Differences<T> differences("compress", tensor, base);
    const int64_t num_blocks = differences.num_blocks();
    Scratch scratch;
    int64_t* ties = scratch.take<int64_t>(num_blocks);
    const auto select = [&](int64_t b, bool equal, uint64_t* out) {
      float buffer[kTernaryBlock];
      return codec().select_ternary(differences.block(b, buffer), differences.size(b), static_cast<uint32_t>(threshold),
                                    equal, out);
    };
    parallel_ranges(num_blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) ties[b] = select(b, false, words + b * kWords);
    });
    int64_t left = num_ties;
    for (int64_t b = 0; b < num_blocks; ++b) left -= ties[b] = std::min(ties[b], left);
    parallel_ranges(num_blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        if (ties[b] == 0) continue;
        uint64_t equal[kWords];
        select(b, true, equal);
        const int64_t last = (differences.size(b) + kTernaryGroup - 1) / kTernaryGroup;
        for (int64_t g = 0, wanted = ties[b]; g < last && wanted > 0; ++g) {
          uint64_t nonzero = equal[2 * g], chosen = 0;
          for (; nonzero != 0 && wanted > 0; nonzero &= nonzero - 1, --wanted) chosen |= nonzero & -nonzero;
          words[b * kWords + 2 * g] |= chosen;
          words[b * kWords + 2 * g + 1] |= equal[2 * g + 1] & chosen;
        }
      }
    });
  });
  return planes;
}

// The index after the num_ties-th element whose magnitude has just these bits.
int64_t end_of_ties_cpu(Tensor tensor, std::optional<Tensor> base, int64_t threshold, int64_t num_ties) {
  int64_t end = tensor.numel();
  dispatch_float("compress", tensor.scalar_type(), [&]<class T>() {
    const Differences<T> differences("compress", tensor, base);
    Scratch scratch;
    int64_t* ties = scratch.take<int64_t>(differences.num_blocks());
    uint64_t planes[kTernaryBlock / kTernaryGroup * 2];
    const auto select = [&](int64_t b, uint64_t* out) {
      float buffer[kTernaryBlock];
      return codec().select_ternary(differences.block(b, buffer), differences.size(b), static_cast<uint32_t>(threshold),
                                    true, out);
    };
    parallel_ranges(differences.num_blocks(), kBlocksPerTask, [&](int64_t begin, int64_t last) {
      uint64_t here[kTernaryBlock / kTernaryGroup * 2];
      for (int64_t b = begin; b < last; ++b) ties[b] = select(b, here);
    });
    int64_t left = num_ties;
    for (int64_t b = 0; b < differences.num_blocks(); left -= ties[b++]) {
      if (ties[b] < left) continue;
      select(b, planes);
      for (int64_t g = 0; left > 0; ++g)
        for (uint64_t word = planes[2 * g]; word != 0 && left > 0; word &= word - 1, --left)
          end = b * kTernaryBlock + g * kTernaryGroup + __builtin_ctzll(word) + 1;
      break;
    }
  });
  return end;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("count_magnitudes", TORCH_BOX(&moe::count_magnitudes_cpu));
  m.impl("count_window", TORCH_BOX(&moe::count_window_cpu));
  m.impl("delta_moments", TORCH_BOX(&moe::moments_cpu));
  m.impl("select_ternary", TORCH_BOX(&moe::select_ternary_cpu));
  m.impl("end_of_ties", TORCH_BOX(&moe::end_of_ties_cpu));
}
