// Linear layers with ternary task vectors on CUDA, forward, for few tokens: W + aT is never made.
//
// Rows of W are the 16 rows of the tensor cores' products and tokens their 8 columns, so that one token wastes columns but
// no bytes. A block makes 16 rows for up to 32 tokens, and its four warps share the features, 64 at a time: which features
// a lane brings is free as long as both operands agree, so it loads 16 bytes of a row and no element is exchanged. A delta's
// signs are made from its planes where the weights would be. The sums of a token run in one order, whoever is beside it.
#include <optional>
#include <vector>

#include "ops/task_vector/planes.cuh"

namespace moe {
namespace {

constexpr int kRows = 16, kColumns = 8;  // of a product
constexpr int kWarps = 4;
constexpr int kFeatures = 64;   // of a warp's step, 16 a lane
constexpr int kPartStride = 20;  // of a token's sums in shared memory: no two lanes of a store meet in a bank
constexpr int kMaxDeltas = 64;  // 768 bytes of parameters

struct Deltas {
  const uint64_t* planes[kMaxDeltas];
  float values[kMaxDeltas];
  int count;
  int64_t num_groups;  // of each plane
  bool whole_groups;   // a row of W is whole groups, at multiples of 16 bytes
};

// Who uses which delta, and with what weight.
struct Pairs {
  const void* ids;  // [num_tokens, top_k]; null: every token all deltas, in their order
  bool ids_are_long;
  FloatsRef weights;  // [num_tokens, top_k]; data null: one
  int top_k;

  __device__ __forceinline__ int64_t id(int64_t token, int slot) const {
    const int64_t at = token * top_k + slot;
    return ids_are_long ? static_cast<const int64_t*>(ids)[at] : static_cast<const int32_t*>(ids)[at];
  }
  __device__ __forceinline__ float weight(int64_t token, int slot) const {
    return weights.data == nullptr ? 1.0f : weights.load<float>(token, slot);
  }
  // Whether the token uses the delta; a delta that it has twice counts with both weights.
  __device__ __forceinline__ bool use(int64_t token, int delta, float value, float& factor) const {
    factor = 0;
    if (ids == nullptr) {
      factor = weight(token, delta) * value;
      return true;
    }
    bool used = false;
    for (int slot = 0; slot < top_k; ++slot)
      if (id(token, slot) == delta) {
        factor += weight(token, slot) * value;
        used = true;
      }
    return used;
  }
};

// Rows of 16-bit elements.
template <class T>
struct Matrix {
  T* data;
  int64_t num_rows, num_columns, stride;
  bool aligned;  // every row, to 16 bytes

  __device__ __forceinline__ Elements<T> row(int64_t i) const {
    return {data + i * stride, i < num_rows ? num_columns : 0, aligned};
  }
};

// What a lane brings of one row in a step: 8 features from 8c on and 8 from 32 + 8c on, c = lane % 4. Zeros behind the last.
template <class T>
__device__ __forceinline__ void load_features(const Elements<T>& row, int64_t first, uint32_t (&words)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto v = load_elements(row, first + 32 * half);
    memcpy(words + 4 * half, &v, 16);
  }
}

// 8 bits of a plane (0: not zero, 1: negative) from any bit on.
__device__ __forceinline__ uint32_t plane_bits(const uint64_t* planes, int plane, int64_t bit, int64_t num_groups) {
  const int64_t group = bit / kTernaryGroup;
  const int shift = static_cast<int>(bit % kTernaryGroup);
  uint64_t bits = group < num_groups ? planes[2 * group + plane] >> shift : 0;
  if (shift > kTernaryGroup - 8 && group + 1 < num_groups) bits |= planes[2 * group + 2 + plane] << (kTernaryGroup - shift);
  return static_cast<uint32_t>(bits) & 0xff;
}

__device__ __forceinline__ uint32_t one(bf16) { return 0x3f80; }
__device__ __forceinline__ uint32_t one(fp16) { return 0x3c00; }

// The same of a delta's row, from its bit on. What lies behind the row are the next one's signs: they meet zeros.
template <class T>
__device__ __forceinline__ void make_signs(const Deltas& deltas, int delta, int64_t bit, uint32_t (&words)[8]) {
  const uint64_t* planes = deltas.planes[delta];
  const int64_t group = bit / kTernaryGroup;
  Planes both{};
  if (deltas.whole_groups && group < deltas.num_groups) both = reinterpret_cast<const Planes*>(planes)[group];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int shift = static_cast<int>(bit % kTernaryGroup) + 32 * half;  // whole groups: the lane's 8c
    const uint32_t nonzero = deltas.whole_groups ? static_cast<uint32_t>(both.nonzero >> shift) & 0xff
                                                 : plane_bits(planes, 0, bit + 32 * half, deltas.num_groups);
    const uint32_t negative = deltas.whole_groups ? static_cast<uint32_t>(both.negative >> shift) & 0xff
                                                  : plane_bits(planes, 1, bit + 32 * half, deltas.num_groups);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t some = nonzero >> 2 * i, minus = negative >> 2 * i;
      words[4 * half + i] = ((some & 1) | (some & 2) << 15) * one(T{}) | (minus & 1) << 15 | (minus & 2) << 30;
    }
  }
}

