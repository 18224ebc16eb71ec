// permute, unpermute and unpermute's gradient on CUDA. Each element of a row is read once and written once, in 16-byte
// accesses where the addresses allow; sums run in float32 in the order of k, so results do not depend on the launch.
//
//   permute             rows[r] = hidden_states[source_rows[r]]
//   unpermute           out[t] = sum_k topk_weights[t, k] * rows[permuted_rows[t, k]]
//   unpermute_backward  grad_rows[permuted_rows[t, k]] = topk_weights[t, k] * grad_out[t]
//                       grad_weights[t, k] = <grad_out[t], rows[permuted_rows[t, k]]>
//
// An index outside its tensor gives zero: on the device nobody can be told.
#include <optional>
#include <tuple>

#include "common/vec.cuh"
#include "ops/permute/permute_cuda.h"

namespace moe {
namespace {

constexpr int kWarps = 8;            // of a block
constexpr int kVecsPerLane = 4;      // of permute: loads under way at once
constexpr int kSumsPerLane = 2;      // vectors of unpermute: each pair's row and weight are passed around for all of them
constexpr int kBackwardPairs = 32;   // of one token in flight in unpermute_backward
constexpr int kBackwardVecs = 2;     // of grad_out in registers of each thread

// One warp moves kVecsPerLane * 32 vectors of one row; the grid's second dimension walks along the row.
template <class V>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    permute_kernel(const V* __restrict__ hidden_states,      // [num_tokens, vecs_per_row]
                   const int32_t* __restrict__ source_rows,  // [num_rows]
                   V* __restrict__ rows,                     // [num_rows, vecs_per_row]
                   int64_t num_tokens, int64_t num_rows, int64_t vecs_per_row, int64_t row_stride) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= num_rows) return;
  const int64_t source = source_rows[row];
  const bool owned = source >= 0 && source < num_tokens;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * (kVecsPerLane * kWarpSize) + threadIdx.x;
  const V* from = hidden_states + (owned ? source : 0) * row_stride;
  V* to = rows + row * vecs_per_row;
  V moved[kVecsPerLane];
#pragma unroll
  for (int i = 0; i < kVecsPerLane; ++i) {
    const int64_t at = first + i * kWarpSize;
    moved[i] = V{};
    if (owned && at < vecs_per_row) moved[i] = from[at];
  }
#pragma unroll
  for (int i = 0; i < kVecsPerLane; ++i) {
    const int64_t at = first + i * kWarpSize;
    if (at < vecs_per_row) to[at] = moved[i];
  }
}

// One warp sums kSumsPerLane * 32 vectors of one token; the grid's second dimension walks along the row.
template <class T, int kVec>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    unpermute_kernel(const T* __restrict__ rows,                 // [num_rows, hidden_size]
                     const int32_t* __restrict__ permuted_rows,  // [num_tokens, top_k]
                     FloatsRef topk_weights,                     // [num_tokens, top_k] or null: 1
                     T* __restrict__ out,                        // [num_tokens, hidden_size]
                     int64_t num_rows, int64_t num_tokens, int64_t hidden_size, int64_t row_stride, int64_t top_k) {
  using Acc = acc_t<T>;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  const int64_t first = (static_cast<int64_t>(blockIdx.y) * (kSumsPerLane * kWarpSize) + threadIdx.x) * kVec;
  if (token >= num_tokens) return;
  Acc sums[kSumsPerLane][kVec] = {};
  for (int64_t k0 = 0; k0 < top_k; k0 += kWarpSize) {
    // each lane reads one pair's row and weight, so that the warp reads them once
    const int64_t k = k0 + threadIdx.x;
    int row_of_lane = k < top_k ? permuted_rows[token * top_k + k] : -1;
    if (row_of_lane < 0 || row_of_lane >= num_rows) row_of_lane = -1;
    Acc weight_of_lane = 1;
    if (row_of_lane >= 0 && topk_weights.data != nullptr) weight_of_lane = topk_weights.load<Acc>(token, k);
    const int num_pairs = static_cast<int>(top_k - k0 < kWarpSize ? top_k - k0 : kWarpSize);
#pragma unroll 2
    for (int pair = 0; pair < num_pairs; ++pair) {
      const int64_t row = __shfl_sync(kAllLanes, row_of_lane, pair);
      const Acc weight = __shfl_sync(kAllLanes, weight_of_lane, pair);
      if (row < 0) continue;
#pragma unroll
      for (int v = 0; v < kSumsPerLane; ++v) {
        const int64_t column = first + v * (kWarpSize * kVec);
        if (column >= hidden_size) continue;
        const auto picked = *reinterpret_cast<const Vec<T, kVec>*>(rows + row * row_stride + column);
#pragma unroll
        for (int i = 0; i < kVec; ++i) sums[v][i] += weight * to_acc(picked.values[i]);
      }
    }
  }
#pragma unroll
  for (int v = 0; v < kSumsPerLane; ++v) {
    const int64_t column = first + v * (kWarpSize * kVec);
    if (column >= hidden_size) continue;
    Vec<T, kVec> result;
#pragma unroll
    for (int i = 0; i < kVec; ++i) result.values[i] = from_acc<T>(sums[v][i]);
    store_vec(reinterpret_cast<Vec<T, kVec>*>(out + token * hidden_size + column), result);
  }
}

