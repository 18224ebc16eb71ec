// fuse_logits on CUDA, forward. A row is cut into blocks of kBlock tokens, whatever the batch, and a warp takes blocks one
// after the other: it fuses them and keeps a Record of each; a row's Record is made of its blocks', in one order, and
// finishes the result. Sums run over lanes in one fixed tree. Nothing is shared between warps but through memory, between
// launches.
//
// What has to be known of a source's whole row before it can be fused (a mixture's sums, the largest logit under a filter,
// the smallest one that a floor keeps) is measured before; what has to be known of the fused row before its smallest are
// left out (`keep`), by fusing it twice.
//
// A fused logit is a sum of two numbers, of which the second is what the first lost by rounding: what is left beside the
// largest logit is then rounded once, however large both are. python/moe_kernels/ops/logit_fusion has the equations.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/vec.cuh"
#include "microkernels/logit_table.h"
#include "ops/logit_fusion/draw.h"

namespace moe {
namespace {

constexpr int kWarps = 4;  // of a block of threads
constexpr int kBlock = 512;
constexpr int kPerLane = kBlock / kWarpSize;
constexpr int kVec = 4;  // neighbours that a lane reads at once
constexpr int kMaxSources = 16;
constexpr int kMinBlocks = 2;  // of a warp: it reads the row's weights once for all of them
constexpr int64_t kFullWarps = 8192;  // that keep every GPU busy
constexpr int kNobody = 0x7fffffff;
// Blocks that must fit on a multiprocessor: without a number ptxas aims at fewer registers than there are, and spills.
template <class Acc>
constexpr int kResident = sizeof(Acc) == sizeof(double) ? 2 : 4;
template <class Acc>
constexpr int kResidentFusing = sizeof(Acc) == sizeof(double) ? 2 : 3;

template <class Acc>
constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
template <class Acc>
constexpr Acc kNaN = std::numeric_limits<Acc>::quiet_NaN();

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

// Of some logits: the largest (+inf says that the row is broken), what it lost by rounding, the sum of exp(logit - largest),
// and the smallest above -inf.
enum { kTop, kLow, kSum, kSmallest };
template <class Acc>
using Record = Vec<Acc, 4>;

struct Source {
  const void* data;
  int64_t stride;
  ScalarType dtype;
  bool aligned;  // kVec neighbours lie at a multiple of their size
};

template <class Acc>
struct Fusion {
  Source sources[kMaxSources];
  FloatsRef weights, temperature;  // [num_rows, num_sources], [num_rows]
  const int64_t* rows;             // [num_rows, num_sources] of the one source, or null
  int64_t num_source_rows;
  int num_sources, anchor, vocab_size, num_blocks, blocks_each;
  NegInf neg_inf;
  bool mixture, greedy;                 // greedy: a temperature of 0 breaks no row
  bool has_mask, has_floor, has_min_p;  // has_floor: of a filter of min_p or of neg_inf
  Acc mask, floor;                      // log(min_p)
  const Record<Acc>* measured;          // [num_rows, num_sources]
  const Record<Acc>* kept;              // [num_rows] of the row before `keep`, or null
  Acc keep;

  // whether a source's whole row must be read before it is fused
  __device__ __forceinline__ bool needs(Acc weight, int k) const {
    return weight != 0 && (mixture || (k == anchor ? has_mask : has_floor && weight < 0));
  }
  // x or -inf of tokens [first, first + kVec), what is not wanted 0
  __device__ __forceinline__ Vec<Acc, kVec> load(int k, int64_t row, int first, unsigned wanted) const {
    const Source& source = sources[rows == nullptr ? k : 0];
    const int64_t at = row * source.stride + first;
    const bool whole = source.aligned && first + kVec <= vocab_size;
    if constexpr (sizeof(Acc) == sizeof(double)) return load_as<double>(source, at, wanted, false);
    switch (source.dtype) {
      case ScalarType::Float: return load_as<float>(source, at, wanted, whole);
      case ScalarType::BFloat16: return load_as<bf16>(source, at, wanted, whole);
      default: return load_as<fp16>(source, at, wanted, whole);
    }
  }

