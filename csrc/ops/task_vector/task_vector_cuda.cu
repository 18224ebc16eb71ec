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
// Packed vectors become planes first (decode_cuda.cu): 0.25 bytes a weight and vector, and one wait of the host for whether
// all are whole; where one is not, nothing is changed.
//
// apply_ternary of planes depends on shapes alone. An undo has a size that only the device knows, so keeping one waits for
// the device twice: for the length of the strings and for the number of kept values. Its passes, in bytes a weight of
// bfloat16 with one vector:
//   count     0.25   bits of each block, then their running sums
//   apply     4.25   reads and writes the weights; the strings, 2 bits a touched one; kept values go to the block's part
//                    of a scratch of one value for each bit of a string
//   collect   0      but for the kept values, which are few where the vectors are small beside the weights
// Counting the kept in a pass over the weights beforehand would need neither the scratch nor the second wait, but 6.5
// bytes in place of 4.5.
#include <tuple>
#include <vector>

#include "ops/task_vector/decode_cuda.h"
#include "ops/task_vector/planes.cuh"

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

template <class T>
__global__ void __launch_bounds__(kThreads)
    apply_ternary_kernel(Elements<T> weight, const __grid_constant__ Sources<acc_t<T>> sources) {
  constexpr int kVec = kVecElements<T>;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVec;
  if (at >= weight.numel) return;
  const int shift = static_cast<int>(at % kTernaryGroup);
  acc_t<T> sums[kVec];
  const uint64_t group_touched = sum_sources<T>(sources, at / kTernaryGroup, shift, sums) & first_bits(weight.numel - at + shift);
  const uint32_t touched = static_cast<uint32_t>(group_touched >> shift) & ((1u << kVec) - 1);
  if (touched == 0) return;
  auto w = load_elements(weight, at);
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    const acc_t<T> x = to_acc(w.values[e]);
    if ((touched >> e & 1) && x == x) w.values[e] = from_acc<T>(x + sums[e]);
  }
  store_elements(weight, at, w);
}

// A thread's share of a block of kTernaryBlock weights: vectors kBlockThreads apart, so that a warp's accesses are one line.
template <class T>
constexpr int kVecsOfBlock = static_cast<int>(kTernaryBlock) / (kBlockThreads * kVecElements<T>);

// `out`[i] = sum of counts[0..i), for kGroups counts. By one warp.
__device__ __forceinline__ void scan_groups(const int* counts, int* out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int first = counts[2 * lane], both = first + counts[2 * lane + 1];
  const int upto = warp_scan(both, lane);
  out[2 * lane] = upto - both;
  out[2 * lane + 1] = upto - both + first;
}

// The two strings of a block in shared memory, and what is found in them by place: bits of `count` <= 8 touched weights
// from place `at` on, and how many values are kept before it.
struct Strings {
  uint32_t *moved, *other;  // kWords each
  int* kept_before;         // of each 64 places

  __device__ __forceinline__ static void write(uint32_t* string, int at, uint32_t bits) {
    // few steps are not zero: most threads have nothing to write
    if (bits == 0) return;
    const int word = at / 32, shift = at % 32;
    atomicOr(string + word, bits << shift);
    if (shift != 0 && bits >> (32 - shift) != 0) atomicOr(string + word + 1, bits >> (32 - shift));
  }
  __device__ __forceinline__ static uint32_t read(const uint32_t* string, int at, int count) {
    const int word = at / 32, shift = at % 32;
    uint32_t bits = string[word] >> shift;
    if (shift + count > 32) bits |= string[word + 1] << (32 - shift);
    return bits & ((1u << count) - 1);
  }
  __device__ __forceinline__ int kept_of_word(int word) const { return __popc(other[word] & ~moved[word]); }
  // after the strings are whole, by one warp
  __device__ __forceinline__ void scan_kept(int* counts) const {
    for (int i = static_cast<int>(threadIdx.x) % kWarpSize; i < kGroups; i += kWarpSize)
      counts[i] = kept_of_word(2 * i) + kept_of_word(2 * i + 1);
    __syncwarp();
    scan_groups(counts, kept_before);
  }
  __device__ __forceinline__ int kept_at(int at) const {
    int kept = kept_before[at / 64];
    if (at % 64 >= 32) kept += kept_of_word(at / 64 * 2);
    return kept + __popc(other[at / 32] & ~moved[at / 32] & ((1u << at % 32) - 1));
  }
};

