// plan_dispatch on CUDA: a stable counting sort of token-expert pairs. Nothing comes back to the host, launches and
// workspace depend on shapes alone, and the only atomics are on integers.
//
// Pairs are cut into tiles of kTile. Up to one tile (decoding) is one launch; more are three:
//   count    tile_rows[tile, e] = pairs of expert e in the tile
//   scan     expert_offsets, and tile_rows[tile, e] = first permuted row of the tile's pairs of e
//   scatter  each pair's row = first row of its tile and expert + its rank there
// Ids are read twice, each result is written once.
#include <tuple>

#include "common/vec.cuh"
#include "ops/permute/permute_cuda.h"

namespace moe {
namespace {

constexpr int kWarps = 8;                       // of count and scatter
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPairsPerThread = 8;
constexpr int kTile = kThreads * kPairsPerThread;
constexpr int kExpertsAtOnce = 512;             // more take further passes over the tile, which stays in registers
constexpr int kScanThreads = 1024;

struct Ids {
  const void* data;
  bool is_int64;
  int64_t token_stride, slot_stride;
  int32_t top_k;
  int32_t num_pairs, num_experts;

  // expert of a pair, or -1 where it is skipped
  __device__ __forceinline__ int expert(int pair) const {
    if (pair >= num_pairs) return -1;
    const int token = pair / top_k;
    const int64_t at = token * token_stride + (pair - token * top_k) * slot_stride;
    const int64_t id = is_int64 ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
    return id >= 0 && id < num_experts ? static_cast<int>(id) : -1;
  }
};

// Exclusive prefix sum over the block's threads; `total` gets the sum. Warps are at most 32, so one warp scans theirs.
template <int kBlockThreads>
__device__ __forceinline__ int block_exclusive_scan(int value, int* warp_sums, int* total) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int inclusive = warp_scan(value, lane);
  if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  int before = 0, all = 0;
  for (int w = 0; w < kBlockThreads / kWarpSize; ++w) {
    if (w == warp) before = all;
    all += warp_sums[w];
  }
  __syncthreads();
  *total = all;
  return before + inclusive - value;
}

__global__ void __launch_bounds__(kThreads) plan_count_kernel(Ids ids, int32_t* __restrict__ tile_rows) {  // [tiles, E]
  MOE_SHARED(int, counts, kExpertsAtOnce);
  const int thread = static_cast<int>(threadIdx.x);
  int experts[kPairsPerThread];
#pragma unroll
  for (int i = 0; i < kPairsPerThread; ++i)
    experts[i] = ids.expert(static_cast<int>(blockIdx.x) * kTile + i * kThreads + thread);
  for (int first = 0; first < ids.num_experts; first += kExpertsAtOnce) {
    const int num = min(kExpertsAtOnce, ids.num_experts - first);
    for (int e = thread; e < num; e += kThreads) counts[e] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPairsPerThread; ++i)
      if (experts[i] >= first && experts[i] < first + num) atomicAdd(&counts[experts[i] - first], 1);
    __syncthreads();
    for (int e = thread; e < num; e += kThreads)
      tile_rows[static_cast<int64_t>(blockIdx.x) * ids.num_experts + first + e] = counts[e];
    // the next pass zeroes them in the same threads
  }
}

// One block. Threads are experts, so that every access to tile_rows is contiguous over the warp.
__global__ void __launch_bounds__(kScanThreads)
    plan_scan_kernel(int32_t* __restrict__ tile_rows, int32_t* __restrict__ expert_offsets, int num_tiles, int num_experts) {
  MOE_SHARED(int, warp_sums, kScanThreads / kWarpSize);
  const int thread = static_cast<int>(threadIdx.x);
  int base = 0;
  for (int first = 0; first < num_experts; first += kScanThreads) {
    const int e = first + thread;
    int count = 0, total = 0;
    if (e < num_experts)
      for (int tile = 0; tile < num_tiles; ++tile) count += tile_rows[static_cast<int64_t>(tile) * num_experts + e];
    int row = base + block_exclusive_scan<kScanThreads>(count, warp_sums, &total);
    base += total;
    if (e < num_experts) {
      expert_offsets[e] = row;
      for (int tile = 0; tile < num_tiles; ++tile) {
        int32_t* at = tile_rows + static_cast<int64_t>(tile) * num_experts + e;
        const int in_tile = *at;
        *at = row;
        row += in_tile;
      }
    }
  }
  if (thread == 0) expert_offsets[num_experts] = base;
}