// One block for each token: grad_out[token] stays in registers while the token's rows pass by. The block also fills the
// rows [token * top_k, (token + 1) * top_k) that no pair owns with zero.
// three blocks an SM: left alone, ptxas aims at more for sm_100a and spills.
template <class T, int kVec>
__global__ void __launch_bounds__(kWarps* kWarpSize, 3)
    unpermute_bwd_kernel(const T* __restrict__ grad_out,             // [num_tokens, hidden_size]
                         const T* __restrict__ rows,                 // [num_rows, hidden_size]
                         FloatsRef topk_weights,                     // [num_tokens, top_k]
                         const int32_t* __restrict__ source_rows,    // [num_rows]
                         const int32_t* __restrict__ permuted_rows,  // [num_tokens, top_k]
                         T* __restrict__ grad_rows,                  // [num_rows, hidden_size]
                         FloatsRef grad_weights,                     // [num_tokens, top_k]
                         int64_t num_rows, int64_t num_tokens, int64_t hidden_size, int64_t grad_stride,
                         int64_t row_stride, int64_t top_k) {
  using Acc = acc_t<T>;
  using V = Vec<T, kVec>;
  constexpr int kThreads = kWarps * kWarpSize;
  MOE_SHARED(Acc, partial, kBackwardPairs * kWarps);  // [pair, warp] of the inner products
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int64_t token = blockIdx.x;
  for (int64_t k0 = 0; k0 < top_k; k0 += kBackwardPairs) {
    const int num_pairs = static_cast<int>(top_k - k0 < kBackwardPairs ? top_k - k0 : kBackwardPairs);
    for (int i = thread; i < kBackwardPairs * kWarps; i += kThreads) partial[i] = 0;
    __syncthreads();
    for (int64_t chunk = 0; chunk < hidden_size; chunk += int64_t{kThreads} * kVec * kBackwardVecs) {
      V grad[kBackwardVecs];
#pragma unroll
      for (int v = 0; v < kBackwardVecs; ++v) {
        const int64_t column = chunk + (int64_t{v} * kThreads + thread) * kVec;
        if (column < hidden_size) grad[v] = *reinterpret_cast<const V*>(grad_out + token * grad_stride + column);
      }
      for (int pair = 0; pair < num_pairs; ++pair) {
        const int64_t row = permuted_rows[token * top_k + k0 + pair];
        if (row < 0 || row >= num_rows) continue;
        const Acc weight = topk_weights.load<Acc>(token, k0 + pair);
        Acc inner = 0;
#pragma unroll
        for (int v = 0; v < kBackwardVecs; ++v) {
          const int64_t column = chunk + (int64_t{v} * kThreads + thread) * kVec;
          if (column >= hidden_size) continue;
          const V x = *reinterpret_cast<const V*>(rows + row * row_stride + column);
          V scaled;
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            const Acc g = to_acc(grad[v].values[i]);
            inner += g * to_acc(x.values[i]);
            scaled.values[i] = from_acc<T>(weight * g);
          }
          store_vec(reinterpret_cast<V*>(grad_rows + row * hidden_size + column), scaled);
        }
        inner = warp_sum(inner);
        if (lane == 0) partial[pair * kWarps + warp] += inner;
      }
    }
    __syncthreads();
    if (thread < num_pairs) {
      Acc inner = 0;
      for (int w = 0; w < kWarps; ++w) inner += partial[thread * kWarps + w];
      grad_weights.store(token, k0 + thread, inner);
    }
    __syncthreads();
  }
  for (int64_t row = token * top_k; row < (token + 1) * top_k; ++row) {
    const int64_t source = source_rows[row];
    if (source >= 0 && source < num_tokens) continue;
    for (int64_t column = int64_t{thread} * kVec; column < hidden_size; column += int64_t{kThreads} * kVec)
      store_vec(reinterpret_cast<V*>(grad_rows + row * hidden_size + column), V{});
  }
}

