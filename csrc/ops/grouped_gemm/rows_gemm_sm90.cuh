// The grouped GEMM of compute capability 9.0a: out[r] = activation(weights[e] @ x[r] + bias[e]) for the rows of each expert.
//
// wgmma multiplies 64 rows of its first operand. Those are output features here, and the tokens are its second operand,
// of which there may be 16, 32, 64 or 128: an expert with few tokens wastes few products, decode and prefill are one
// kernel, and whatever the tile, an output is one chain of steps of 16 features: the same bits in any batch.
//
// A block is three warpgroups: one thread of the first fetches by tensor copies, two warpgroups multiply. Blocks stay, and
// take tile after tile while the fetching runs ahead. Of each stage a multiplying warpgroup takes two blocks of 64
// features: gate and up of the same features, so that the activation finds both in one thread.
//
// Rows are not gathered here. cp.async can gather them, but what it wrote must be fenced for wgmma, and the fence waits
// for all that its thread has under way: on an H200 the first product of Mixtral then ran at 585 TFLOP/s at best (four
// warps taking turns: 370), with rows gathered before, at 727, and gathering them took 1 % of that time.
//
// Sources: CUTLASS (warp specialisation, persistent tiles); the swap of operands is usual where tokens are few.
#pragma once

#include "common/activation.h"
#include "common/cuda_launch.cuh"
#include "common/ptx.cuh"
#include "common/ptx_sm90.cuh"
#include "common/vec.cuh"

namespace moe::sm90 {

constexpr int kWarpgroup = 128;
constexpr int kThreads = 3 * kWarpgroup;
// A block is launched with 168 registers a thread (65536 / 384, rounded down to 8); what one role gives up another may
// take. Asking for more than there are waits for ever: 48 + 2 * 232 did.
constexpr int kFetchRegisters = 40, kMultiplyRegisters = 232;
static_assert(kFetchRegisters + 2 * kMultiplyRegisters <= 3 * 168);
constexpr int kDepth = 64;                     // of a stage: 128 bytes, one row of the swizzle
constexpr int kWeightRows = 128;               // of one tensor copy; a stage holds two
constexpr int kWeightBytes = 2 * kWeightRows * kDepth * 2;
constexpr int kGroup = 8;                      // token tiles that share each block of weights while it lies in L2

struct __align__(64) TensorMap {
  char bytes[128];
};

struct ActivationNumbers {
  int kind;
  float alpha, gate_limit, up_limit, act_limit, up_offset;
};

template <class T>
struct RowsGemm {
  const int32_t* expert_offsets;  // [num_experts + 1]
  const T* bias;  // null, or [num_experts, ...]: gate or only feature f at bias[f * bias_step], up at + bias_up
  int64_t bias_expert_stride, bias_step, bias_up;
  T* out;  // [num_rows, num_columns]
  int num_rows, num_experts, num_columns, depth;
  ActivationNumbers activation;
};

// Where things lie in dynamic shared memory, which starts at a multiple of 1024.
template <int kTokens>
struct Layout {
  static constexpr int kTokenBytes = kTokens * kDepth * 2;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  static constexpr int kStagedTokens = kTokens < 64 ? kTokens : 64;
  static constexpr int kStagingBytes = 8 * kStagedTokens * 32;  // of each multiplying warp, [kStagedTokens, 16] of the output
  static constexpr int kStages = (220 * 1024 - kStagingBytes) / kStageBytes < 6 ? (220 * 1024 - kStagingBytes) / kStageBytes : 6;
  static constexpr int kStaging = kStages * kStageBytes;
  static constexpr int kBarriers = kStaging + kStagingBytes;
  static constexpr int kPrefix = kBarriers + 2 * 8 * kStages;
  static int bytes(int num_experts) { return 1024 + kPrefix + 4 * (num_experts + 1); }
};

#if defined(__CUDACC__)

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

template <ActivationKind kKind>
__device__ __forceinline__ float act(float x, float alpha) {
  if constexpr (kKind == ActivationKind::silu) {
    return x * sigmoid(alpha * x);
  } else if constexpr (kKind == ActivationKind::gelu) {
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752440f));
  } else if constexpr (kKind == ActivationKind::gelu_tanh) {
    const float inner = 0.79788456080286535588f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (2.0f - __fdividef(2.0f, __expf(2.0f * inner) + 1.0f));
  } else {
    const float positive = x > 0.0f || x != x ? x : 0.0f;
    return kKind == ActivationKind::relu ? positive : positive * positive;
  }
}

// min and clamp that keep NaN, as torch.clamp does
__device__ __forceinline__ float at_most(float x, float limit) { return x > limit ? limit : x; }
__device__ __forceinline__ float clamped(float x, float limit) {
  const float low = x < -limit ? -limit : x;
  return low > limit ? limit : low;
}