// sums += this warp's features of the product; rows(first, low, high): what the lane brings of rows g and g + 8.
template <class T, int kTiles, class Rows>
__device__ __forceinline__ void multiply(const Rows& rows, const Matrix<T>& x, int64_t first_token, float (&sums)[kTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, c = lane % 4;
  for (int64_t step = static_cast<int64_t>(threadIdx.y) * kFeatures; step < x.num_columns; step += kWarps * kFeatures) {
    const int64_t first = step + 8 * c;
    uint32_t low[8], high[8], tokens[8];
    rows(first, low, high);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      load_features(x.row(first_token + kColumns * tile + g), first, tokens);
#pragma unroll
      for (int i = 0; i < 8; i += 2)
        ptx::mma_m16n8k16(T{}, sums[tile], {low[i], high[i], low[i + 1], high[i + 1]}, {tokens[i], tokens[i + 1]});
    }
  }
}

template <class T, int kTiles>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    ternary_linear_kernel(Matrix<T> x, Matrix<T> weight, const __grid_constant__ Deltas deltas, Pairs pairs,
                          const T* __restrict__ bias,  // [out_features] or null
                          T* __restrict__ out) {       // [num_tokens, out_features]
  constexpr int kTokens = kColumns * kTiles;
  MOE_SHARED(float, parts, kWarps * kTokens * kPartStride);
  const int lane = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.y), g = lane / 4, c = lane % 4;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows, first_token = static_cast<int64_t>(blockIdx.y) * kTokens;
  const int64_t row = first_row + g;
  float sums[kTiles][4] = {};
  multiply<T>(
      [&](int64_t first, uint32_t(&low)[8], uint32_t(&high)[8]) {
        load_features(weight.row(row), first, low);
        load_features(weight.row(row + kRows / 2), first, high);
      },
      x, first_token, sums);
  for (int e = 0; e < deltas.count; ++e) {
    float factor = 0;  // of the lane's token
    const bool used = lane < kTokens && first_token + lane < x.num_rows &&
                      pairs.use(first_token + lane, e, deltas.values[e], factor);
    const unsigned users = __ballot_sync(kAllLanes, used);
    if (users == 0) continue;
    float products[kTiles][4] = {};
    multiply<T>(
        [&](int64_t first, uint32_t(&low)[8], uint32_t(&high)[8]) {
          make_signs<T>(deltas, e, row * x.num_columns + first, low);
          make_signs<T>(deltas, e, (row + kRows / 2) * x.num_columns + first, high);
        },
        x, first_token, products);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = kColumns * tile + 2 * c + i % 2;
        const float weighted = __shfl_sync(kAllLanes, factor, token) * products[tile][i];
        // who does not use it keeps its bits, also of -0 and of what is no number
        if (users >> token & 1) sums[tile][i] += weighted;
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      parts[(warp * kTokens + kColumns * tile + 2 * c + i % 2) * kPartStride + g + i / 2 * (kRows / 2)] = sums[tile][i];
  }
  __syncthreads();
  for (int i = warp * kWarpSize + lane; i < kTokens * kRows; i += kWarps * kWarpSize) {
    const int64_t token = first_token + i / kRows, column = first_row + i % kRows;
    if (token >= x.num_rows || column >= weight.num_rows) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += parts[(w * kTokens + i / kRows) * kPartStride + i % kRows];
    if (bias != nullptr) sum += to_acc(bias[column]);
    out[token * weight.num_rows + column] = from_acc<T>(sum);
  }
}

