// route, route_weights and their gradient on CUDA. One warp routes one token: expert e lives in lane e % 32, its logit is
// read once and stays in registers (rows of more than 512 experts in a workspace), picks are warp-wide maxima. Nothing of
// size [num_tokens, num_experts] is written, except by the gradient. Sums run over lanes in one fixed tree.
// python/moe_kernels/ops/route has the equations.
#include <limits>
#include <optional>
#include <tuple>

#include "common/vec.cuh"

namespace moe {
namespace {

constexpr int kWarps = 4;  // tokens of a block
// Blocks that must fit on a multiprocessor: without a number ptxas aims at fewer registers than there are, and spills.
template <class Acc>
constexpr int kMinBlocks = sizeof(Acc) == 8 ? 2 : 4;
constexpr double kEpsilon = 1e-20;  // as in reference.py
constexpr int64_t kMaxSharedBytes = 48 << 10;  // what every GPU gives without asking

template <class Acc>
constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
template <class Acc>
constexpr Acc kNaN = std::numeric_limits<Acc>::quiet_NaN();

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// One value for each expert of the token, spread over the lanes of its warp: in kPerLane registers of each, or in memory.
template <class Acc, int kPerLane>
struct Row {
  Acc values[kPerLane];
  __device__ __forceinline__ Row(Acc*, int64_t, int, int) {}
  __device__ __forceinline__ int size() const { return kPerLane; }
  __device__ __forceinline__ Acc& operator[](int i) { return values[i]; }
};
template <class Acc>
struct Row<Acc, 0> {
  Acc* first;
  int count;
  __device__ __forceinline__ Row(Acc* workspace, int64_t token, int num_experts, int lane)
      : first(workspace + token * ((num_experts + kWarpSize - 1) / kWarpSize * kWarpSize) + lane),
        count((num_experts + kWarpSize - 1) / kWarpSize) {}
  __device__ __forceinline__ int size() const { return count; }
  __device__ __forceinline__ Acc& operator[](int i) { return first[i * kWarpSize]; }
};

template <class T>
struct Logits {
  const T* data;  // [num_tokens, num_experts]
  int64_t token_stride, expert_stride, num_tokens;
  int num_experts;
  bool sigmoid;

  __device__ __forceinline__ acc_t<T> load(int64_t token, int expert) const {
    return to_acc(data[token * token_stride + expert * expert_stride]);
  }
};

// What turns a logit into a score.
template <class Acc>
struct Scores {
  bool routable;  // some logit above -inf, and neither NaN nor +inf
  bool sigmoid;
  Acc max, scale;  // of the softmax

  __device__ __forceinline__ Acc operator()(Acc logit) const {
    return sigmoid ? Acc{1} / (Acc{1} + exponential(-logit)) : exponential(logit - max) * scale;
  }
};

// Fills `row` with the token's logits, -inf past the last expert.
template <class T, int kPerLane>
__device__ __forceinline__ Scores<acc_t<T>> load_row(const Logits<T>& logits, int64_t token, Row<acc_t<T>, kPerLane>& row) {
  using Acc = acc_t<T>;
  const int lane = static_cast<int>(threadIdx.x);
  bool broken = false;
  Acc max = -kInfinity<Acc>;
#pragma unroll
  for (int i = 0; i < row.size(); ++i) {
    const int e = i * kWarpSize + lane;
    const Acc x = e < logits.num_experts ? logits.load(token, e) : -kInfinity<Acc>;
    broken |= !(x < kInfinity<Acc>);
    max = x > max ? x : max;
    row[i] = x;
  }
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    const Acc other = __shfl_xor_sync(kAllLanes, max, lanes);
    max = other > max ? other : max;
  }
  Scores<Acc> scores{!__any_sync(kAllLanes, broken) && max > -kInfinity<Acc>, logits.sigmoid, max, Acc{0}};
  if (scores.routable && !scores.sigmoid) {
    Acc sum = 0;
#pragma unroll
    for (int i = 0; i < row.size(); ++i) sum += exponential(row[i] - max);
    scores.scale = Acc{1} / warp_sum(sum);
  }
  return scores;
}

// A value and who holds it; the larger value wins, the lower id among equals.
template <class Acc>
struct Best {
  Acc value;
  int id;
  __device__ __forceinline__ void offer(Acc other, int other_id) {
    if (other > value || (other == value && other_id < id)) value = other, id = other_id;
  }
  __device__ __forceinline__ void over_warp() {
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
      const Acc other = __shfl_xor_sync(kAllLanes, value, lanes);
      const int other_id = __shfl_xor_sync(kAllLanes, id, lanes);
      offer(other, other_id);
    }
  }
};
constexpr int kNobody = 0x7fffffff;

