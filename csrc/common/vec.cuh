// Vectors of up to 16 bytes that move in one memory instruction, and the arithmetic type of their elements.
#pragma once

#include "common/cuda_launch.cuh"
#include "common/ptx.cuh"

namespace moe {

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vec {
  T values[kCount];
};

// One memory instruction for a vector.
template <class V>
__device__ __forceinline__ void store_vec(V* to, const V& value) {
  if constexpr (sizeof(V) == 16) {
    uint32_t words[4];
    memcpy(words, &value, sizeof words);
    ptx::st_global_v4(to, words);
  } else {
    *to = value;
  }
}

template <class T>
constexpr int kVecElements = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(fp16 x) { return ptx::cvt_f32_f16(x); }
__device__ __forceinline__ float to_acc(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

template <class T>
__device__ __forceinline__ T from_acc(acc_t<T> x);
template <>
__device__ __forceinline__ float from_acc<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ double from_acc<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_acc<bf16>(float x) {
  return ptx::cvt_rn_bf16_f32(x);
}
template <>
__device__ __forceinline__ fp16 from_acc<fp16>(float x) {
  return ptx::cvt_rn_f16_f32(x);
}

// Sum over the warp, the same bits in every lane: a tree, not a chain.
template <class Acc>
__device__ __forceinline__ Acc warp_sum(Acc x) {
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

// Sum over this lane and all before it.
template <class Acc>
__device__ __forceinline__ Acc warp_scan(Acc x, int lane) {
#pragma unroll
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
    const Acc other = __shfl_up_sync(kAllLanes, x, lanes);
    if (lane >= lanes) x += other;
  }
  return x;
}

// A small tensor of any float dtype (routing weights): read one by one, so that kernels need no variant for its dtype.
struct FloatsRef {
  void* data;
  ScalarType dtype;
  int64_t stride0, stride1;  // of a matrix

  template <class Acc>
  __device__ __forceinline__ Acc load(int64_t row, int64_t column) const {
    const int64_t at = row * stride0 + column * stride1;
    switch (dtype) {
      case ScalarType::Float: return static_cast<Acc>(static_cast<const float*>(data)[at]);
      case ScalarType::BFloat16: return static_cast<Acc>(to_acc(static_cast<const bf16*>(data)[at]));
      case ScalarType::Half: return static_cast<Acc>(to_acc(static_cast<const fp16*>(data)[at]));
      default: return static_cast<Acc>(static_cast<const double*>(data)[at]);
    }
  }

  template <class Acc>
  __device__ __forceinline__ void store(int64_t row, int64_t column, Acc x) const {
    const int64_t at = row * stride0 + column * stride1;
    switch (dtype) {
      case ScalarType::Float: static_cast<float*>(data)[at] = static_cast<float>(x); return;
      case ScalarType::BFloat16: static_cast<bf16*>(data)[at] = from_acc<bf16>(static_cast<float>(x)); return;
      case ScalarType::Half: static_cast<fp16*>(data)[at] = from_acc<fp16>(static_cast<float>(x)); return;
      default: static_cast<double*>(data)[at] = static_cast<double>(x); return;
    }
  }
};

// Of a matrix, or of a vector as one row; null for an absent tensor.
inline FloatsRef floats_ref(const Tensor& tensor) {
  const bool matrix = tensor.dim() == 2;
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.scalar_type(), matrix ? tensor.stride(0) : 0,
          tensor.stride(matrix ? 1 : 0)};
}

// Largest power of two that divides both addresses and all sizes, at most 16: what one access may move.
template <class... Sizes>
int common_alignment(const void* a, const void* b, Sizes... sizes) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | 16 | (static_cast<uint64_t>(sizes) | ...);
  return static_cast<int>(bits & (~bits + 1));
}

// A contiguous tensor, whose elements move 16 bytes at once where it is aligned to them.
template <class T>
struct Elements {
  T* data;
  int64_t numel;
  bool aligned;
};

template <class T>
Elements<T> elements_of(const Tensor& tensor) {
  return {const_cast<T*>(data<T>(tensor)), tensor.numel(), common_alignment(tensor.const_data_ptr(), nullptr, 0) == 16};
}

// The vector of elements at `at`; of the last one, those that there are, and zeros.
template <class T>
__device__ __forceinline__ Vec<T, kVecElements<T>> load_elements(const Elements<T>& from, int64_t at) {
  using V = Vec<T, kVecElements<T>>;
  if (from.aligned && at + kVecElements<T> <= from.numel) return *reinterpret_cast<const V*>(from.data + at);
  V v{};
#pragma unroll
  for (int e = 0; e < kVecElements<T>; ++e)
    if (at + e < from.numel) v.values[e] = from.data[at + e];
  return v;
}

template <class T>
__device__ __forceinline__ void store_elements(const Elements<T>& to, int64_t at, const Vec<T, kVecElements<T>>& v) {
  using V = Vec<T, kVecElements<T>>;
  if (to.aligned && at + kVecElements<T> <= to.numel) return store_vec(reinterpret_cast<V*>(to.data + at), v);
#pragma unroll
  for (int e = 0; e < kVecElements<T>; ++e)
    if (at + e < to.numel) to.data[at + e] = v.values[e];
}

}  // namespace moe