// Moves the bits of `bits` that `mask` has together, or apart again.
template <int kCount>
__device__ __forceinline__ uint32_t gather_bits(uint32_t bits, uint32_t mask) {
  uint32_t result = 0;
#pragma unroll
  for (int e = 0; e < kCount; ++e) result |= (bits & mask & 1u << e) >> (e - __popc(mask & ((1u << e) - 1)));
  return result;
}
template <int kCount>
__device__ __forceinline__ uint32_t spread_bits(uint32_t bits, uint32_t mask) {
  uint32_t result = 0;
#pragma unroll
  for (int e = 0; e < kCount; ++e) result |= bits << (e - __popc(mask & ((1u << e) - 1))) & mask & 1u << e;
  return result;
}

// words[b + 1] = words that a string of block b may need: no fewer than the bits that any vector has. A warp for each block.
template <class Acc>
__global__ void __launch_bounds__(kCountWarps* kWarpSize)
    count_touched_kernel(const __grid_constant__ Sources<Acc> sources, int64_t numel, int64_t num_blocks,
                         int64_t* __restrict__ words) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kCountWarps + threadIdx.y;
  if (block >= num_blocks) return;
  const int64_t size = numel - block * kTernaryBlock < kTernaryBlock ? numel - block * kTernaryBlock : kTernaryBlock;
  int64_t sum = 0;
  for (int i = 0; i < sources.count; ++i)
    for (int64_t g = threadIdx.x; g * kTernaryGroup < size; g += kWarpSize)
      sum += __popcll(sources.planes(i, block * kGroups + g).nonzero);
  sum = warp_sum(sum);
  if (threadIdx.x == 0) words[block + 1] = ((sum < size ? sum : size) + 63) / 64;
}

// Counts, which begin at the second place, become their running sums; the first place zero. One block.
__global__ void __launch_bounds__(kScanThreads) scan_counts_kernel(int64_t* __restrict__ counts, int64_t num) {
  MOE_SHARED(int64_t, warp_sums, kScanThreads / kWarpSize);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  int64_t base = 0;
  if (thread == 0) counts[0] = 0;
  for (int64_t first = 1; first <= num; first += kScanThreads * kScanEach) {
    int64_t here[kScanEach], sum = 0;
#pragma unroll
    for (int i = 0; i < kScanEach; ++i) {
      const int64_t at = first + thread * kScanEach + i;
      sum += here[i] = at <= num ? counts[at] : 0;
    }
    const int64_t upto = warp_scan(sum, lane);
    if (lane == kWarpSize - 1) warp_sums[warp] = upto;
    __syncthreads();
    int64_t before = base;
    for (int w = 0; w < kScanThreads / kWarpSize; ++w) {
      if (w < warp) before += warp_sums[w];
      base += warp_sums[w];
    }
    int64_t running = before + upto - sum;
#pragma unroll
    for (int i = 0; i < kScanEach; ++i) {
      const int64_t at = first + thread * kScanEach + i;
      running += here[i];
      if (at <= num) counts[at] = running;
    }
    __syncthreads();
  }
}