// Of sums that have their bias: gated, sums[0] becomes act(sums[0]) * sums[1]; else each its own act.
template <ActivationKind kKind, bool kGated, int kSums>
__device__ __forceinline__ void activate(float (&sums)[2][kSums], const ActivationNumbers& numbers) {
#pragma unroll
  for (int t = 0; t < (kGated ? 1 : 2); ++t)
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const float x = at_most(act<kKind>(at_most(sums[t][i], numbers.gate_limit), numbers.alpha), numbers.act_limit);
      sums[t][i] = kGated ? x * (clamped(sums[1][i], numbers.up_limit) + numbers.up_offset) : x;
    }
}

// The tile of a number: expert, first token row and end of the expert's rows, first feature.
struct Tile {
  int expert, first_row, end_row, first_column;
};

template <int kTokens>
__device__ __forceinline__ Tile tile_of(int number, const int* prefix, const int32_t* offsets, int num_experts,
                                        int num_token_tiles, int num_column_blocks, int columns_per_tile) {
  const int group = number / (kGroup * num_column_blocks), of_group = number % (kGroup * num_column_blocks);
  const int left = num_token_tiles - group * kGroup, size = left < kGroup ? left : kGroup;
  const int token_tile = group * kGroup + of_group % size;
  int low = 0, high = num_experts - 1;  // the last expert whose tiles begin at or before token_tile and are some
  while (low < high) {
    const int middle = (low + high) / 2;
    if (prefix[middle + 1] <= token_tile)
      low = middle + 1;
    else
      high = middle;
  }
  return {low, offsets[low] + (token_tile - prefix[low]) * kTokens, offsets[low + 1], of_group / size * columns_per_tile};
}

