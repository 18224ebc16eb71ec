// Merging of experts' tensors on CUDA: one pass over the base and all experts, 16 bytes of each a thread.
// python/moe_kernels/ops/merge/recipe.py has the equations.
//
// An election needs all experts before any is added: its first pass keeps what it loaded in shared memory, 4 KiB an
// expert, where that is enough, else the second loads again. Products are rounded before they are added, as everywhere:
// CMakeLists.txt has this file compiled without contraction. Where an election may leave elements undecided, each block
// says how many, a second kernel adds that up, and the host waits.
#include <optional>
#include <tuple>
#include <vector>

#include "common/philox.h"
#include "microkernels/merge_table.h"
#include "ops/task_vector/decode_cuda.h"
#include "ops/task_vector/planes.cuh"

namespace moe {
namespace {

constexpr int kThreads = 256;
constexpr int kSumThreads = 1024;
constexpr size_t kMaxSharedBytes = 48 << 10;  // what every GPU gives without asking
constexpr size_t kBounds = 5, kFactors = 4;   // of an expert in the op's lists

// An expert's tensor, or the planes of a task vector, and what the merge does with it.
template <class T>
struct Expert {
  const uint64_t* planes;  // null: weights
  Elements<T> weights;
  acc_t<T> scale;
  MergeSource<acc_t<T>> source;
};

// 3.6 of the 4 KiB of parameters that every driver takes, in float64
constexpr int kMaxExperts = 30;

template <class T>
struct Models {
  Expert<T> experts[kMaxExperts];
  int count;
  Elements<T> base;  // data null: none
  bool keeps_loads;  // for the second pass
};

// Of each block of a launch: elements that wait for a zero_sign, and the sum of the signs of the election's sums.
struct Found {
  int64_t *undecided, *signs;  // null: nobody asks
};

// The random bits of kCount elements from `at` on, word i % 4 of a Philox block each.
template <int kCount>
__device__ __forceinline__ void random_bits(uint64_t key, int64_t at, uint32_t (&bits)[kCount]) {
#pragma unroll
  for (int e = 0; e < kCount; e += 4) {
    const uint64_t block = static_cast<uint64_t>(at + e) / 4;
    const PhiloxBlock random = philox({{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 0}},
                                static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
    if constexpr (kCount < 4) {  // half of a block
      bits[0] = at % 4 == 0 ? random.words[0] : random.words[2];
      bits[1] = at % 4 == 0 ? random.words[1] : random.words[3];
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) bits[e + i] = random.words[i];
    }
  }
}

__device__ __forceinline__ int32_t magnitude_bits(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffff;
}
__device__ __forceinline__ int32_t magnitude_bits(double x) { return magnitude_bits(static_cast<float>(x)); }

// x, or the nearest of 0 and kCount.
template <int kCount>
__device__ __forceinline__ int within(int64_t x) {
  return x < 0 ? 0 : x > kCount ? kCount : static_cast<int>(x);
}

template <class T>
using Terms = acc_t<T>[kVecElements<T>];

// before * t of the elements from `at` on that the expert keeps, rescaled, and 0 of the others.
template <class T>
__device__ __forceinline__ void keep_some(const MergeSource<acc_t<T>>& source, int64_t at, Terms<T>& t) {
  using Acc = acc_t<T>;
  constexpr int kVec = kVecElements<T>;
  // without bounds NaN stays; 32 bits hold all: with 64 a merge by TIES was twice the instructions
  if (source.lower > 0) {
    const int32_t lower = static_cast<int32_t>(source.lower);
    const int equals = within<kVec>(source.lower_end - at);  // of the vector, from the first on
#pragma unroll
    for (int e = 0; e < kVec; ++e)
      t[e] = magnitude_bits(t[e]) < lower + (e < equals ? 0 : 1) ? Acc(0) : t[e];
  }
  if (source.upper < INT32_MAX) {
    const int32_t upper = static_cast<int32_t>(source.upper);
    const int beyond = within<kVec>(source.upper_end - at);
#pragma unroll
    for (int e = 0; e < kVec; ++e)
      t[e] = magnitude_bits(t[e]) >= upper + (e < beyond ? 0 : 1) ? Acc(0) : t[e];
  }
  if (source.keep_below < uint64_t{1} << 32) {
    uint32_t bits[kVec];
    random_bits(source.key, at, bits);
    const uint32_t below = static_cast<uint32_t>(source.keep_below);
#pragma unroll
    for (int e = 0; e < kVec; ++e)
      t[e] = bits[e] < below ? t[e] : Acc(0);
  }
  if (source.rescale != 1) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) t[e] = t[e] / source.rescale;
  }
  if (source.before != 1) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) t[e] = t[e] * source.before;
  }
}