// Puts -inf where the expert's group is not among the topk_groups best. group_scores: shared, one for each group.
template <class Acc, int kPerLane>
__device__ __forceinline__ void keep_best_groups(Row<Acc, kPerLane>& choice, Acc* group_scores, int num_experts,
                                                 int num_groups, int topk_groups, bool top2_sum) {
  const int lane = static_cast<int>(threadIdx.x), size = num_experts / num_groups;
  for (int group = 0; group < num_groups; ++group) {
    Acc first = -kInfinity<Acc>, second = -kInfinity<Acc>;
#pragma unroll
    for (int i = 0; i < choice.size(); ++i) {
      const int e = i * kWarpSize + lane;
      if (e < group * size || e >= (group + 1) * size) continue;
      const Acc x = choice[i];
      second = x > first ? first : x > second ? x : second;
      first = x > first ? x : first;
    }
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
      const Acc other_first = __shfl_xor_sync(kAllLanes, first, lanes);
      const Acc other_second = __shfl_xor_sync(kAllLanes, second, lanes);
      const Acc lower = first < other_first ? first : other_first;
      const Acc upper_second = second > other_second ? second : other_second;
      first = first > other_first ? first : other_first;
      second = lower > upper_second ? lower : upper_second;
    }
    // an expert that is forced by a bias of +inf forces its group, whatever stands beside it
    if (lane == 0) group_scores[group] = top2_sum && size > 1 && first < kInfinity<Acc> ? first + second : first;
  }
  __syncwarp();
  // a chosen group's score becomes NaN; groups at -inf fill up, lowest first
  for (int round = 0; round < topk_groups; ++round) {
    Best<Acc> best{-kInfinity<Acc>, kNobody};
    for (int group = lane; group < num_groups; group += kWarpSize) best.offer(group_scores[group], group);
    best.over_warp();
    if (best.id % kWarpSize == lane) group_scores[best.id] = kNaN<Acc>;
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < choice.size(); ++i) {
    const int e = i * kWarpSize + lane;
    if (e >= num_experts) continue;
    const Acc group_score = group_scores[e / size];
    if (group_score == group_score) choice[i] = -kInfinity<Acc>;
  }
}

template <class T, int kPerLane>
__global__ void __launch_bounds__(kWarps* kWarpSize, kMinBlocks<acc_t<T>>)
    route_kernel(Logits<T> logits, FloatsRef expert_bias,                 // [num_experts] or null
                 acc_t<T>* __restrict__ workspace,                        // [num_tokens, num_experts], where kPerLane is 0
                 int32_t* __restrict__ topk_ids,                          // [num_tokens, top_k]
                 acc_t<T>* __restrict__ topk_weights,                     // [num_tokens, top_k]
                 int top_k, bool renormalize, double scaling_factor, int num_groups, int topk_groups, bool top2_sum,
                 int num_null_experts) {
  using Acc = acc_t<T>;
  MOE_DYNAMIC_SHARED(Acc, all_group_scores);  // [kWarps, num_groups], where groups are limited
  const int lane = static_cast<int>(threadIdx.x), num_experts = logits.num_experts;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (token >= logits.num_tokens) return;
  Row<Acc, kPerLane> row(workspace, token, num_experts, lane);
  const Scores<Acc> scores = load_row(logits, token, row);
  int32_t* const ids = topk_ids + token * top_k;
  Acc* const weights = topk_weights + token * top_k;
  Acc sum = 0;
  int found = 0;
  if (scores.routable) {
#pragma unroll
    for (int i = 0; i < row.size(); ++i) {  // the logits become the choice
      const int e = i * kWarpSize + lane;
      if (!(row[i] > -kInfinity<Acc>)) continue;
      const Acc bias = expert_bias.data == nullptr ? Acc{0} : expert_bias.load<Acc>(0, e);
      row[i] = bias == bias ? scores(row[i]) + bias : -kInfinity<Acc>;
    }
    if (topk_groups < num_groups)
      keep_best_groups(row, all_group_scores + threadIdx.y * num_groups, num_experts, num_groups, topk_groups, top2_sum);
    for (; found < top_k; ++found) {
      Best<Acc> best{-kInfinity<Acc>, kNobody};
#pragma unroll
      for (int i = 0; i < row.size(); ++i)
        if (row[i] > best.value) best = {row[i], i * kWarpSize + lane};
      best.over_warp();
      if (best.id == kNobody) break;
#pragma unroll
      for (int i = 0; i < row.size(); ++i)
        if (best.id == i * kWarpSize + lane) row[i] = -kInfinity<Acc>;
      const Acc weight = best.id < num_experts - num_null_experts ? scores(logits.load(token, best.id)) : Acc{0};
      sum += weight;
      if (found % kWarpSize == lane) {
        ids[found] = best.id;
        weights[found] = weight;
      }
    }
  }
  for (int k = lane; k < top_k; k += kWarpSize) {  // each lane goes on with what it wrote
    if (k >= found) ids[k] = -1;
    const Acc weight = k < found ? weights[k] : Acc{0};
    weights[k] = (renormalize ? weight / (sum + static_cast<Acc>(kEpsilon)) : weight) * static_cast<Acc>(scaling_factor);
  }
}