 private:
  template <class T>
  static __device__ __forceinline__ Vec<Acc, kVec> load_as(const Source& source, int64_t at, unsigned wanted, bool whole) {
    const T* const from = static_cast<const T*>(source.data) + at;
    Vec<Acc, kVec> x{};
    if (wanted == 0) return x;
    Vec<T, kVec> raw{};
    if constexpr (sizeof(T) < sizeof(double)) {
      if (whole) raw = *reinterpret_cast<const Vec<T, kVec>*>(from);
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (wanted >> i & 1) x.values[i] = static_cast<Acc>(to_acc(whole ? raw.values[i] : from[i]));
    return x;
  }
};

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x); }

// The token of a lane's j-th value, in the block that begins at `first`.
__device__ __forceinline__ int token_of(int first, int j) {
  return first + j / kVec * kVec * kWarpSize + lane_id() * kVec + j % kVec;
}

template <class Acc>
__device__ __forceinline__ Acc warp_max(Acc x) {
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    const Acc other = __shfl_xor_sync(kAllLanes, x, lanes);
    x = other > x ? other : x;
  }
  return x;
}

template <class T>
__device__ __forceinline__ T warp_min(T x) {
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, x, lanes);
    x = other < x ? other : x;
  }
  return x;
}

// What is taken off logits of which `top` is the largest: nothing where there is none above -inf.
template <class Acc>
__device__ __forceinline__ Acc shift_of(Acc top) {
  return top > -kInfinity<Acc> ? top : Acc{0};
}

// z - top, rounded once.
template <class Acc>
__device__ __forceinline__ Acc beside(Acc z, Acc low, Acc top, Acc top_low) {
  return (z - shift_of(top)) + (low - top_low);
}

// (total, low) + a b, where low is what total lost by rounding. Knuth's two-sum; float64 has digits to spare.
__device__ __forceinline__ void add_product(float& total, float& low, float a, float b) {
  const float product = ptx::mul_rn_f32(a, b), sum = total + product, back = sum - total;
  low += ((total - (sum - back)) + (product - back)) + fmaf(a, b, -product);
  total = sum;
}
__device__ __forceinline__ void add_product(double& total, double&, double a, double b) { total += a * b; }

// What a warp knows of its row: lane k holds what is source k's.
template <class Acc>
struct RowState {
  Acc weight, weight_sum, temperature;
  int64_t at;         // its row of the source
  Acc first, second;  // its largest logit and log(weight / sum of exp(logit - largest)) in a mixture; else its floor
  Acc mask_bound, keep_bound;
  bool broken;

  __device__ __forceinline__ RowState(const Fusion<Acc>& f, int64_t row) {
    const int k = lane_id();
    const bool is_source = k < f.num_sources;
    weight = is_source ? f.weights.template load<Acc>(row, k) : Acc{0};
    temperature = f.temperature.template load<Acc>(0, row);
    bool bad = !(weight < kInfinity<Acc> && weight > -kInfinity<Acc>) || (f.mixture && weight < 0);
    bad |= !(temperature >= 0 && temperature < kInfinity<Acc>) || (temperature == 0 && !f.greedy);
    at = row;
    if (f.rows != nullptr && is_source) {
      at = f.rows[row * f.num_sources + k];
      bad |= at < 0 || at >= f.num_source_rows;
    }
    first = -kInfinity<Acc>;
    second = 0;
    Acc anchors_top = -kInfinity<Acc>;
    if (f.measured != nullptr && is_source && f.needs(weight, k)) {
      const Record<Acc> whole = f.measured[row * f.num_sources + k];
      bad |= whole.values[kTop] == kInfinity<Acc>;
      if (f.mixture) {
        first = whole.values[kTop];
        second = logarithm(weight) - logarithm(whole.values[kSum]);
      } else if (k != f.anchor) {
        if (f.has_min_p) first = whole.values[kTop] + f.floor;
        const Acc smallest = whole.values[kSmallest];
        if (f.neg_inf == NegInf::floor && smallest < kInfinity<Acc> && smallest > first) first = smallest;
      }
      if (k == f.anchor) anchors_top = whole.values[kTop];
    }
    mask_bound = __shfl_sync(kAllLanes, anchors_top, f.anchor) + f.mask;
    keep_bound = f.kept == nullptr ? -kInfinity<Acc> : f.kept[row].values[kTop] + f.keep;
    broken = __any_sync(kAllLanes, bad);
    weight_sum = warp_sum(weight);
    if (temperature == 0) temperature = 1;
  }

  __device__ __forceinline__ Acc weight_of(int k) const { return __shfl_sync(kAllLanes, weight, k); }
  __device__ __forceinline__ int64_t at_of(int k) const { return __shfl_sync(kAllLanes, at, k); }
};