// Calls f with the widest vector of T, or with single elements where addresses or sizes are odd.
template <class T, class F>
void dispatch_vec(int alignment, F&& f) {
  if (alignment == 16)
    f.template operator()<kVecElements<T>>();
  else
    f.template operator()<1>();
}

// Blocks along the grid's second dimension, which walks along a row.
unsigned row_blocks(const char* op, int64_t hidden_size, int64_t num_blocks) {
  MOE_CHECK(num_blocks < (1 << 16), op, ": hidden_size must take fewer than 65536 blocks, got ", num_blocks, " for hidden_size=",
            hidden_size, "; align rows to 16 bytes or split them");
  return static_cast<unsigned>(num_blocks);
}

}  // namespace

Tensor permute_cuda(const Tensor& hidden_states_in, const Tensor& source_rows_in) {
  const Tensor hidden_states = with_contiguous_rows(hidden_states_in);
  const Tensor source_rows = torch::stable::contiguous(source_rows_in);
  MOE_CHECK(hidden_states.dim() == 2 && source_rows.dim() == 1 && source_rows.scalar_type() == ScalarType::Int,
            "permute: hidden_states must be 2-dimensional and source_rows 1-dimensional int32");
  const int64_t num_tokens = hidden_states.size(0), hidden_size = hidden_states.size(1), num_rows = source_rows.size(0);
  const DeviceScope scope(hidden_states);
  Tensor rows = torch::stable::new_empty(hidden_states, {num_rows, hidden_size});
  if (num_rows == 0 || hidden_size == 0) return rows;
  const int64_t element = static_cast<int64_t>(hidden_states.element_size());
  const int64_t row_bytes = hidden_size * element, stride_bytes = hidden_states.stride(0) * element;
  const auto move = [&]<class V>() {
    const int64_t vecs = row_bytes / static_cast<int64_t>(sizeof(V));
    const dim3 grid(grid_size("permute", ceil_div(num_rows, kWarps)),
                    row_blocks("permute", hidden_size, ceil_div(vecs, kVecsPerLane * kWarpSize)));
    launch(scope, permute_kernel<V>, grid, dim3(kWarpSize, kWarps), 0, data<V>(hidden_states), data<int32_t>(source_rows),
           mutable_data<V>(rows), num_tokens, num_rows, vecs, stride_bytes / static_cast<int64_t>(sizeof(V)));
  };
  switch (common_alignment(hidden_states.const_data_ptr(), rows.const_data_ptr(), row_bytes, stride_bytes)) {
    case 16: move.template operator()<Vec<uint32_t, 4>>(); break;
    case 8: move.template operator()<Vec<uint32_t, 2>>(); break;
    case 4: move.template operator()<Vec<uint32_t, 1>>(); break;
    default: move.template operator()<Vec<uint16_t, 1>>(); break;
  }
  return rows;
}