// Weights of experts that something else chose.
template <class T, int kPerLane>
__global__ void __launch_bounds__(kWarps* kWarpSize, kMinBlocks<acc_t<T>>)
    route_weights_kernel(Logits<T> logits, const int32_t* __restrict__ topk_ids,  // [num_tokens, top_k]
                         acc_t<T>* __restrict__ workspace,                        // as in route_kernel
                         acc_t<T>* __restrict__ topk_weights,                     // [num_tokens, top_k]
                         int top_k, bool renormalize, double scaling_factor) {
  using Acc = acc_t<T>;
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (token >= logits.num_tokens) return;
  Row<Acc, kPerLane> row(workspace, token, logits.num_experts, lane);
  const Scores<Acc> scores = load_row(logits, token, row);
  const auto weight_of = [&](int k) {
    const int id = topk_ids[token * top_k + k];
    return scores.routable && id >= 0 && id < logits.num_experts ? scores(logits.load(token, id)) : Acc{0};
  };
  Acc sum = 0;
  if (renormalize)
    for (int k = 0; k < top_k; ++k) sum += weight_of(k);
  for (int k = lane; k < top_k; k += kWarpSize) {
    const Acc weight = weight_of(k);
    topk_weights[token * top_k + k] =
        (renormalize ? weight / (sum + static_cast<Acc>(kEpsilon)) : weight) * static_cast<Acc>(scaling_factor);
  }
}

template <class T, int kPerLane>
__global__ void __launch_bounds__(kWarps* kWarpSize, kMinBlocks<acc_t<T>>)
    route_bwd_kernel(Logits<T> logits, const int32_t* __restrict__ topk_ids,  // [num_tokens, top_k]
                     const acc_t<T>* __restrict__ grad_weights,               // [num_tokens, top_k]
                     acc_t<T>* __restrict__ workspace,                        // as in route_kernel
                     T* __restrict__ grad_logits,                             // [num_tokens, num_experts]
                     int top_k, bool renormalize, double scaling_factor, int num_weighed) {
  using Acc = acc_t<T>;
  const int lane = static_cast<int>(threadIdx.x), num_experts = logits.num_experts;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (token >= logits.num_tokens) return;
  Row<Acc, kPerLane> row(workspace, token, num_experts, lane);
  const Scores<Acc> scores = load_row(logits, token, row);
  const int32_t* const ids = topk_ids + token * top_k;
  const Acc* const grads = grad_weights + token * top_k;
  const auto weighs = [&](int id) { return scores.routable && id >= 0 && id < num_weighed; };
  Acc sum = static_cast<Acc>(kEpsilon), inner_weights = 0;
  bool any = false;
  if (renormalize)
    for (int k = 0; k < top_k; ++k)
      if (weighs(ids[k])) {
        const Acc score = scores(logits.load(token, ids[k]));
        sum += score;
        inner_weights += grads[k] * score;
      }
  const auto grad_score = [&](int k) {
    return (renormalize ? (grads[k] - inner_weights / sum) / sum : grads[k]) * static_cast<Acc>(scaling_factor);
  };
  Acc inner = 0;
  for (int k = 0; k < top_k; ++k)
    if (weighs(ids[k])) {
      any = true;
      inner += grad_score(k) * scores(logits.load(token, ids[k]));
    }
#pragma unroll
  for (int i = 0; i < row.size(); ++i) {
    const int e = i * kWarpSize + lane;
    if (e >= num_experts) continue;
    Acc grad = 0;
    if (any) {
      for (int k = 0; k < top_k; ++k)
        if (ids[k] == e && weighs(e)) grad += grad_score(k);
      const Acc score = scores(row[i]);
      grad = scores.sigmoid ? grad * score * (Acc{1} - score) : score * (grad - inner);
    }
    grad_logits[token * num_experts + e] = from_acc<T>(grad);
  }
}