// One block for each block of weights.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    apply_undoable_kernel(Elements<T> weight, const __grid_constant__ Sources<acc_t<T>> sources,
                          const int64_t* __restrict__ offsets,  // [num_blocks + 1], in words of 64 bits
                          uint32_t* __restrict__ moved,         // halves of them
                          uint32_t* __restrict__ other,
                          T* __restrict__ scratch,              // kept values of a block from 64 * its offset on
                          int64_t* __restrict__ kept_counts) {  // [1 + num_blocks]
  constexpr int kVec = kVecElements<T>, kVecs = kVecsOfBlock<T>;
  MOE_SHARED(uint32_t, strings_memory, 2 * kWords);
  MOE_SHARED(int, counts, kGroups);
  MOE_SHARED(int, starts, kGroups);
  MOE_SHARED(int, kept_before, kGroups);
  const Strings strings{strings_memory, strings_memory + kWords, kept_before};
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t block = blockIdx.x, offset = offsets[block];
  const int num_words = static_cast<int>(offsets[block + 1] - offset) * 2;
  if (num_words == 0) {  // no vector touches any
    if (thread == 0) kept_counts[block + 1] = 0;
    return;
  }
  for (int i = thread; i < 2 * kWords; i += kBlockThreads) strings_memory[i] = 0;
  Vec<T, kVec> before[kVecs];
  uint64_t group_touched[kVecs];
  uint32_t vec_moved[kVecs], vec_other[kVecs];
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int in_block = (v * kBlockThreads + thread) * kVec, shift = in_block % static_cast<int>(kTernaryGroup);
    const int64_t at = block * kTernaryBlock + in_block;
    group_touched[v] = 0;
    vec_moved[v] = vec_other[v] = 0;
    if (at < weight.numel) {
      acc_t<T> sums[kVec];
      group_touched[v] = sum_sources<T>(sources, at / kTernaryGroup, shift, sums) & first_bits(weight.numel - at + shift);
      const uint32_t touched = static_cast<uint32_t>(group_touched[v] >> shift) & ((1u << kVec) - 1);
      if (touched != 0) {
        before[v] = load_elements(weight, at);
        Vec<T, kVec> w = before[v];
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          const acc_t<T> x = to_acc(w.values[e]);
          if (!(touched >> e & 1) || x != x) continue;
          w.values[e] = from_acc<T>(x + sums[e]);
          const bits_t<T> step = to_bits(before[v].values[e]) - to_bits(from_acc<T>(to_acc(w.values[e]) - sums[e]));
          const bool up = step == 1, down = step == bits_t<T>{0} - 1;
          vec_moved[v] |= static_cast<uint32_t>(up || down) << e;
          vec_other[v] |= static_cast<uint32_t>(step != 0 && !up) << e;
        }
        store_elements(weight, at, w);
      }
    }
    if (shift == 0) counts[in_block / kTernaryGroup] = __popcll(group_touched[v]);
  }
  __syncthreads();
  if (thread < kWarpSize) scan_groups(counts, starts);
  __syncthreads();
  int places[kVecs];  // of each vector's first touched weight
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int in_block = (v * kBlockThreads + thread) * kVec, shift = in_block % static_cast<int>(kTernaryGroup);
    const uint32_t touched = static_cast<uint32_t>(group_touched[v] >> shift) & ((1u << kVec) - 1);
    places[v] = starts[in_block / kTernaryGroup] + __popcll(group_touched[v] & first_bits(shift));
    Strings::write(strings.moved, places[v], gather_bits<kVec>(vec_moved[v], touched));
    Strings::write(strings.other, places[v], gather_bits<kVec>(vec_other[v], touched));
  }
  __syncthreads();
  if (thread < kWarpSize) strings.scan_kept(counts);
  for (int i = thread; i < num_words; i += kBlockThreads) {
    moved[2 * offset + i] = strings.moved[i];
    other[2 * offset + i] = strings.other[i];
  }
  __syncthreads();
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    uint32_t kept = vec_other[v] & ~vec_moved[v];
    if (kept == 0) continue;
    T* to = scratch + 64 * offset + strings.kept_at(places[v]);
#pragma unroll
    for (int e = 0; e < kVec; ++e)
      if (kept >> e & 1) *to++ = before[v].values[e];
  }
  if (thread == 0) kept_counts[block + 1] = kept_before[kGroups - 1] + counts[kGroups - 1];
}

// Kept values from each block's part of the scratch to their places. A warp for each block.
template <class T>
__global__ void __launch_bounds__(kCountWarps* kWarpSize)
    collect_kept_kernel(const T* __restrict__ scratch, const int64_t* __restrict__ offsets,
                        const int64_t* __restrict__ kept_offsets, T* __restrict__ kept, int64_t num_blocks) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kCountWarps + threadIdx.y;
  if (block >= num_blocks) return;
  const int64_t first = kept_offsets[block], count = kept_offsets[block + 1] - first;
  for (int64_t i = threadIdx.x; i < count; i += kWarpSize) kept[first + i] = scratch[64 * offsets[block] + i];
}

