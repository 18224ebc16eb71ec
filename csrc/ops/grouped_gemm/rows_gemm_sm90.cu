// Launches of rows_gemm_sm90.cuh: tensor maps, tiles, and the variant for a call.
#include "ops/grouped_gemm/rows_gemm_sm90.cuh"

#include <cuda.h>

#include <atomic>

#include "ops/grouped_gemm/rows_gemm_sm90.h"

namespace moe::sm90 {
namespace {

// The driver's encoder, asked of the runtime: linking with libcuda would keep the library from loading without a driver.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    MOE_CHECK(error == cudaSuccess && result == cudaDriverEntryPointSuccess,
              "the CUDA driver has no cuTensorMapEncodeTiled; update it to one of CUDA 12 or later");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return found;
}

// A tensor of 16-bit elements, sizes and strides (in elements, of all but the innermost) from the inside out.
template <class T, size_t kRank>
TensorMap tensor_map(const char* op, const void* data, const int64_t (&sizes)[kRank], const int64_t (&strides)[kRank - 1],
                     const int (&box)[kRank]) {
  cuuint64_t global[kRank], bytes[kRank - 1];
  cuuint32_t boxes[kRank], steps[kRank];
  for (size_t i = 0; i < kRank; ++i) {
    global[i] = static_cast<cuuint64_t>(sizes[i]);
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
    if (i > 0) bytes[i - 1] = static_cast<cuuint64_t>(strides[i - 1]) * sizeof(T);
  }
  TensorMap map;
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap));
  const CUresult result = encoder()(
      reinterpret_cast<CUtensorMap*>(&map), std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      kRank, const_cast<void*>(data), global, bytes, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  MOE_CHECK(result == CUDA_SUCCESS, op, ": the driver refuses a tensor map, error ", static_cast<int>(result));
  return map;
}

int num_multiprocessors(int device) {
  static std::atomic<int> known[64];
  if (device < 64 && known[device] > 0) return known[device];
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  if (device < 64) known[device] = count;
  return count;
}

template <class T, int kTokens, bool kActivates, bool kGated>
void launch_tiles(const char* op, const DeviceScope& scope, int device, const TensorMap& weights, const TensorMap& tokens,
                  const RowsGemm<T>& gemm) {
  const int shared = Layout<kTokens>::bytes(gemm.num_experts);
  MOE_CHECK(shared <= 227 * 1024, op, ": ", gemm.num_experts, " experts are too many for one block's shared memory");
  const auto kernel = rows_gemm_kernel<T, kTokens, kActivates, kGated>;
  static std::atomic<uint64_t> raised{0};  // devices whose limit has been raised
  if (device >= 64 || !(raised >> device & 1)) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024));
    if (device < 64) raised |= uint64_t{1} << device;
  }
  constexpr int kColumns = kGated ? kWeightRows : 2 * kWeightRows;
  const int64_t tiles = (ceil_div(gemm.num_rows, kTokens) + std::min(gemm.num_experts, gemm.num_rows)) *
                        ceil_div(gemm.num_columns, kColumns);
  MOE_CHECK(tiles < (int64_t{1} << 31), op, ": too many tiles for one launch; split the tokens");
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, num_multiprocessors(device)));
  launch(scope, kernel, dim3(blocks), dim3(kThreads), static_cast<size_t>(shared), weights, tokens, gemm);
}