// Calls f with the registers of a lane that hold a row of num_experts, 0 where the row goes to the workspace.
template <class F>
void dispatch_row(int64_t num_experts, F&& f) {
  if (num_experts <= 2 * kWarpSize)
    f.template operator()<2>();
  else if (num_experts <= 8 * kWarpSize)
    f.template operator()<8>();
  else if (num_experts <= 16 * kWarpSize)
    f.template operator()<16>();
  else
    f.template operator()<0>();
}

template <class Acc>
constexpr ScalarType kAccDtype = sizeof(Acc) == 8 ? ScalarType::Double : ScalarType::Float;

template <class Acc>
Tensor make_workspace(const Tensor& logits, int per_lane) {
  const int64_t padded = ceil_div(logits.size(1), kWarpSize) * kWarpSize;
  return torch::stable::new_empty(logits, {per_lane == 0 ? logits.size(0) * padded : 0}, kAccDtype<Acc>);
}

template <class T>
Logits<T> logits_of(const Tensor& logits, int64_t score) {
  return {data<T>(logits), logits.stride(0), logits.stride(1), logits.size(0), static_cast<int>(logits.size(1)), score == 1};
}

dim3 grid_of(const Tensor& logits) { return dim3(grid_size("route", ceil_div(logits.size(0), kWarps))); }

std::tuple<Tensor, Tensor> route_cuda(const Tensor& logits, const std::optional<Tensor>& expert_bias, int64_t top_k,
                                      int64_t score, bool renormalize, double scaling_factor, int64_t num_groups,
                                      int64_t topk_groups, int64_t group_score, int64_t num_null_experts) {
  MOE_CHECK(logits.dim() == 2, "route: logits must be of shape [num_tokens, num_experts]");
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  MOE_CHECK(num_experts < (int64_t{1} << 31) - 512, "route: num_experts must be below 2**31 - 512, got ", num_experts);
  MOE_CHECK(top_k >= 0 && top_k <= num_experts, "route: top_k must be in [0, num_experts=", num_experts, "], got ", top_k);
  MOE_CHECK(num_groups >= 1 && num_experts % num_groups == 0 && topk_groups >= 1 && topk_groups <= num_groups,
            "route: num_groups must divide num_experts and topk_groups be in [1, num_groups]");
  MOE_CHECK(!expert_bias || expert_bias->numel() == num_experts, "route: expert_bias must be of shape [num_experts]");
  const DeviceScope scope(logits);
  const bool is_double = logits.scalar_type() == ScalarType::Double;
  Tensor topk_ids = torch::stable::new_empty(logits, {num_tokens, top_k}, ScalarType::Int);
  Tensor topk_weights =
      torch::stable::new_empty(logits, {num_tokens, top_k}, is_double ? ScalarType::Double : ScalarType::Float);
  if (num_tokens == 0 || top_k == 0) return {topk_ids, topk_weights};
  dispatch_float("route", logits.scalar_type(), [&]<class T>() {
    using Acc = acc_t<T>;
    const int64_t shared = topk_groups < num_groups ? kWarps * num_groups * static_cast<int64_t>(sizeof(Acc)) : 0;
    MOE_CHECK(shared <= kMaxSharedBytes, "route: num_groups must be at most ", kMaxSharedBytes / (kWarps * sizeof(Acc)),
              " on CUDA where topk_groups limits them, got ", num_groups, "; use backend='reference'");
    dispatch_row(num_experts, [&]<int kPerLane>() {
      const Tensor workspace = make_workspace<Acc>(logits, kPerLane);
      launch(scope, route_kernel<T, kPerLane>, grid_of(logits), dim3(kWarpSize, kWarps), static_cast<size_t>(shared),
             logits_of<T>(logits, score), expert_bias ? floats_ref(*expert_bias) : FloatsRef{}, mutable_data<Acc>(workspace),
             mutable_data<int32_t>(topk_ids), mutable_data<Acc>(topk_weights), static_cast<int>(top_k), renormalize,
             scaling_factor, static_cast<int>(num_groups), static_cast<int>(topk_groups), group_score == 1,
             static_cast<int>(num_null_experts));
    });
  });
  return {topk_ids, topk_weights};
}