// One source's logits of a block; `wanted`: a bit for each of the lane's tokens.
template <class Acc>
__device__ __forceinline__ void load_block(const Fusion<Acc>& f, int k, int64_t at, int first, unsigned wanted,
                                           Acc (&x)[kPerLane]) {
#pragma unroll
  for (int j = 0; j < kPerLane; j += kVec) {
    const Vec<Acc, kVec> part = f.load(k, at, token_of(first, j), wanted >> j & ((1u << kVec) - 1));
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[j + i] = part.values[i];
  }
}

template <class Acc>
__device__ __forceinline__ unsigned tokens_inside(const Fusion<Acc>& f, int first) {
  unsigned inside = 0;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) inside |= static_cast<unsigned>(token_of(first, j) < f.vocab_size) << j;
  return inside;
}

// The weighted sum of a block's `kept` tokens, and what it lost. Returns the bits of tokens at -inf in `absent`, of tokens
// that break the row in `bad`.
template <class Acc>
__device__ __forceinline__ void add_sources(const Fusion<Acc>& f, const RowState<Acc>& state, int first, unsigned kept,
                                            Acc (&z)[kPerLane], Acc (&low)[kPerLane], unsigned& absent, unsigned& bad) {
  unsigned alone = 0;  // the anchor is, where a negative weight meets -inf
  for (int k = 0; k < f.num_sources; ++k) {
    const Acc weight = state.weight_of(k), floor = __shfl_sync(kAllLanes, state.first, k);
    const int64_t at = state.at_of(k);
    if (weight == 0) continue;
    const bool is_other = k != f.anchor, is_negative = weight < 0;
    Acc x[kPerLane];
    load_block(f, k, at, first, kept, x);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      bad |= static_cast<unsigned>(!(x[j] < kInfinity<Acc>)) << j;
      if (is_other && is_negative && x[j] < floor) x[j] = floor;
      const unsigned none = static_cast<unsigned>(x[j] == -kInfinity<Acc>) << j;
      if (f.neg_inf == NegInf::zero && is_other && is_negative)
        alone |= none;
      else
        absent |= none;
      if (none == 0) add_product(z[j], low[j], weight, x[j]);
    }
  }
  if (!__any_sync(kAllLanes, alone != 0)) return;
  Acc anchor[kPerLane];
  const Acc anchor_weight = state.weight_of(f.anchor);
  load_block(f, f.anchor, state.at_of(f.anchor), first, anchor_weight == 0 ? 0u : kept & alone & ~absent, anchor);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j)
    if (alone >> j & 1) {
      z[j] = low[j] = 0;
      add_product(z[j], low[j], state.weight_sum, anchor[j]);
    }
}

// The logarithm of a mixture's probabilities.
template <class Acc>
__device__ __forceinline__ void mix_sources(const Fusion<Acc>& f, const RowState<Acc>& state, int first, unsigned kept,
                                            Acc (&z)[kPerLane], unsigned& absent) {
  Acc tops[kPerLane];  // of the terms so far, of which z is the sum of exp(term - top)
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) tops[j] = -kInfinity<Acc>;
  for (int k = 0; k < f.num_sources; ++k) {
    const Acc weight = state.weight_of(k), largest = __shfl_sync(kAllLanes, state.first, k),
              shift = __shfl_sync(kAllLanes, state.second, k);
    const int64_t at = state.at_of(k);
    if (!(weight > 0) || !(largest > -kInfinity<Acc>)) continue;
    Acc x[kPerLane];
    load_block(f, k, at, first, kept, x);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const Acc term = (x[j] - largest) + shift;
      const Acc top = term > tops[j] ? term : tops[j];
      z[j] = z[j] * exponential(tops[j] - shift_of(top)) + exponential(term - shift_of(top));
      tops[j] = top;
    }
  }
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const bool none = !(tops[j] > -kInfinity<Acc>);
    absent |= static_cast<unsigned>(none) << j;
    z[j] = none ? Acc{0} : logarithm(z[j]) + tops[j];
  }
}