template <class T>
void multiply(const char* op, const DeviceScope& scope, const Tensor& x, const Tensor& weights,
              const std::optional<Tensor>& bias, const Tensor& expert_offsets, const Activation* activation, bool interleaved,
              Tensor& out) {
  const bool gated = activation != nullptr && activation->gated;
  const int64_t num_experts = weights.size(0), depth = weights.size(2), num_rows = out.size(0), num_columns = out.size(1);
  const auto aligned = [](const Tensor& tensor, int last) {
    bool fits = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 && (tensor.stride(last) == 1 || tensor.size(last) == 1);
    for (int i = 0; i < last; ++i) fits = fits && tensor.stride(i) % 8 == 0;
    return fits;
  };
  MOE_CHECK(weights.size(1) == num_columns * (gated ? 2 : 1) && x.size(0) == num_rows && x.size(1) == depth && depth % 8 == 0 && num_columns % 8 == 0 &&
                aligned(weights, 2) && aligned(x, 1),
            op, ": sizes must be multiples of 8, rows contiguous and 16-byte aligned for the kernels of compute capability 9.0");
  MOE_CHECK(num_rows < (int64_t{1} << 31) - 128 && num_columns < (int64_t{1} << 30) && depth < (int64_t{1} << 30), op,
            ": too large");
  const int64_t of_expert = weights.stride(0), of_row = weights.stride(1);
  RowsGemm<T> gemm{};
  gemm.expert_offsets = data<int32_t>(expert_offsets);
  gemm.num_rows = static_cast<int>(num_rows);
  gemm.num_experts = static_cast<int>(num_experts);
  gemm.num_columns = static_cast<int>(num_columns);
  gemm.depth = static_cast<int>(depth);
  gemm.out = mutable_data<T>(out);
  const int64_t step = gated && interleaved ? 2 : 1, up = gated ? (interleaved ? 1 : num_columns) : 0;  // in rows of weights
  if (bias) {
    gemm.bias = data<T>(*bias);
    gemm.bias_expert_stride = bias->stride(0);
    gemm.bias_step = step * bias->stride(1);
    gemm.bias_up = up * bias->stride(1);
  }
  if (activation != nullptr) {
    const float limit = static_cast<float>(activation->limit);
    gemm.activation = {static_cast<int>(activation->kind),          static_cast<float>(activation->alpha),
                       activation->clamp_output ? INFINITY : limit,    limit,
                       activation->clamp_output ? limit : INFINITY,    static_cast<float>(activation->up_offset)};
  }
  const TensorMap of_weights =
      tensor_map<T, 4>(op, weights.const_data_ptr(), {depth, num_columns, gated ? 2 : 1, num_experts},
                       {step * of_row, gated ? up * of_row : 8, of_expert}, {kDepth, kWeightRows, 1, 1});
  const int64_t rows_per_expert = num_rows / std::min(num_experts, num_rows);
  const int device = out.get_device_index();
  const auto with_tokens = [&]<int kTokens>() {
    const TensorMap of_tokens =
        tensor_map<T, 2>(op, x.const_data_ptr(), {depth, x.size(0)}, {x.stride(0)}, {kDepth, kTokens});
    if (gated)
      launch_tiles<T, kTokens, true, true>(op, scope, device, of_weights, of_tokens, gemm);
    else if (activation != nullptr)
      launch_tiles<T, kTokens, true, false>(op, scope, device, of_weights, of_tokens, gemm);
    else
      launch_tiles<T, kTokens, false, false>(op, scope, device, of_weights, of_tokens, gemm);
  };
  // as few as an expert gets on average: a tile of more would multiply with zeros, one of fewer would read weights again
  if (rows_per_expert <= 16)
    with_tokens.template operator()<16>();
  else if (rows_per_expert <= 32)
    with_tokens.template operator()<32>();
  else if (rows_per_expert <= 64)
    with_tokens.template operator()<64>();
  else
    with_tokens.template operator()<128>();
}

}  // namespace

void multiply_rows(const char* op, const DeviceScope& scope, const Tensor& x, const Tensor& weights,
                   const std::optional<Tensor>& bias, const Tensor& expert_offsets, const Activation* activation,
                   bool interleaved, Tensor& out) {
  if (out.numel() == 0 || weights.size(0) == 0 || weights.size(2) == 0) return;
  if (out.scalar_type() == ScalarType::BFloat16)
    multiply<bf16>(op, scope, x, weights, bias, expert_offsets, activation, interleaved, out);
  else
    multiply<fp16>(op, scope, x, weights, bias, expert_offsets, activation, interleaved, out);
}

}  // namespace moe::sm90