Tensor route_weights_cuda(const Tensor& logits, const Tensor& topk_ids_in, int64_t score, bool renormalize,
                          double scaling_factor) {
  const Tensor topk_ids = torch::stable::contiguous(topk_ids_in);
  const int64_t num_tokens = logits.size(0), top_k = topk_ids.size(1);
  MOE_CHECK(topk_ids.size(0) == num_tokens && topk_ids.scalar_type() == ScalarType::Int,
            "route_weights: topk_ids must be int32 of shape [num_tokens=", num_tokens, ", top_k]");
  const DeviceScope scope(logits);
  const bool is_double = logits.scalar_type() == ScalarType::Double;
  Tensor topk_weights =
      torch::stable::new_empty(logits, {num_tokens, top_k}, is_double ? ScalarType::Double : ScalarType::Float);
  if (num_tokens == 0 || top_k == 0) return topk_weights;
  dispatch_float("route_weights", logits.scalar_type(), [&]<class T>() {
    using Acc = acc_t<T>;
    dispatch_row(logits.size(1), [&]<int kPerLane>() {
      const Tensor workspace = make_workspace<Acc>(logits, kPerLane);
      launch(scope, route_weights_kernel<T, kPerLane>, grid_of(logits), dim3(kWarpSize, kWarps), 0,
             logits_of<T>(logits, score), data<int32_t>(topk_ids), mutable_data<Acc>(workspace),
             mutable_data<Acc>(topk_weights), static_cast<int>(top_k), renormalize, scaling_factor);
    });
  });
  return topk_weights;
}

Tensor route_backward_cuda(const Tensor& grad_weights_in, const Tensor& logits, const Tensor& topk_ids_in, int64_t score,
                           bool renormalize, double scaling_factor, int64_t num_null_experts) {
  const Tensor grad_weights = torch::stable::contiguous(grad_weights_in);
  const Tensor topk_ids = torch::stable::contiguous(topk_ids_in);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1), top_k = topk_ids.size(1);
  const bool is_double = logits.scalar_type() == ScalarType::Double;
  MOE_CHECK(topk_ids.size(0) == num_tokens && grad_weights.numel() == num_tokens * top_k && num_null_experts <= num_experts &&
                topk_ids.scalar_type() == ScalarType::Int &&
                grad_weights.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
            "route: the gradient must have the shape and dtype of topk_weights");
  const DeviceScope scope(logits);
  Tensor grad_logits = torch::stable::new_empty(logits, {num_tokens, num_experts});
  if (num_tokens == 0 || num_experts == 0) return grad_logits;
  dispatch_float("route", logits.scalar_type(), [&]<class T>() {
    using Acc = acc_t<T>;
    dispatch_row(num_experts, [&]<int kPerLane>() {
      const Tensor workspace = make_workspace<Acc>(logits, kPerLane);
      launch(scope, route_bwd_kernel<T, kPerLane>, grid_of(logits), dim3(kWarpSize, kWarps), 0, logits_of<T>(logits, score),
             data<int32_t>(topk_ids), data<Acc>(grad_weights), mutable_data<Acc>(workspace), mutable_data<T>(grad_logits),
             static_cast<int>(top_k), renormalize, scaling_factor, static_cast<int>(num_experts - num_null_experts));
    });
  });
  return grad_logits;
}

}  // namespace
}  // namespace moe

MOE_CUDA_LIBRARY(m) {
  m.impl("route", TORCH_BOX(&moe::route_cuda));
  m.impl("route_weights", TORCH_BOX(&moe::route_weights_cuda));
  m.impl("route_backward", TORCH_BOX(&moe::route_backward_cuda));
}
