// Task vectors added to a weight in place, and taken away again, on CUDA; the bits are those of the CPU's kernels.
//
//   apply_ternary            W' = round(W + sum_i value_i t_i) where any t_i is not zero
//   apply_ternary_undoable   and what takes it back (UndoStream in microkernels/task_vector_table.h)
//   unapply_ternary          W from W', bit for bit
//
// A thread owns the weights of one 16-byte access. It loads both words of their group, as the other threads of the group
// do at the same address, so that a warp asks for each sector of the planes once; weights that no vector touches are
// neither loaded nor stored. There are only additions: nothing that a compiler could contract.
//
// apply_ternary depends on shapes alone. An undo has a size that only the device knows, so keeping one waits for the
// device twice: for the length of the strings and for the number of kept values. Its passes, in bytes a weight of bfloat16
// with one vector:
//   count     0.25   bits of each block, then their running sums
//   apply     4.25   reads and writes the weights; the strings, 2 bits a touched one; kept values go to the block's part
//                    of a scratch of one value for each bit of a string
//   collect   0      kept values are few: 3% of bfloat16 weights of size 0.02 at 1e-3
// Counting the kept in a pass over the weights beforehand would need neither the scratch nor the second wait, but 6.5
// bytes in place of 4.5.
#include <algorithm>
#include <tuple>
#include <vector>

#include "common/vec.cuh"
#include "microkernels/task_vector_table.h"

namespace moe {
namespace {

constexpr int kThreads = 256;      // of apply
constexpr int kBlockThreads = 512;  // of what works on a block of the undo
constexpr int kGroups = kTernaryBlock / kTernaryGroup;
constexpr int kWords = kTernaryBlock / 32;  // of a string of a block, at most
constexpr int kCountWarps = 8;
constexpr int kScanThreads = 1024;
constexpr int kScanEach = 4;
// 1 KiB of the 4 KiB of parameters that every driver takes
constexpr int kMaxSources = 64;

struct alignas(16) Planes {
  uint64_t nonzero, negative;
};

template <class Acc>
struct Sources {
  TernarySource<Acc> all[kMaxSources];
  int count;
  bool aligned;  // planes to 16 bytes