template <class T>
__device__ __forceinline__ void difference(const Vec<T, kVecElements<T>>& weights, const Terms<T>& base, Terms<T>& t) {
#pragma unroll
  for (int e = 0; e < kVecElements<T>; ++e) t[e] = to_acc(weights.values[e]) - base[e];
}

template <class T>
__device__ __forceinline__ void decode(const Expert<T>& expert, int64_t at, Terms<T>& t) {
  const uint64_t* planes = expert.planes + at / kTernaryGroup * 2;
  const int shift = static_cast<int>(at % kTernaryGroup);
  const uint32_t nonzero = static_cast<uint32_t>(planes[0] >> shift), negative = static_cast<uint32_t>(planes[1] >> shift);
#pragma unroll
  for (int e = 0; e < kVecElements<T>; ++e)
    t[e] = (nonzero >> e & 1) == 0 ? acc_t<T>(0) : negative >> e & 1 ? -expert.scale : expert.scale;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const __grid_constant__ Models<T> models, MergeRule<acc_t<T>> rule,
                 const int64_t* __restrict__ wanted,  // [blocks]: only those that are not 0; null: all
                 Elements<T> out, Found found) {
  using Acc = acc_t<T>;
  using V = Vec<T, kVecElements<T>>;
  constexpr int kVec = kVecElements<T>;
  if (wanted != nullptr && wanted[blockIdx.x] == 0) return;
  MOE_DYNAMIC_SHARED(V, kept);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + thread) * kVec;
  const bool inside = at < out.numel;  // the others take part in the block's sums, with zeros
  Acc base[kVec] = {}, t[kVec];
  if (models.base.data != nullptr) {
    const V weights = load_elements(models.base, at);
#pragma unroll
    for (int e = 0; e < kVec; ++e) base[e] = to_acc(weights.values[e]);
  }
  Acc sums[kVec] = {};  // of all experts; then what they elect
  if (rule.election != Election::none) {
    uint32_t some = 0;
    for (int k = 0; k < models.count; ++k) {
      if (models.experts[k].planes == nullptr) {
        const V weights = load_elements(models.experts[k].weights, at);
        if (models.keeps_loads) kept[k * kThreads + thread] = weights;
        difference<T>(weights, base, t);
      } else if (inside) {
        decode(models.experts[k], at, t);
      }
      if (!inside) continue;
      keep_some<T>(models.experts[k].source, at, t);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        sums[e] += t[e];
        some |= (t[e] != 0 ? 1u : 0u) << e;
      }
    }
    if (found.undecided != nullptr) {
      MOE_SHARED(int, of_warps, 2 * kThreads / kWarpSize);
      int undecided = 0, signs = 0;
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        undecided += sums[e] == 0 && (some >> e & 1);
        signs += (sums[e] > 0) - (sums[e] < 0);
      }
      undecided = warp_sum(undecided);
      signs = warp_sum(signs);
      if (thread % kWarpSize == 0) {
        of_warps[2 * (thread / kWarpSize)] = undecided;
        of_warps[2 * (thread / kWarpSize) + 1] = signs;
      }
      __syncthreads();
      if (thread < 2) {
        int sum = 0;
        for (int w = 0; w < kThreads / kWarpSize; ++w) sum += of_warps[2 * w + thread];
        (thread == 0 ? found.undecided : found.signs)[blockIdx.x] = sum;
      }
    }
    // 1 or -1, whose product with an entry says whether that agrees; 0 where nothing is elected
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      if (sums[e] == 0) sums[e] = rule.election == Election::sign_of_sum ? rule.zero_sign : Acc(1);
      sums[e] = sums[e] > 0 ? Acc(1) : sums[e] < 0 ? Acc(-1) : Acc(0);
    }
  }
  if (!inside) return;
  Acc total[kVec] = {}, divisor[kVec] = {};
  for (int k = 0; k < models.count; ++k) {
    const MergeSource<Acc>& source = models.experts[k].source;
    if (models.experts[k].planes != nullptr)
      decode(models.experts[k], at, t);
    else if (rule.election != Election::none && models.keeps_loads)
      difference<T>(kept[k * kThreads + thread], base, t);
    else
      difference<T>(load_elements(models.experts[k].weights, at), base, t);
    keep_some<T>(source, at, t);
    if (rule.election == Election::none) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) total[e] += t[e] * source.after;
      continue;
    }
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      const bool agrees = t[e] * sums[e] > 0;
      total[e] += agrees ? t[e] * source.after : t[e] == t[e] ? Acc(0) : t[e];  // NaN is not lost
      divisor[e] += agrees ? source.divisor : Acc(0);
    }
  }
  V result;
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    if (rule.divisor == Divisor::count)
      total[e] = total[e] / (divisor[e] < 1 ? Acc(1) : divisor[e]);
    else if (rule.divisor == Divisor::weights)
      total[e] = total[e] / (divisor[e] == 0 ? Acc(1) : divisor[e]);
    else if (rule.divisor == Divisor::constant)
      total[e] = total[e] / rule.constant;
    total[e] = total[e] * rule.lambda;
    if (models.base.data != nullptr) total[e] = base[e] + total[e];
    result.values[e] = from_acc<T>(total[e]);
  }
  store_elements(out, at, result);
}