// z of a block of tokens, and what it lost by rounding. +inf says that the row is broken.
template <class Acc>
__device__ __forceinline__ void fuse_block(const Fusion<Acc>& f, const RowState<Acc>& state, int first,
                                           Acc (&z)[kPerLane], Acc (&low)[kPerLane]) {
  unsigned kept = tokens_inside(f, first), absent = 0, bad = 0;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) z[j] = low[j] = 0;
  if (f.has_mask && state.weight_of(f.anchor) != 0) {
    Acc anchor[kPerLane];
    load_block(f, f.anchor, state.at_of(f.anchor), first, kept, anchor);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) kept &= ~(static_cast<unsigned>(!(anchor[j] >= state.mask_bound)) << j);
  }
  if (state.broken) kept = 0;
  if (f.mixture)
    mix_sources(f, state, first, kept, z, absent);
  else
    add_sources(f, state, first, kept, z, low, absent, bad);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const Acc quotient = z[j] / state.temperature;
    if constexpr (sizeof(Acc) == sizeof(float))
      low[j] = (fmaf(-quotient, state.temperature, z[j]) + low[j]) / state.temperature;
    z[j] = quotient + low[j];
    low[j] -= z[j] - quotient;
    if (!(kept >> j & 1) || (absent >> j & 1)) z[j] = -kInfinity<Acc>;
    if ((bad >> j & 1) || z[j] != z[j] || state.broken) z[j] = kInfinity<Acc>;
    if (!(z[j] >= state.keep_bound)) z[j] = -kInfinity<Acc>;
    if (!(z[j] > -kInfinity<Acc> && z[j] < kInfinity<Acc>)) low[j] = 0;
  }
}

template <class Acc>
__device__ __forceinline__ void store_record(Record<Acc>* to, const Record<Acc>& record) {
  if (lane_id() == 0) store_vec(to, record);
}

// Blocks [first, end) are this warp's.
template <class Acc>
struct Blocks {
  int first, end;
  __device__ __forceinline__ explicit Blocks(const Fusion<Acc>& f)
      : first(static_cast<int>(blockIdx.y * kWarps + threadIdx.y) * f.blocks_each), end(min(first + f.blocks_each, f.num_blocks)) {}
};

// Records of blocks of source rows, where fusing needs them.
template <class Acc>
__global__ void __launch_bounds__(kWarps* kWarpSize, kResident<Acc>)
    measure_logits_kernel(const __grid_constant__ Fusion<Acc> f, Record<Acc>* __restrict__ records) {  // [num_rows, num_sources, num_blocks]
  const int64_t row = blockIdx.x;
  const RowState<Acc> state(f, row);
  const Blocks<Acc> blocks(f);
  for (int block = blocks.first; block < blocks.end; ++block) {
    const unsigned inside = tokens_inside(f, block * kBlock);
    for (int k = 0; k < f.num_sources; ++k) {
      const int64_t at = state.at_of(k);
      const bool is_there = f.rows == nullptr || (at >= 0 && at < f.num_source_rows);
      const bool needed = is_there && f.needs(state.weight_of(k), k);
      Acc x[kPerLane];
      load_block(f, k, at, block * kBlock, needed ? inside : 0u, x);
      Acc top = -kInfinity<Acc>, smallest = kInfinity<Acc>, sum = 0;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        if (!(inside >> j & 1)) x[j] = -kInfinity<Acc>;
        if (x[j] != x[j]) x[j] = kInfinity<Acc>;
        top = x[j] > top ? x[j] : top;
        if (x[j] > -kInfinity<Acc> && x[j] < smallest) smallest = x[j];
      }
      top = warp_max(top);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) sum += exponential(x[j] - shift_of(top));
      store_record(records + (row * f.num_sources + k) * f.num_blocks + block, {{top, Acc{0}, warp_sum(sum), warp_min(smallest)}});
    }
  }
}

// The Record of a row, of its blocks'.
template <class Acc>
__global__ void __launch_bounds__(kWarps* kWarpSize, kResident<Acc>)
    total_logits_kernel(const Record<Acc>* __restrict__ records,  // [num_rows, num_blocks]
                 Record<Acc>* __restrict__ totals,         // [num_rows]
                 int64_t num_rows, int num_blocks) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= num_rows) return;
  const Record<Acc>* const of_row = records + row * num_blocks;
  Acc top = -kInfinity<Acc>, smallest = kInfinity<Acc>, low = -kInfinity<Acc>, sum = 0;
  for (int block = lane_id(); block < num_blocks; block += kWarpSize) {
    top = of_row[block].values[kTop] > top ? of_row[block].values[kTop] : top;
    smallest = of_row[block].values[kSmallest] < smallest ? of_row[block].values[kSmallest] : smallest;
  }
  top = warp_max(top);
  for (int block = lane_id(); block < num_blocks; block += kWarpSize)
    if (of_row[block].values[kTop] == top && of_row[block].values[kLow] > low) low = of_row[block].values[kLow];
  low = warp_max(low);
  for (int block = lane_id(); block < num_blocks; block += kWarpSize) {
    const Record<Acc> record = of_row[block];
    sum += record.values[kSum] * exponential(beside(record.values[kTop], record.values[kLow], top, low));
  }
  store_record(totals + row, {{top, low, warp_sum(sum), warp_min(smallest)}});
}