  __device__ __forceinline__ Planes planes(int i, int64_t group) const {
    const uint64_t* at = all[i].planes + 2 * group;
    return aligned ? *reinterpret_cast<const Planes*>(at) : Planes{at[0], at[1]};
  }
};

template <class T>
struct Weight {
  T* data;
  int64_t numel;
  bool aligned;  // to 16 bytes
};

// The bit patterns of T, in unsigned integers that arithmetic is done in.
template <class T>
struct bits_of {
  using type = uint32_t;
};
template <>
struct bits_of<double> {
  using type = uint64_t;
};
template <class T>
using bits_t = typename bits_of<T>::type;

template <class T>
__device__ __forceinline__ bits_t<T> to_bits(T x) {
  bits_t<T> bits = 0;
  memcpy(&bits, &x, sizeof x);
  return bits;
}

template <class T>
__device__ __forceinline__ T from_bits(bits_t<T> bits) {
  T x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

__device__ __forceinline__ uint64_t first_bits(int64_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

// sum_i value_i t_i of the group's weights from `shift` on; returns the bits of the group where any t is not zero.
template <class T>
__device__ __forceinline__ uint64_t sum_sources(const Sources<acc_t<T>>& sources, int64_t group, int shift,
                                                acc_t<T> (&sums)[kVecElements<T>]) {
  uint64_t touched = 0;
#pragma unroll
  for (int e = 0; e < kVecElements<T>; ++e) sums[e] = 0;
  for (int i = 0; i < sources.count; ++i) {
    const Planes planes = sources.planes(i, group);
    const acc_t<T> value = sources.all[i].value;
    touched |= planes.nonzero;
    const auto nonzero = static_cast<uint32_t>(planes.nonzero >> shift), negative = static_cast<uint32_t>(planes.negative >> shift);
#pragma unroll
    for (int e = 0; e < kVecElements<T>; ++e)
      if (nonzero >> e & 1) sums[e] += negative >> e & 1 ? -value : value;
  }
  return touched;
}

// The vector of weights at `at`; of the last one, those that there are.
template <class T>
__device__ __forceinline__ Vec<T, kVecElements<T>> load_weights(const Weight<T>& weight, int64_t at) {
  using V = Vec<T, kVecElements<T>>;
  if (weight.aligned && at + kVecElements<T> <= weight.numel) return *reinterpret_cast<const V*>(weight.data + at);
  V w{};
#pragma unroll
  for (int e = 0; e < kVecElements<T>; ++e)
    if (at + e < weight.numel) w.values[e] = weight.data[at + e];
  return w;
}

template <class T>
__device__ __forceinline__ void store_weights(const Weight<T>& weight, int64_t at, const Vec<T, kVecElements<T>>& w) {
  using V = Vec<T, kVecElements<T>>;
  if (weight.aligned && at + kVecElements<T> <= weight.numel) return store_vec(reinterpret_cast<V*>(weight.data + at), w);
#pragma unroll
  for (int e = 0; e < kVecElements<T>; ++e)
    if (at + e < weight.numel) weight.data[at + e] = w.values[e];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    apply_ternary_kernel(Weight<T> weight, const __grid_constant__ Sources<acc_t<T>> sources) {
  constexpr int kVec = kVecElements<T>;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVec;
  if (at >= weight.numel) return;
  const int shift = static_cast<int>(at % kTernaryGroup);
  acc_t<T> sums[kVec];
  const uint64_t group_touched = sum_sources<T>(sources, at / kTernaryGroup, shift, sums) & first_bits(weight.numel - at + shift);
  const uint32_t touched = static_cast<uint32_t>(group_touched >> shift) & ((1u << kVec) - 1);
  if (touched == 0) return;
  auto w = load_weights(weight, at);
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    const acc_t<T> x = to_acc(w.values[e]);
    if ((touched >> e & 1) && x == x) w.values[e] = from_acc<T>(x + sums[e]);
  }
  store_weights(weight, at, w);
}

template <class T>
unsigned apply_blocks(int64_t numel) {
  return grid_size("apply_", ceil_div(numel, int64_t{kThreads} * kVecElements<T>));
}

// What every op checks, and the vectors as kernels take them.
template <class Acc>
Sources<Acc> make_sources(const char* op, const Tensor& weight, const std::vector<Tensor>& deltas,
                          const std::vector<double>& values) {
  MOE_CHECK(weight.is_contiguous(), op, ": the weight must be contiguous");
  MOE_CHECK(deltas.size() == values.size(), op, ": there must be as many coefficients as deltas");
  MOE_CHECK(deltas.size() <= kMaxSources, op, ": deltas must be at most ", kMaxSources, " on a GPU, got ", deltas.size(),
            "; use backend='triton' or merge them");
  const int64_t groups = ceil_div(weight.numel(), kTernaryGroup);
  Sources<Acc> sources{{}, static_cast<int>(deltas.size()), true};
  for (size_t i = 0; i < deltas.size(); ++i) {
    const Tensor& delta = deltas[i];
    MOE_CHECK(delta.scalar_type() == ScalarType::Long && delta.is_contiguous() && delta.dim() == 2 &&
                  delta.size(0) == groups && delta.size(1) == 2 && delta.is_cpu() == weight.is_cpu(),
              op, ": the planes of ", weight.numel(), " elements must be int64 of shape [", groups,
              ", 2] on the weight's device");
    sources.all[i] = {reinterpret_cast<const uint64_t*>(data<int64_t>(delta)), static_cast<Acc>(values[i])};
    sources.aligned = sources.aligned && common_alignment(delta.const_data_ptr(), nullptr, 0) == 16;
  }
  return sources;
}

template <class T>
Weight<T> make_weight(const Tensor& weight) {
  return {mutable_data<T>(weight), weight.numel(), common_alignment(weight.const_data_ptr(), nullptr, 0) == 16};
}

void apply_cuda(Tensor weight, std::vector<Tensor> deltas, std::vector<double> values) {
  dispatch_float("apply_", weight.scalar_type(), [&]<class T>() {
    const auto sources = make_sources<acc_t<T>>("apply_", weight, deltas, values);
    if (weight.numel() == 0) return;
    const DeviceScope scope(weight);
    launch(scope, apply_ternary_kernel<T>, dim3(apply_blocks<T>(weight.numel())), dim3(kThreads), 0, make_weight<T>(weight),
           sources);
  });
}

}  // namespace
}  // namespace moe

MOE_CUDA_LIBRARY(m) {
  m.impl("apply_ternary", TORCH_BOX(&moe::apply_cuda));
}