// One block for each block of weights. Of an undo of other vectors, what lies outside the tensors counts as zero.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    unapply_ternary_kernel(Elements<T> weight, const __grid_constant__ Sources<acc_t<T>> sources,
                           const int64_t* __restrict__ offsets,  // [num_blocks + 1], in words of 64 bits
                           const uint32_t* __restrict__ moved,   // halves of them
                           const uint32_t* __restrict__ other, int64_t words_of_string,
                           const T* __restrict__ kept, const int64_t* __restrict__ kept_offsets, int64_t num_kept) {
  constexpr int kVec = kVecElements<T>, kVecs = kVecsOfBlock<T>;
  MOE_SHARED(uint32_t, strings_memory, 2 * kWords);
  MOE_SHARED(int, counts, kGroups);
  MOE_SHARED(int, kept_counts, kGroups);
  MOE_SHARED(int, starts, kGroups);
  MOE_SHARED(int, kept_before, kGroups);
  const Strings strings{strings_memory, strings_memory + kWords, kept_before};
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t block = blockIdx.x, offset = offsets[block], end = offsets[block + 1], kept_offset = kept_offsets[block];
  if (end == offset) return;
  for (int i = thread; i < kWords; i += kBlockThreads) {
    const int64_t word = offset + i / 2;
    const bool inside = word >= 0 && word < end && word < words_of_string;
    strings.moved[i] = inside ? moved[2 * offset + i] : 0;
    strings.other[i] = inside ? other[2 * offset + i] : 0;
  }
  acc_t<T> sums[kVecs][kVec];
  uint64_t group_touched[kVecs];
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int in_block = (v * kBlockThreads + thread) * kVec, shift = in_block % static_cast<int>(kTernaryGroup);
    const int64_t at = block * kTernaryBlock + in_block;
    group_touched[v] = 0;
    if (at < weight.numel)
      group_touched[v] = sum_sources<T>(sources, at / kTernaryGroup, shift, sums[v]) & first_bits(weight.numel - at + shift);
    if (shift == 0) counts[in_block / kTernaryGroup] = __popcll(group_touched[v]);
  }
  __syncthreads();
  if (thread < kWarpSize) scan_groups(counts, starts);
  if (thread / kWarpSize == 1) strings.scan_kept(kept_counts);
  __syncthreads();
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int in_block = (v * kBlockThreads + thread) * kVec, shift = in_block % static_cast<int>(kTernaryGroup);
    const int64_t at = block * kTernaryBlock + in_block;
    const uint32_t touched = static_cast<uint32_t>(group_touched[v] >> shift) & ((1u << kVec) - 1);
    if (touched == 0) continue;
    const int place = starts[in_block / kTernaryGroup] + __popcll(group_touched[v] & first_bits(shift)), count = __popc(touched);
    const uint32_t vec_moved = spread_bits<kVec>(Strings::read(strings.moved, place, count), touched);
    const uint32_t vec_other = spread_bits<kVec>(Strings::read(strings.other, place, count), touched);
    const bool keeps = (vec_other & ~vec_moved) != 0;
    int64_t from = kept_offset + (keeps ? strings.kept_at(place) : 0);
    auto w = load_elements(weight, at);
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      const acc_t<T> x = to_acc(w.values[e]);
      if (!(touched >> e & 1) || x != x) continue;
      if (vec_other >> e & ~vec_moved >> e & 1) {
        if (from >= 0 && from < num_kept) w.values[e] = kept[from];
        ++from;
        continue;
      }
      bits_t<T> back = to_bits(from_acc<T>(x - sums[v][e]));
      if (vec_moved >> e & 1) back += vec_other >> e & 1 ? bits_t<T>{0} - 1 : bits_t<T>{1};
      w.values[e] = from_bits<T>(back);
    }
    store_elements(weight, at, w);
  }
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
  Sources<Acc> sources{{}, static_cast<int>(deltas.size()), true};
  for (size_t i = 0; i < deltas.size(); ++i) {
    const Tensor& delta = deltas[i];
    sources.all[i] = {planes_of(op, delta, weight.numel(), weight), static_cast<Acc>(values[i])};
    sources.aligned = sources.aligned && common_alignment(delta.const_data_ptr(), nullptr, 0) == 16;
  }
  return sources;
}

void apply_cuda(Tensor weight, std::vector<Tensor> deltas, std::vector<double> values) {
  deltas = unpack_deltas("apply_", deltas, weight.numel());
  dispatch_float("apply_", weight.scalar_type(), [&]<class T>() {
    const auto sources = make_sources<acc_t<T>>("apply_", weight, deltas, values);
    if (weight.numel() == 0) return;
    const DeviceScope scope(weight);
    launch(scope, apply_ternary_kernel<T>, dim3(apply_blocks<T>(weight.numel())), dim3(kThreads), 0, elements_of<T>(weight),
           sources);
  });
}