template <class T, int kTokens, bool kActivates, bool kGated>
__global__ void __launch_bounds__(kThreads, 1)
    rows_gemm_kernel(const __grid_constant__ TensorMap weights,  // [num_experts, 2 or 1, num_columns, depth], 128-row boxes
                     const __grid_constant__ TensorMap tokens,   // [num_rows, depth], kTokens-row boxes
                     const __grid_constant__ RowsGemm<T> gemm) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<kTokens>;
  constexpr int kStages = L::kStages;
  constexpr int kColumns = kGated ? kWeightRows : 2 * kWeightRows;  // of a tile
  extern __shared__ unsigned char unaligned[];
  const uint32_t memory = (ptx::shared_address(unaligned) + 1023) & ~1023u;
  unsigned char* aligned = unaligned + (memory - ptx::shared_address(unaligned));
  int* prefix = reinterpret_cast<int*>(aligned + L::kPrefix);  // token tiles of the experts before
  const uint32_t full = memory + L::kBarriers, empty = full + 8 * kStages;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;

  if (thread == 0)
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, 8);  // multiplying warps
    }
  if (warp == 0) {
    int before = 0;
    for (int e0 = 0; e0 < gemm.num_experts; e0 += kWarpSize) {
      const int e = e0 + lane;
      int tiles = 0;
      if (e < gemm.num_experts) {
        const int begin = gemm.expert_offsets[e], end = gemm.expert_offsets[e + 1];
        const bool sound = begin >= 0 && end > begin && end <= gemm.num_rows;  // else nobody's
        tiles = sound ? (end - begin + kTokens - 1) / kTokens : 0;
      }
      int sum = tiles;
      for (int step = 1; step < kWarpSize; step *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, step);
        if (lane >= step) sum += other;
      }
      if (e < gemm.num_experts) prefix[e] = before + sum - tiles;
      before += __shfl_sync(kAllLanes, sum, kWarpSize - 1);
    }
    if (lane == 0) prefix[gemm.num_experts] = before;
  }
  __syncthreads();
  const int num_token_tiles = prefix[gemm.num_experts];
  const int num_column_blocks = (gemm.num_columns + kColumns - 1) / kColumns;
  const int num_tiles = num_token_tiles * num_column_blocks;
  const int num_steps = (gemm.depth + kDepth - 1) / kDepth;
  const auto tile_at = [&](int number) {
    return tile_of<kTokens>(number, prefix, gemm.expert_offsets, gemm.num_experts, num_token_tiles, num_column_blocks,
                            kColumns);
  };

  if (warp < 4) {  // fetches
    ptx::fewer_registers<kFetchRegisters>();
    if (thread != 0) return;
    int stage = 0;
    uint32_t phase = 0;
    for (int number = static_cast<int>(blockIdx.x); number < num_tiles; number += static_cast<int>(gridDim.x)) {
      const Tile tile = tile_at(number);
      for (int step = 0; step < num_steps; ++step) {
        const int k = step * kDepth;
        const uint32_t at = memory + stage * L::kStageBytes, barrier = full + 8 * stage;
        ptx::mbarrier_wait(empty + 8 * stage, phase ^ 1);
        ptx::mbarrier_arrive_expect(barrier, L::kStageBytes);
#pragma unroll
        for (int half = 0; half < 2; ++half)
          ptx::tensor_copy_4d(at + half * (kWeightBytes / 2), &weights, k,
                              tile.first_column + (kGated ? 0 : half * kWeightRows), kGated ? half : 0, tile.expert, barrier);
        ptx::tensor_copy_2d(at + kWeightBytes, &tokens, k, tile.first_row, barrier);
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
    }
    return;
  }

  ptx::more_registers<kMultiplyRegisters>();
  const int group = warp / 4 - 1, warp_of_group = warp % 4;
  // its two blocks of 64 features in a stage: of the gate and of up, or neighbours
  const uint32_t block0 = (kGated ? group * 64 : group * 128) * 128;
  const uint32_t block1 = block0 + (kGated ? kWeightBytes / 2 : 64 * 128);
  const uint32_t staging = memory + L::kStaging + (warp - 4) * (L::kStagedTokens * 32);
  int stage = 0;
  uint32_t phase = 0;
  for (int number = static_cast<int>(blockIdx.x); number < num_tiles; number += static_cast<int>(gridDim.x)) {
    const Tile tile = tile_at(number);
    float sums[2][kTokens / 2];
    int last = 0;
    for (int step = 0; step < num_steps; ++step) {
      ptx::mbarrier_wait(full + 8 * stage, phase);
      const uint32_t at = memory + stage * L::kStageBytes;
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        const uint64_t right = ptx::swizzled_rows(at + kWeightBytes + 32 * k);
        ptx::wgmma<T>(sums[0], ptx::swizzled_rows(at + block0 + 32 * k), right, step + k);
        ptx::wgmma<T>(sums[1], ptx::swizzled_rows(at + block1 + 32 * k), right, step + k);
      }
      ptx::wgmma_commit();
      if (step > 0) {
        ptx::wgmma_wait<1>();  // the step before: its stage may be filled again
        if (lane == 0) ptx::mbarrier_arrive(empty + 8 * last);
      }
      last = stage;
      if (++stage == kStages) stage = 0, phase ^= 1;
    }
    ptx::wgmma_wait<0>();
    if (lane == 0) ptx::mbarrier_arrive(empty + 8 * last);
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) asm volatile("" : "+f"(sums[t][i])::"memory");  // not read before the wait

    // a thread holds features lane / 4 and 8 more of its warp's 16, of tokens 8 i + 2 (lane % 4) and the next
    const int first_column = tile.first_column + group * (kGated ? 64 : 128) + warp_of_group * 16;
    if (gemm.bias != nullptr) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        float bias[2] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int column = first_column + (kGated ? 0 : t * 64) + lane / 4 + 8 * h;
          if (column < gemm.num_columns)
            bias[h] = to_acc(gemm.bias[tile.expert * gemm.bias_expert_stride + column * gemm.bias_step +
                                       (kGated && t == 1 ? gemm.bias_up : 0)]);
        }
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) sums[t][i] += bias[i / 2 % 2];
      }
    }
    // the kind is asked once, not for each value: with a branch a value the code did not fit the instruction cache, and the
    // rest of a tile took 22 us on an H200
    if constexpr (kActivates) switch (static_cast<ActivationKind>(gemm.activation.kind)) {
        case ActivationKind::silu: activate<ActivationKind::silu, kGated>(sums, gemm.activation); break;
        case ActivationKind::gelu: activate<ActivationKind::gelu, kGated>(sums, gemm.activation); break;
        case ActivationKind::gelu_tanh: activate<ActivationKind::gelu_tanh, kGated>(sums, gemm.activation); break;
        case ActivationKind::relu: activate<ActivationKind::relu, kGated>(sums, gemm.activation); break;
        case ActivationKind::relu2: activate<ActivationKind::relu2, kGated>(sums, gemm.activation); break;
      }
    constexpr int kStaged = L::kStagedTokens;
#pragma unroll
    for (int t = 0; t < (kGated ? 1 : 2); ++t)
#pragma unroll
      for (int part = 0; part < kTokens; part += kStaged) {
        __syncwarp();  // the values before have been read
#pragma unroll
        for (int i = 0; i < kStaged / 8; i += 2) {
          const float* values = &sums[t][part / 2 + 4 * i];
          const int token = 8 * (i + lane / 16) + lane % 8, half = lane / 8 % 2;
          ptx::stmatrix_x4_trans(staging + token * 32 + ((half ^ (token >> 2 & 1)) << 4), ptx::cvt_pair<T>(values[0], values[1]),
                                 ptx::cvt_pair<T>(values[2], values[3]), ptx::cvt_pair<T>(values[4], values[5]),
                                 ptx::cvt_pair<T>(values[6], values[7]));
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kStaged / 16; ++i) {
          const int token = 16 * i + lane / 2, half = lane % 2, column = first_column + t * 64 + 8 * half;
          const int row = tile.first_row + part + token;
          uint32_t words[4];
          ptx::ld_shared_v4(staging + token * 32 + ((half ^ (token >> 2 & 1)) << 4), words);
          if (row < tile.end_row && column < gemm.num_columns)
            ptx::st_global_v4(gemm.out + static_cast<int64_t>(row) * gemm.num_columns + column, words);
        }
      }
  }
#endif
}

#endif

}  // namespace moe::sm90