template <class Acc>
__device__ __forceinline__ void store_row(Acc* out_row, int vocab_size, bool aligned, int first, const Acc (&values)[kPerLane]) {
#pragma unroll
  for (int j = 0; j < kPerLane; j += kVec) {
    const int token = token_of(first, j);
    if (aligned && token + kVec <= vocab_size) {
      store_vec(reinterpret_cast<Vec<Acc, kVec>*>(out_row + token), {{values[j], values[j + 1], values[j + 2], values[j + 3]}});
      continue;
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (token + i < vocab_size) out_row[token + i] = values[j + i];
  }
}

// Of each block its Record and what `kind` needs: its logits, or those less their largest, which finish_logits_kernel goes on with.
template <class Acc>
__global__ void __launch_bounds__(kWarps* kWarpSize, kResidentFusing<Acc>)
    fuse_logits_kernel(const __grid_constant__ Fusion<Acc> f, LogitOut kind,
                Acc* __restrict__ out,                // [num_rows, vocab_size]
                Record<Acc>* __restrict__ records) {  // [num_rows, num_blocks]
  const int64_t row = blockIdx.x;
  const RowState<Acc> state(f, row);
  const Blocks<Acc> blocks(f);
  for (int block = blocks.first; block < blocks.end; ++block) {
    Acc z[kPerLane], low[kPerLane], top = -kInfinity<Acc>, top_low = -kInfinity<Acc>, sum = 0;
    fuse_block(f, state, block * kBlock, z, low);
    Acc* const out_row = out + row * f.vocab_size;
    const bool aligned = f.vocab_size % kVec == 0;
    if (kind == LogitOut::logits) store_row(out_row, f.vocab_size, aligned, block * kBlock, z);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) top = z[j] > top ? z[j] : top;
    top = warp_max(top);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j)
      if (z[j] == top && low[j] > top_low) top_low = low[j];
    top_low = warp_max(top_low);
    if (kind != LogitOut::logits && kind != LogitOut::argmax) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        z[j] = beside(z[j], low[j], top, top_low);
        sum += exponential(z[j]);
      }
      sum = warp_sum(sum);
      if (kind != LogitOut::sample) store_row(out_row, f.vocab_size, aligned, block * kBlock, z);
    }
    store_record(records + row * f.num_blocks + block, {{top, top_low, sum, Acc{0}}});
  }
}

// Logits of broken rows to NaN, or all logits to (log-)probabilities.
template <class Acc>
__global__ void __launch_bounds__(kWarps* kWarpSize, kResident<Acc>)
    finish_logits_kernel(LogitOut kind, const Record<Acc>* __restrict__ records, const Record<Acc>* __restrict__ totals,
                  Acc* __restrict__ out, int vocab_size, int num_blocks, int blocks_each) {
  const int64_t row = blockIdx.x;
  const Record<Acc> total = totals[row];
  const bool broken = total.values[kTop] == kInfinity<Acc>;
  if (kind == LogitOut::logits && !broken) return;
  const Acc sum = total.values[kTop] > -kInfinity<Acc> ? total.values[kSum] : Acc{1};
  const Acc log_sum = logarithm(sum), scale = 1 / sum;
  const int begin = static_cast<int>(blockIdx.y * kWarps + threadIdx.y) * blocks_each;
  const int end = min(begin + blocks_each, num_blocks);
  Acc* const out_row = out + row * vocab_size;
  const bool aligned = vocab_size % kVec == 0;
  for (int block = begin; block < end; ++block) {
    const Record<Acc> record = records[row * num_blocks + block];
    const Acc distance = beside(shift_of(record.values[kTop]), record.values[kLow], total.values[kTop], total.values[kLow]);
#pragma unroll
    for (int j = 0; j < kPerLane; j += kVec) {
      const int token = token_of(block * kBlock, j);
      const bool whole = aligned && token + kVec <= vocab_size;
      Vec<Acc, kVec> z{};
      if (whole) z = *reinterpret_cast<const Vec<Acc, kVec>*>(out_row + token);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (!whole && token + i < vocab_size) z.values[i] = out_row[token + i];
        const Acc x = z.values[i] + distance;
        z.values[i] = kind == LogitOut::log_probs ? x - log_sum : exponential(x) * scale;
        if (broken) z.values[i] = kNaN<Acc>;
        if (!whole && token + i < vocab_size) out_row[token + i] = z.values[i];
      }
      if (whole) store_vec(reinterpret_cast<Vec<Acc, kVec>*>(out_row + token), z);
    }
  }
}