Tensor unpermute_cuda(const Tensor& rows_in, const Tensor& permuted_rows_in, const std::optional<Tensor>& topk_weights) {
  const Tensor rows = with_contiguous_rows(rows_in);
  const Tensor permuted_rows = torch::stable::contiguous(permuted_rows_in);
  MOE_CHECK(rows.dim() == 2 && permuted_rows.dim() == 2 && permuted_rows.scalar_type() == ScalarType::Int,
            "unpermute: rows must be 2-dimensional and permuted_rows 2-dimensional int32");
  const int64_t num_rows = rows.size(0), hidden_size = rows.size(1);
  const int64_t num_tokens = permuted_rows.size(0), top_k = permuted_rows.size(1);
  MOE_CHECK(!topk_weights || (topk_weights->dim() == 2 && topk_weights->size(0) == num_tokens && topk_weights->size(1) == top_k),
            "unpermute: topk_weights must be of shape [num_tokens, top_k]");
  const DeviceScope scope(rows);
  Tensor out = torch::stable::new_empty(rows, {num_tokens, hidden_size});
  if (num_tokens == 0 || hidden_size == 0) return out;
  dispatch_float("unpermute", rows.scalar_type(), [&]<class T>() {
    const int64_t row_bytes = hidden_size * static_cast<int64_t>(sizeof(T));
    const int64_t stride_bytes = rows.stride(0) * static_cast<int64_t>(sizeof(T));
    const int alignment = common_alignment(rows.const_data_ptr(), out.const_data_ptr(), row_bytes, stride_bytes);
    dispatch_vec<T>(alignment, [&]<int kVec>() {
      const dim3 grid(grid_size("unpermute", ceil_div(num_tokens, kWarps)),
                      row_blocks("unpermute", hidden_size, ceil_div(hidden_size, kSumsPerLane * kVec * kWarpSize)));
      launch(scope, unpermute_kernel<T, kVec>, grid, dim3(kWarpSize, kWarps), 0, data<T>(rows), data<int32_t>(permuted_rows),
             topk_weights ? floats_ref(*topk_weights) : FloatsRef{}, mutable_data<T>(out), num_rows, num_tokens, hidden_size,
             rows.stride(0), top_k);
    });
  });
  return out;
}

namespace {

std::tuple<Tensor, Tensor> unpermute_backward_cuda(const Tensor& grad_out_in, const Tensor& rows_in,
                                                   const Tensor& topk_weights, const Tensor& source_rows_in,
                                                   const Tensor& permuted_rows_in) {
  const Tensor grad_out = with_contiguous_rows(grad_out_in);
  const Tensor rows = with_contiguous_rows(rows_in);
  const Tensor source_rows = torch::stable::contiguous(source_rows_in);
  const Tensor permuted_rows = torch::stable::contiguous(permuted_rows_in);
  const int64_t num_rows = rows.size(0), hidden_size = rows.size(1);
  const int64_t num_tokens = permuted_rows.size(0), top_k = permuted_rows.size(1);
  MOE_CHECK(grad_out.size(0) == num_tokens && grad_out.size(1) == hidden_size &&
                grad_out.scalar_type() == rows.scalar_type() && topk_weights.dim() == 2 &&
                topk_weights.size(0) == num_tokens && topk_weights.size(1) == top_k && source_rows.size(0) == num_rows &&
                num_rows == num_tokens * top_k,
            "unpermute: the gradient must have the shape and dtype of the output");
  const DeviceScope scope(rows);
  Tensor grad_rows = torch::stable::new_empty(rows, {num_rows, hidden_size});
  Tensor grad_weights = torch::stable::new_empty(topk_weights, {num_tokens, top_k});
  if (num_rows == 0) return {grad_rows, grad_weights};
  dispatch_float("unpermute", rows.scalar_type(), [&]<class T>() {
    const int64_t size = static_cast<int64_t>(sizeof(T));
    const int alignment =
        std::min(common_alignment(rows.const_data_ptr(), grad_rows.const_data_ptr(), hidden_size * size, rows.stride(0) * size),
                 common_alignment(grad_out.const_data_ptr(), nullptr, grad_out.stride(0) * size));
    dispatch_vec<T>(alignment, [&]<int kVec>() {
      launch(scope, unpermute_bwd_kernel<T, kVec>, dim3(grid_size("unpermute", num_tokens)), dim3(kWarps * kWarpSize), 0,
             data<T>(grad_out), data<T>(rows), floats_ref(topk_weights), data<int32_t>(source_rows),
             data<int32_t>(permuted_rows), mutable_data<T>(grad_rows), floats_ref(grad_weights), num_rows, num_tokens,
             hidden_size, grad_out.stride(0), rows.stride(0), top_k);
    });
  });
  return {grad_rows, grad_weights};
}

}  // namespace
}  // namespace moe

MOE_CUDA_LIBRARY(m) {
  m.impl("permute", TORCH_BOX(&moe::permute_cuda));
  m.impl("unpermute", TORCH_BOX(&moe::unpermute_cuda));
  m.impl("unpermute_backward", TORCH_BOX(&moe::unpermute_backward_cuda));
}