// The sums of what the blocks found. One block.
__global__ void __launch_bounds__(kSumThreads) sum_found_kernel(Found found, int64_t num_blocks, int64_t* __restrict__ sums) {
  MOE_SHARED(int64_t, of_warps, 2 * kSumThreads / kWarpSize);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
  int64_t undecided = 0, signs = 0;
  for (int64_t block = thread; block < num_blocks; block += kSumThreads) {
    undecided += found.undecided[block];
    signs += found.signs[block];
  }
  undecided = warp_sum(undecided);
  signs = warp_sum(signs);
  if (thread % kWarpSize == 0) {
    of_warps[2 * warp] = undecided;
    of_warps[2 * warp + 1] = signs;
  }
  __syncthreads();
  if (thread >= 2) return;
  int64_t sum = 0;
  for (int w = 0; w < kSumThreads / kWarpSize; ++w) sum += of_warps[2 * w + thread];
  sums[thread] = sum;
}

// Of the experts, the base and the rule; the op's lists are those of python/moe_kernels/ops/merge/native.py.
struct Call {
  std::optional<Tensor> base;
  std::vector<Tensor> experts;
  std::vector<double> scales;
  std::vector<int64_t> bounds, keys;
  std::vector<double> factors;
  int64_t election, divisor;
  double constant;
  int64_t zero_sign;
  double lambda;

  const Tensor& like() const { return base ? *base : experts[0]; }
  template <class T>
  int64_t num_blocks() const {
    return ceil_div(like().numel(), int64_t{kThreads} * kVecElements<T>);
  }
};

// The models as the kernel takes them; tensors: the experts, packed ones unpacked.
template <class T>
Models<T> models_of(const Call& call, const std::vector<Tensor>& tensors) {
  using Acc = acc_t<T>;
  const Tensor& like = call.like();
  const size_t count = tensors.size();
  MOE_CHECK(count <= kMaxExperts, "merge: experts must be at most ", kMaxExperts, " on a GPU, got ", count,
            "; use backend='triton' or merge some of them first");
  MOE_CHECK(call.scales.size() == count && call.bounds.size() == count * kBounds && call.keys.size() == count &&
                call.factors.size() == count * kFactors,
            "merge: there must be scales, bounds, keys and factors for each expert");
  MOE_CHECK(!call.base || call.base->is_contiguous(), "merge: base must be contiguous");
  Models<T> models{.experts = {},
                   .count = static_cast<int>(count),
                   .base = call.base ? elements_of<T>(*call.base) : Elements<T>{nullptr, 0, false},
                   .keeps_loads = false};
  for (size_t k = 0; k < count; ++k) {
    const Tensor& tensor = tensors[k];
    const bool is_planes = tensor.scalar_type() == ScalarType::Long;
    MOE_CHECK(!is_planes || call.base, "merge: task vectors must have a base");
    MOE_CHECK(is_planes || (tensor.is_contiguous() && tensor.is_cpu() == like.is_cpu() && tensor.numel() == like.numel() &&
                            tensor.scalar_type() == like.scalar_type()),
              "merge: base and experts must be contiguous, of one shape and dtype, and on one device");
    const int64_t* bound = call.bounds.data() + k * kBounds;
    const double* factor = call.factors.data() + k * kFactors;
    models.experts[k] = {.planes = is_planes ? planes_of("merge", tensor, like.numel(), like) : nullptr,
                         .weights = is_planes ? Elements<T>{nullptr, 0, false} : elements_of<T>(tensor),
                         .scale = static_cast<Acc>(call.scales[k]),
                         .source = {.lower = bound[0],
                                    .lower_end = bound[1],
                                    .upper = bound[2],
                                    .upper_end = bound[3],
                                    .keep_below = static_cast<uint64_t>(bound[4]),
                                    .key = static_cast<uint64_t>(call.keys[k]),
                                    .rescale = static_cast<Acc>(factor[0]),
                                    .before = static_cast<Acc>(factor[1]),
                                    .after = static_cast<Acc>(factor[2]),
                                    .divisor = static_cast<Acc>(factor[3])}};
  }
  return models;
}