// One token a row: the largest, or the first whose cumulative probability exceeds a random number. The block that holds it
// is fused once more.
template <class Acc>
__global__ void __launch_bounds__(kWarps* kWarpSize, kResidentFusing<Acc>)
    choose_tokens_kernel(const __grid_constant__ Fusion<Acc> f, bool draws, const Record<Acc>* __restrict__ records,
                 const Record<Acc>* __restrict__ totals,
                 const int64_t* __restrict__ request_ids,  // [num_rows], where it draws
                 int64_t seed, int64_t step, int64_t num_rows,
                 int64_t* __restrict__ tokens) {  // [num_rows]
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= num_rows) return;
  const int lane = lane_id();
  const Record<Acc> total = totals[row];
  const Acc top = total.values[kTop];
  if (!(top > -kInfinity<Acc> && top < kInfinity<Acc>)) {
    if (lane == 0) tokens[row] = -1;
    return;
  }
  const Record<Acc>* const of_row = records + row * f.num_blocks;
  draws = draws && f.temperature.template load<Acc>(0, row) != 0;
  const auto mass_of = [&](int block) {
    const Record<Acc> record = of_row[block];
    return static_cast<double>(record.values[kSum] *
                               exponential(beside(record.values[kTop], record.values[kLow], top, total.values[kLow])));
  };
  int chosen = kNobody, last = -1;
  double before = 0, target = 0;
  if (draws) {
    double all = 0;
    for (int block = lane; block < f.num_blocks; block += kWarpSize) all += mass_of(block);
    target = uniform(request_ids[row], seed, step) * warp_sum(all);
  }
  for (int first = 0; first < f.num_blocks && chosen == kNobody; first += kWarpSize) {
    const int block = first + lane;
    const bool inside = block < f.num_blocks;
    if (!draws) {
      chosen = warp_min(inside && of_row[block].values[kTop] == top ? block : kNobody);
      continue;
    }
    const double mass = inside ? mass_of(block) : 0;
    const double upto = warp_scan(mass, lane);
    const int hit = warp_min(mass > 0 && before + upto > target ? block : kNobody);
    last = max(last, warp_max(mass > 0 ? block : -1));
    chosen = hit;
    const double passed = __shfl_sync(kAllLanes, upto, kWarpSize - 1);
    before += hit == kNobody ? passed : __shfl_sync(kAllLanes, upto - mass, hit % kWarpSize);
  }
  if (chosen == kNobody) chosen = last;  // rounding: never past the last token that can be drawn
  const RowState<Acc> state(f, row);
  Acc z[kPerLane], low[kPerLane], largest = -kInfinity<Acc>;
  fuse_block(f, state, chosen * kBlock, z, low);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) largest = z[j] > largest ? z[j] : largest;
  largest = warp_max(largest);
  int token = kNobody, last_token = -1;
  if (!draws) {
#pragma unroll
    for (int j = kPerLane - 1; j >= 0; --j)
      if (z[j] == largest) token = token_of(chosen * kBlock, j);
    token = warp_min(token);
  } else {
    const Record<Acc> record = of_row[chosen];
    const double scale = static_cast<double>(exponential(beside(record.values[kTop], record.values[kLow], top, total.values[kLow])));
#pragma unroll
    for (int j = 0; j < kPerLane; j += kVec) {  // kVec neighbours of each lane
      double powers[kVec], sum = 0;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const Acc power = exponential(beside(z[j + i], low[j + i], record.values[kTop], record.values[kLow]));
        if (power > 0) last_token = token_of(chosen * kBlock, j + i);
        powers[i] = static_cast<double>(power) * scale;
        sum += powers[i];
      }
      const double upto = warp_scan(sum, lane);
      double passed = before + (upto - sum);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        passed += powers[i];
        if (token == kNobody && powers[i] > 0 && passed > target) token = token_of(chosen * kBlock, j + i);
      }
      before += __shfl_sync(kAllLanes, upto, kWarpSize - 1);
    }
    token = warp_min(token);
    if (token == kNobody) token = warp_max(last_token);
  }
  if (lane == 0) tokens[row] = token;
}