// Launches the running sum over the counts of all blocks and waits for it: their sum.
int64_t scan_counts(const DeviceScope& scope, const Tensor& counts) {
  const int64_t num = counts.numel() - 1;
  launch(scope, scan_counts_kernel, dim3(1), dim3(kScanThreads), 0, mutable_data<int64_t>(counts), num);
  return read_back(scope, data<int64_t>(counts) + num);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> apply_undoable_cuda(Tensor weight, std::vector<Tensor> deltas,
                                                               std::vector<double> values) {
  const DeviceScope scope(weight);
  deltas = unpack_deltas("apply_", deltas, weight.numel());
  const int64_t num_blocks = ceil_div(weight.numel(), kTernaryBlock);
  Tensor offsets = torch::stable::new_empty(weight, {num_blocks + 1}, ScalarType::Long);
  Tensor kept_offsets = torch::stable::new_empty(weight, {num_blocks + 1}, ScalarType::Long);
  Tensor strings, kept;
  dispatch_float("apply_", weight.scalar_type(), [&]<class T>() {
    const auto sources = make_sources<acc_t<T>>("apply_", weight, deltas, values);
    const unsigned blocks = grid_size("apply_", num_blocks), eighths = grid_size("apply_", ceil_div(num_blocks, kCountWarps));
    if (num_blocks > 0)
      launch(scope, count_touched_kernel<acc_t<T>>, dim3(eighths), dim3(kWarpSize, kCountWarps), 0, sources, weight.numel(),
             num_blocks, mutable_data<int64_t>(offsets));
    const int64_t num_words = scan_counts(scope, offsets);
    strings = torch::stable::new_empty(weight, {2, num_words}, ScalarType::Long);
    Tensor scratch = torch::stable::new_empty(weight, {64 * num_words});
    uint32_t* moved = reinterpret_cast<uint32_t*>(mutable_data<int64_t>(strings));
    if (num_blocks > 0)
      launch(scope, apply_undoable_kernel<T>, dim3(blocks), dim3(kBlockThreads), 0, elements_of<T>(weight), sources,
             data<int64_t>(offsets), moved, moved + 2 * num_words, mutable_data<T>(scratch),
             mutable_data<int64_t>(kept_offsets));
    const int64_t num_kept = scan_counts(scope, kept_offsets);
    kept = torch::stable::new_empty(weight, {num_kept});
    if (num_kept > 0)
      launch(scope, collect_kept_kernel<T>, dim3(eighths), dim3(kWarpSize, kCountWarps), 0, data<T>(scratch),
             data<int64_t>(offsets), data<int64_t>(kept_offsets), mutable_data<T>(kept), num_blocks);
  });
  return {offsets, strings, kept, kept_offsets};
}

void unapply_cuda(Tensor weight, std::vector<Tensor> deltas, std::vector<double> values, Tensor offsets, Tensor strings,
                  Tensor kept, Tensor kept_offsets) {
  deltas = unpack_deltas("unapply_", deltas, weight.numel());
  dispatch_float("unapply_", weight.scalar_type(), [&]<class T>() {
    const auto sources = make_sources<acc_t<T>>("unapply_", weight, deltas, values);
    const int64_t num_blocks = ceil_div(weight.numel(), kTernaryBlock);
    for (const Tensor* part : {&offsets, &strings, &kept, &kept_offsets})
      MOE_CHECK(part->is_contiguous() && part->is_cpu() == weight.is_cpu() &&
                    part->scalar_type() == (part == &kept ? weight.scalar_type() : ScalarType::Long),
                "unapply_: the undo must be that of this weight, and on its device");
    MOE_CHECK(offsets.numel() == num_blocks + 1 && kept_offsets.numel() == num_blocks + 1 && strings.dim() == 2 &&
                  strings.size(0) == 2,
              "unapply_: the undo must be that of this weight");
    if (num_blocks == 0) return;
    const DeviceScope scope(weight);
    const int64_t num_words = strings.size(1);
    const uint32_t* moved = reinterpret_cast<const uint32_t*>(data<int64_t>(strings));
    launch(scope, unapply_ternary_kernel<T>, dim3(grid_size("unapply_", num_blocks)), dim3(kBlockThreads), 0,
           elements_of<T>(weight), sources, data<int64_t>(offsets), moved, moved + 2 * num_words, num_words, data<T>(kept),
           data<int64_t>(kept_offsets), kept.numel());
  });
}

}  // namespace
}  // namespace moe

MOE_CUDA_LIBRARY(m) {
  m.impl("apply_ternary", TORCH_BOX(&moe::apply_cuda));
  m.impl("apply_ternary_undoable", TORCH_BOX(&moe::apply_undoable_cuda));
  m.impl("unapply_ternary", TORCH_BOX(&moe::unapply_cuda));
}