template <class T>
Matrix<T> matrix_of(const Tensor& tensor) {
  const int64_t stride = tensor.stride(0);
  return {const_cast<T*>(data<T>(tensor)), tensor.size(0), tensor.size(1), stride,
          common_alignment(tensor.const_data_ptr(), nullptr, stride * static_cast<int64_t>(sizeof(T))) == 16};
}

// Rows whose elements follow each other: the tensor, or a copy.
Tensor with_rows(const Tensor& tensor) { return tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor); }

Tensor ternary_linear_cuda(Tensor x_in, Tensor weight_in, std::vector<Tensor> delta_planes, std::vector<double> values,
                           std::optional<Tensor> ids_in, std::optional<Tensor> weights, std::optional<Tensor> bias_in) {
  const char* op = "ternary_linear";
  MOE_CHECK(x_in.dim() == 2 && weight_in.dim() == 2 && x_in.size(1) == weight_in.size(1) &&
                x_in.scalar_type() == weight_in.scalar_type(),
            op, ": x [num_tokens, in_features] and weight [out_features, in_features] must be of one dtype");
  const ScalarType dtype = x_in.scalar_type();
  MOE_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op,
            ": the CUDA kernel takes bfloat16 and float16; use backend='triton'");
  const Tensor x = with_rows(x_in), weight = with_rows(weight_in);
  const int64_t num_tokens = x.size(0), out_features = weight.size(0), count = static_cast<int64_t>(delta_planes.size());
  MOE_CHECK(values.size() == delta_planes.size(), op, ": there must be as many coefficients as deltas");
  MOE_CHECK(count <= kMaxDeltas, op, ": deltas must be at most ", kMaxDeltas, " on a GPU, got ", count,
            "; use backend='triton'");
  Deltas deltas{{}, {}, static_cast<int>(count), ceil_div(weight.numel(), kTernaryGroup), x.size(1) % kTernaryGroup == 0};
  for (size_t e = 0; e < delta_planes.size(); ++e) {
    const Tensor& planes = delta_planes[e];
    deltas.planes[e] = planes_of(op, planes, weight.numel(), x);
    deltas.values[e] = static_cast<float>(values[e]);
    deltas.whole_groups = deltas.whole_groups && common_alignment(planes.const_data_ptr(), nullptr, 0) == 16;
  }
  std::optional<Tensor> ids, bias;
  if (ids_in) ids = torch::stable::contiguous(*ids_in);
  if (bias_in) bias = torch::stable::contiguous(*bias_in);
  const int64_t top_k = ids ? ids->size(1) : count;
  MOE_CHECK((!ids || ids->size(0) == num_tokens) && (!weights || (weights->size(0) == num_tokens && weights->size(1) == top_k)),
            op, ": delta_ids and delta_weights must be of shape [num_tokens, K]");
  const Pairs pairs{ids ? ids->const_data_ptr() : nullptr, ids && ids->scalar_type() == ScalarType::Long,
                    weights ? floats_ref(*weights) : FloatsRef{nullptr, ScalarType::Float, 0, 0}, static_cast<int>(top_k)};
  Tensor out = torch::stable::new_empty(x, {num_tokens, out_features}, dtype);
  if (out.numel() == 0) return out;
  const DeviceScope scope(x);
  const auto run = [&]<class T, int kTiles>() {
    const int64_t token_tiles = ceil_div(num_tokens, kColumns * kTiles);
    MOE_CHECK(token_tiles < 65536, op, ": tokens must be fewer than ", 65536 * kColumns * kTiles, "; split them");
    launch(scope, ternary_linear_kernel<T, kTiles>,
           dim3(grid_size(op, ceil_div(out_features, kRows)), static_cast<unsigned>(token_tiles)), dim3(kWarpSize, kWarps), 0,
           matrix_of<T>(x), matrix_of<T>(weight), deltas, pairs, bias ? data<T>(*bias) : nullptr, mutable_data<T>(out));
  };
  const auto run_of = [&]<class T>() {
    num_tokens <= kColumns ? run.template operator()<T, 1>() : run.template operator()<T, 4>();
  };
  dtype == ScalarType::Half ? run_of.template operator()<fp16>() : run_of.template operator()<bf16>();
  return out;
}

}  // namespace
}  // namespace moe

MOE_CUDA_LIBRARY(m) { m.impl("ternary_linear", TORCH_BOX(&moe::ternary_linear_cuda)); }