// log(min_p) of a filter.
double log_min_p(const char* name, const std::vector<double>& numbers) {
  if (numbers.empty()) return 0;
  MOE_CHECK(numbers.size() == 4 && numbers[0] == 0 && numbers[1] == 1 && numbers[3] == 1, "fuse_logits: ", name,
            " must be of min_p alone in CUDA; use backend='reference'");
  return std::log(numbers[2]);
}

template <class Acc>
constexpr ScalarType kAccDtype = sizeof(Acc) == 8 ? ScalarType::Double : ScalarType::Float;

template <class Acc>
Record<Acc>* records_of(const Tensor& tensor) {
  return mutable_data<Record<Acc>>(tensor);
}

std::tuple<Tensor, Tensor> fuse_logits_cuda(std::vector<Tensor> sources, std::optional<Tensor> rows, Tensor weights,
                                            Tensor temperature, std::optional<Tensor> request_ids, int64_t seed,
                                            int64_t step, int64_t vocab_size, bool mixture, int64_t anchor,
                                            int64_t neg_inf, std::vector<double> mask, std::vector<double> floor,
                                            std::vector<double> keep, int64_t out_kind) {
  MOE_CHECK(weights.dim() == 2 && !sources.empty() && temperature.dim() == 1 && temperature.size(0) == weights.size(0),
            "fuse_logits: weights must be of shape [num_rows, num_sources] and temperature of shape [num_rows]");
  const int64_t num_rows = weights.size(0), num_sources = weights.size(1);
  MOE_CHECK(num_sources <= kMaxSources, "fuse_logits: at most ", kMaxSources, " sources in CUDA, got ", num_sources,
            "; use backend='triton'");
  MOE_CHECK(rows ? sources.size() == 1 : static_cast<int64_t>(sources.size()) == num_sources,
            "fuse_logits: weights must be of shape [num_rows, num_sources=", sources.size(), "]");
  MOE_CHECK(anchor >= 0 && anchor < num_sources, "fuse_logits: anchor must be in [0, ", num_sources, "), got ", anchor);
  MOE_CHECK(vocab_size > 0 && vocab_size < (int64_t{1} << 27), "fuse_logits: vocab must be below 2**27, got ", vocab_size);
  const auto kind = static_cast<LogitOut>(out_kind);
  const bool is_token = kind == LogitOut::argmax || kind == LogitOut::sample;
  const bool is_double = sources[0].scalar_type() == ScalarType::Double;
  const ScalarType acc_dtype = is_double ? ScalarType::Double : ScalarType::Float;
  const DeviceScope scope(weights);
  Tensor out = is_token ? torch::stable::new_empty(weights, {num_rows}, ScalarType::Long)
                        : torch::stable::new_empty(weights, {num_rows, vocab_size}, acc_dtype);
  // of use once there is a backward
  Tensor stats = torch::stable::new_empty(weights, {num_rows, num_sources, 2}, acc_dtype);
  if (num_rows == 0) return {out, stats};
  const auto run = [&]<class Acc>() {
    Fusion<Acc> f{};
    for (size_t k = 0; k < sources.size(); ++k) {
      Tensor& source = sources[k];
      MOE_CHECK(source.dim() == 2 && source.size(1) >= vocab_size && (rows || source.size(0) == num_rows) &&
                    (source.scalar_type() == ScalarType::Double) == is_double,
                "fuse_logits: sources must be of shape [num_rows=", num_rows, ", at least ", vocab_size,
                "], all float64 or none");
      source = with_contiguous_rows(source);
      const auto vec_bytes = static_cast<uintptr_t>(kVec * source.element_size());
      const uintptr_t start = reinterpret_cast<uintptr_t>(source.const_data_ptr());
      f.sources[k] = {source.const_data_ptr(), source.stride(0), source.scalar_type(),
                      start % vec_bytes == 0 && (source.stride(0) % kVec == 0 || source.size(0) == 1)};
    }
    const Tensor row_ids = rows ? torch::stable::contiguous(*rows) : weights;
    if (rows) {
      MOE_CHECK(rows->scalar_type() == ScalarType::Long && rows->numel() == weights.numel(),
                "fuse_logits: rows must be int64 of shape [num_rows, num_sources]");
      f.rows = data<int64_t>(row_ids);
    }
    f.weights = floats_ref(weights);
    f.temperature = floats_ref(temperature);
    f.num_source_rows = sources[0].size(0);
    f.num_sources = static_cast<int>(num_sources);
    f.anchor = static_cast<int>(anchor);
    f.vocab_size = static_cast<int>(vocab_size);
    f.num_blocks = static_cast<int>(ceil_div(vocab_size, kBlock));
    f.blocks_each = static_cast<int>(std::max<int64_t>(kMinBlocks, num_rows * f.num_blocks / kFullWarps));
    f.neg_inf = static_cast<NegInf>(neg_inf);
    f.mixture = mixture;
    f.greedy = is_token;
    f.has_mask = !mask.empty();
    f.has_min_p = !floor.empty();
    f.has_floor = f.has_min_p || f.neg_inf == NegInf::floor;
    f.mask = static_cast<Acc>(log_min_p("mask", mask));
    f.floor = static_cast<Acc>(log_min_p("floor", floor));
    f.keep = static_cast<Acc>(log_min_p("keep", keep));
    const dim3 threads(kWarpSize, kWarps);
    const dim3 grid(grid_size("fuse_logits", num_rows), static_cast<unsigned>(ceil_div(f.num_blocks, kWarps * f.blocks_each)));
    const auto new_records = [&](int64_t count) { return torch::stable::new_empty(weights, {count, 4}, acc_dtype); };
    const auto rows_grid = [&](int64_t count) { return dim3(grid_size("fuse_logits", ceil_div(count, kWarps))); };
    const auto total = [&](const Tensor& records, int64_t count) {
      const Tensor totals = new_records(count);
      launch(scope, total_logits_kernel<Acc>, rows_grid(count), threads, 0, records_of<Acc>(records), records_of<Acc>(totals), count,
             f.num_blocks);
      return totals;
    };
    std::optional<Tensor> measured, kept;
    if (mixture || f.has_mask || f.has_floor) {
      const Tensor records = new_records(num_rows * num_sources * f.num_blocks);
      launch(scope, measure_logits_kernel<Acc>, grid, threads, 0, f, records_of<Acc>(records));
      measured = total(records, num_rows * num_sources);
      f.measured = records_of<Acc>(*measured);
    }
    const Tensor records = new_records(num_rows * f.num_blocks);
    Acc* const out_data = is_token ? nullptr : mutable_data<Acc>(out);
    if (!keep.empty()) {
      launch(scope, fuse_logits_kernel<Acc>, grid, threads, 0, f, LogitOut::argmax, out_data, records_of<Acc>(records));
      kept = total(records, num_rows);
      f.kept = records_of<Acc>(*kept);
    }
    launch(scope, fuse_logits_kernel<Acc>, grid, threads, 0, f, kind, out_data, records_of<Acc>(records));
    const Tensor totals = total(records, num_rows);
    if (!is_token) {
      launch(scope, finish_logits_kernel<Acc>, grid, threads, 0, kind, records_of<Acc>(records), records_of<Acc>(totals), out_data,
             f.vocab_size, f.num_blocks, f.blocks_each);
      return;
    }
    const Tensor ids = kind == LogitOut::sample && request_ids ? torch::stable::contiguous(*request_ids) : out;
    MOE_CHECK(ids.numel() == num_rows && ids.scalar_type() == ScalarType::Long,
              "fuse_logits: request_ids must be int64 of shape [num_rows=", num_rows, "]");
    launch(scope, choose_tokens_kernel<Acc>, rows_grid(num_rows), threads, 0, f, kind == LogitOut::sample, records_of<Acc>(records),
           records_of<Acc>(totals), data<int64_t>(ids), seed, step, num_rows, mutable_data<int64_t>(out));
  };
  if (is_double)
    run.template operator()<double>();
  else
    run.template operator()<float>();
  return {out, stats};
}

}  // namespace
}  // namespace moe

MOE_CUDA_LIBRARY(m) { m.impl("fuse_logits", TORCH_BOX(&moe::fuse_logits_cuda)); }