// Merges all blocks, or the wanted ones.
template <class T>
void run(const DeviceScope& scope, const Call& call, Tensor& out, const int64_t* wanted, const Found& found) {
  using Acc = acc_t<T>;
  const std::vector<Tensor> tensors = unpack_deltas("merge", call.experts, out.numel());
  Models<T> models = models_of<T>(call, tensors);
  if (out.numel() == 0) return;
  const MergeRule<Acc> rule{.election = static_cast<Election>(call.election),
                            .divisor = static_cast<Divisor>(call.divisor),
                            .constant = static_cast<Acc>(call.constant),
                            .zero_sign = static_cast<Acc>(call.zero_sign),
                            .lambda = static_cast<Acc>(call.lambda)};
  const size_t kept_bytes = tensors.size() * kThreads * 16;
  models.keeps_loads = rule.election != Election::none && kept_bytes <= kMaxSharedBytes;
  launch(scope, merge_kernel<T>, dim3(grid_size("merge", call.num_blocks<T>())), dim3(kThreads),
         models.keeps_loads ? kept_bytes : 0, models, rule, wanted, elements_of<T>(out), found);
}

// And, where elements wait for a zero_sign, how many in each block, for merge_ranges, and the sum of the signs.
std::tuple<Tensor, Tensor, int64_t> merge_cuda(std::optional<Tensor> base, std::vector<Tensor> experts,
                                               std::vector<double> scales, std::vector<int64_t> bounds,
                                               std::vector<int64_t> keys, std::vector<double> factors, int64_t election,
                                               int64_t divisor, double constant, int64_t zero_sign, double lambda) {
  MOE_CHECK(!experts.empty(), "merge: there must be an expert");
  const Call call{base, experts, scales, bounds, keys, factors, election, divisor, constant, zero_sign, lambda};
  const Tensor& like = call.like();
  const DeviceScope scope(like);
  Tensor out = torch::stable::new_empty(like, {like.numel()}, like.scalar_type());
  Tensor undecided = torch::stable::new_empty(like, {0}, ScalarType::Long);
  int64_t sum_of_signs = 0;
  dispatch_float("merge", like.scalar_type(), [&]<class T>() {
    if (election != static_cast<int64_t>(Election::sign_of_sum) || zero_sign != 0 || like.numel() == 0)
      return run<T>(scope, call, out, nullptr, {});
    const int64_t num_blocks = call.num_blocks<T>();
    Tensor counts = torch::stable::new_empty(like, {num_blocks}, ScalarType::Long);
    Tensor signs = torch::stable::new_empty(like, {num_blocks}, ScalarType::Long);
    Tensor sums = torch::stable::new_empty(like, {2}, ScalarType::Long);
    const Found found{mutable_data<int64_t>(counts), mutable_data<int64_t>(signs)};
    run<T>(scope, call, out, nullptr, found);
    launch(scope, sum_found_kernel, dim3(1), dim3(kSumThreads), 0, found, num_blocks, mutable_data<int64_t>(sums));
    struct Sums {
      int64_t undecided, signs;
    };
    const Sums totals = read_back(scope, reinterpret_cast<const Sums*>(data<int64_t>(sums)));
    sum_of_signs = totals.signs;
    if (totals.undecided > 0) undecided = counts;
  });
  return {out, undecided, sum_of_signs};
}

// The blocks of `out` again in which elements waited.
void merge_ranges_cuda(Tensor out, Tensor ranges, std::optional<Tensor> base, std::vector<Tensor> experts,
                       std::vector<double> scales, std::vector<int64_t> bounds, std::vector<int64_t> keys,
                       std::vector<double> factors, int64_t election, int64_t divisor, double constant, int64_t zero_sign,
                       double lambda) {
  MOE_CHECK(!experts.empty(), "merge: there must be an expert");
  const Call call{base, experts, scales, bounds, keys, factors, election, divisor, constant, zero_sign, lambda};
  const Tensor& like = call.like();
  MOE_CHECK(out.is_contiguous() && out.numel() == like.numel() && out.scalar_type() == like.scalar_type(),
            "merge: out must be contiguous, of the models' shape and dtype");
  const DeviceScope scope(like);
  dispatch_float("merge", like.scalar_type(), [&]<class T>() {
    MOE_CHECK(ranges.is_contiguous() && ranges.scalar_type() == ScalarType::Long && ranges.numel() == call.num_blocks<T>(),
              "merge: ranges must be what the merge returned");
    run<T>(scope, call, out, data<int64_t>(ranges), {});
  });
}

}  // namespace
}  // namespace moe

MOE_CUDA_LIBRARY(m) {
  m.impl("merge_experts", TORCH_BOX(&moe::merge_cuda));
  m.impl("merge_ranges", TORCH_BOX(&moe::merge_ranges_cuda));
}