// Each warp ranks 32 * kPairsPerThread neighbouring pairs, 32 at a time, in its own histogram; warps are then put one
// after the other. Each pair gets a place among the tile's pairs, sorted by expert, so that neighbouring threads write
// neighbouring source_rows. kOneTile: there is no count and no scan before, places are rows.
template <bool kOneTile>
__global__ void __launch_bounds__(kThreads)
    plan_scatter_kernel(Ids ids, const int32_t* __restrict__ tile_rows,  // [tiles, num_experts], unless kOneTile
                        int32_t* __restrict__ expert_offsets,            // [num_experts + 1]
                        int32_t* __restrict__ source_rows,               // [num_pairs]
                        int32_t* __restrict__ permuted_rows) {           // [num_pairs]
  MOE_SHARED(int, histogram, kWarps * kExpertsAtOnce);
  MOE_SHARED(int, warp_sums, kWarps);
  MOE_SHARED(int, token_at, kTile);                        // of each place
  MOE_SHARED(int, row_at, kOneTile ? 1 : kTile);           // of each place
  MOE_SHARED(int, to_row, kOneTile ? 1 : kExpertsAtOnce);  // of each expert: what lies between its places and its rows
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int tile = static_cast<int>(blockIdx.x);
  const int first_pair = tile * kTile + warp * kWarpSize * kPairsPerThread + lane;
  int experts[kPairsPerThread], ranks[kPairsPerThread];
#pragma unroll
  for (int i = 0; i < kPairsPerThread; ++i) {
    experts[i] = ids.expert(first_pair + i * kWarpSize);
    const int pair = first_pair + i * kWarpSize;
    if (experts[i] < 0 && pair < ids.num_pairs) permuted_rows[pair] = -1;
  }
  int base = 0;  // places of the experts so far
  for (int first = 0; first < ids.num_experts; first += kExpertsAtOnce) {
    const int num = min(kExpertsAtOnce, ids.num_experts - first);
    for (int i = thread; i < kWarps * num; i += kThreads) histogram[i] = 0;
    __syncthreads();
    int* const counts = histogram + warp * num;
#pragma unroll
    for (int i = 0; i < kPairsPerThread; ++i) {
      const bool here = experts[i] >= first && experts[i] < first + num;
      const unsigned same = __match_any_sync(kAllLanes, here ? experts[i] : -1);
      const int before = __popc(same & ((1u << lane) - 1));
      if (here) ranks[i] = counts[experts[i] - first] + before;
      __syncwarp();
      if (here && before == 0) counts[experts[i] - first] += __popc(same);
      __syncwarp();
    }
    __syncthreads();
    // from counts to first places, in the order of the warps
    for (int e0 = 0; e0 < num; e0 += kThreads) {
      const int e = e0 + thread;
      int count = 0, total = 0;
      if (e < num)
        for (int w = 0; w < kWarps; ++w) count += histogram[w * num + e];
      int place = base + block_exclusive_scan<kThreads>(count, warp_sums, &total);
      base += total;
      if (e < num) {
        if (kOneTile)
          expert_offsets[first + e] = place;
        else
          to_row[e] = tile_rows[static_cast<int64_t>(tile) * ids.num_experts + first + e] - place;
        for (int w = 0; w < kWarps; ++w) {
          const int of_warp = histogram[w * num + e];
          histogram[w * num + e] = place;
          place += of_warp;
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPairsPerThread; ++i) {
      if (experts[i] < first || experts[i] >= first + num) continue;
      const int e = experts[i] - first, place = counts[e] + ranks[i], pair = first_pair + i * kWarpSize;
      const int row = kOneTile ? place : place + to_row[e];
      permuted_rows[pair] = row;
      token_at[place] = pair / ids.top_k;
      if (!kOneTile) row_at[place] = row;
    }
    __syncthreads();
  }
  if (kOneTile && thread == 0) expert_offsets[ids.num_experts] = base;
  const int num_permuted = kOneTile ? base : expert_offsets[ids.num_experts];
#pragma unroll
  for (int i = 0; i < kPairsPerThread; ++i) {
    const int row = first_pair + i * kWarpSize, place = row - tile * kTile;
    if (place < base) source_rows[kOneTile ? place : row_at[place]] = token_at[place];
    if (row >= num_permuted && row < ids.num_pairs) source_rows[row] = -1;  // belongs to nobody
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> plan_dispatch_cuda(const Tensor& topk_ids, int64_t num_experts) {
  MOE_CHECK(topk_ids.dim() == 2, "plan_dispatch: topk_ids must be of shape [num_tokens, top_k]");
  MOE_CHECK(num_experts >= 0 && num_experts < (int64_t{1} << 31) - kScanThreads,
            "plan_dispatch: num_experts must be in [0, 2**31 - 1024), got ", num_experts);
  MOE_CHECK(topk_ids.scalar_type() == ScalarType::Int || topk_ids.scalar_type() == ScalarType::Long,
            "plan_dispatch: ids must be int32 or int64");
  const int64_t num_tokens = topk_ids.size(0), top_k = topk_ids.size(1), num_pairs = num_tokens * top_k;
  MOE_CHECK(num_pairs < (int64_t{1} << 31) - kTile, "plan_dispatch: num_tokens * top_k must be below 2**31 - ", kTile,
            ", got ", num_pairs);
  const DeviceScope scope(topk_ids);
  Tensor expert_offsets = torch::stable::new_empty(topk_ids, {num_experts + 1}, ScalarType::Int);
  Tensor source_rows = torch::stable::new_empty(topk_ids, {num_pairs}, ScalarType::Int);
  Tensor permuted_rows = torch::stable::new_empty(topk_ids, {num_tokens, top_k}, ScalarType::Int);
  const Ids ids{topk_ids.const_data_ptr(), topk_ids.scalar_type() == ScalarType::Long, topk_ids.stride(0), topk_ids.stride(1),
                static_cast<int32_t>(top_k), static_cast<int32_t>(num_pairs), static_cast<int32_t>(num_experts)};
  int32_t* offsets = mutable_data<int32_t>(expert_offsets);
  int32_t* source = mutable_data<int32_t>(source_rows);
  int32_t* permuted = mutable_data<int32_t>(permuted_rows);
  const auto num_tiles = static_cast<int>(ceil_div(num_pairs, kTile));
  if (num_tiles == 1) {
    launch(scope, plan_scatter_kernel<true>, dim3(1), dim3(kThreads), 0, ids, nullptr, offsets, source, permuted);
    return {expert_offsets, source_rows, permuted_rows};
  }
  Tensor tile_rows = torch::stable::new_empty(topk_ids, {num_tiles, num_experts}, ScalarType::Int);
  int32_t* tiles = mutable_data<int32_t>(tile_rows);
  if (num_tiles > 0) launch(scope, plan_count_kernel, dim3(num_tiles), dim3(kThreads), 0, ids, tiles);
  launch(scope, plan_scan_kernel, dim3(1), dim3(kScanThreads), 0, tiles, offsets, num_tiles, ids.num_experts);
  if (num_tiles > 0)
    launch(scope, plan_scatter_kernel<false>, dim3(num_tiles), dim3(kThreads), 0, ids, tiles, offsets, source, permuted);
  return {expert_offsets, source_rows, permuted_rows};
}

}  // namespace moe

MOE_CUDA_LIBRARY(m) { m.impl("plan_dispatch", TORCH_BOX(&moe::plan_dispatch_cuda)); }
