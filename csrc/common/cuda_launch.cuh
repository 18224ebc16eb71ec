// What every .cu file starts from: device and stream of a call, launches, shared memory, registration.
//
// nvcc is not the only compiler of this source. g++ compiles it too, against an execution model of CUDA on the host
// (tests/gpu/shim/simt.h), so that every kernel runs under the sanitizers and in the ordinary op tests where there is no
// GPU. The price is three conventions: launches by launch(), shared memory by MOE_SHARED and MOE_DYNAMIC_SHARED, inline
// PTX only in ptx.cuh.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "simt.h"
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/dispatch.h"

#if defined(__CUDACC__)

// T name[count], one for the block. `count` is a constant.
#define MOE_SHARED(T, name, count) __shared__ T name[count]
// T name[], as many as the launch asked bytes for
#define MOE_DYNAMIC_SHARED(T, name)                                \
  extern __shared__ __align__(16) unsigned char moe_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(moe_dynamic_shared)
#define MOE_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CUDA, m)

#else

#define MOE_SHARED(T, name, count)    \
  static const char name##_key = 0;   \
  T* const name = static_cast<T*>(::simt::shared_array(&name##_key, #name, sizeof(T) * (count)))
#define MOE_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::simt::dynamic_shared_array())
// the same ops on CPU tensors, in a namespace of their own beside the CPU kernels
#define MOE_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(moe_kernels_simt, CPU, m)
using cudaStream_t = void*;

#endif

namespace moe {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpSize = 32;

// Makes the tensor's device current while it lives, and knows the stream that PyTorch would launch on.
class DeviceScope {
 public:
#if defined(__CUDACC__)
  explicit DeviceScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#else
  explicit DeviceScope(const Tensor&) {}
#endif
  cudaStream_t stream() const { return stream_; }

 private:
#if defined(__CUDACC__)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

// Launches on the scope's stream. A launch past the device's limits is an error here, not a sticky one later.
template <class... Params, class... Args>
void launch(const DeviceScope& scope, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Args... args) {
#if defined(__CUDACC__)
  kernel<<<grid, block, shared_bytes, scope.stream()>>>(static_cast<Params>(args)...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
#else
  (void)scope;
  [&](Params... values) {
    simt::launch({grid, block, shared_bytes, reinterpret_cast<const void*>(kernel), {{&values, sizeof values}...}},
                 [&] { kernel(values...); });
  }(static_cast<Params>(args)...);
#endif
}

// A value that the device computes, when it has: the host waits for all that was launched before.
template <class T>
T read_back(const DeviceScope& scope, const T* from) {
#if defined(__CUDACC__)
  T value;
  STD_CUDA_CHECK(cudaMemcpyAsync(&value, from, sizeof value, cudaMemcpyDeviceToHost, scope.stream()));
  STD_CUDA_CHECK(cudaStreamSynchronize(scope.stream()));
  return value;
#else
  (void)scope;
  return *from;
#endif
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks along the grid's first dimension.
inline unsigned grid_size(const char* op, int64_t num_blocks) {
  MOE_CHECK(num_blocks < (int64_t{1} << 31), op, ": a launch must be below 2**31 blocks, got ", num_blocks,
            "; split the tokens");
  return static_cast<unsigned>(num_blocks);
}

}  // namespace moe
