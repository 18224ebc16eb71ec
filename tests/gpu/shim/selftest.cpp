// The execution model on kernels that are right and on the same kernels with one fault: selftest FAULT SEED exits with 0
// where the result is right, 1 where it is wrong, 2 with a report on stderr.
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <string>
#include <vector>

#include "simt.h"
// after simt.h, which the host bodies use
#include "common/ptx.cuh"

namespace {

std::string fault;
bool is(const char* name) { return fault == name; }

constexpr int kThreads = 128, kChunk = 128, kStages = 3;

// Sum of n floats: each block sums chunks that arrive by asynchronous copies, kStages under way.
void sum_kernel(const float* in, int num_chunks, int* total) {
  static const char stages_key = 0, sums_key = 0;
  auto* stages = static_cast<float*>(simt::shared_array(&stages_key, "stages", sizeof(float) * kStages * kChunk));
  auto* sums = static_cast<float*>(simt::shared_array(&sums_key, "sums", sizeof(float) * (is("short_shared") ? 3 : 4)));
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const auto fetch = [&](int i) {
    if (i < num_chunks && (thread < 32 || is("all_threads_copy")))
      moe::ptx::cp_async<16>(stages + i % kStages * kChunk + thread * 4, in + (blockIdx.x * num_chunks + i) * kChunk + thread * 4);
    moe::ptx::cp_async_commit();
  };
  for (int i = 0; i < kStages - 1; ++i) fetch(i);
  float sum = 0;
  for (int i = 0; i < num_chunks; ++i) {
    if (is("weak_wait"))
      moe::ptx::cp_async_wait<kStages - 1>();
    else
      moe::ptx::cp_async_wait<kStages - 2>();
    if (!is("no_barrier_after_wait")) __syncthreads();
    fetch(i + kStages - 1);
    // another thread's element: thread 0's warp has fetched it
    sum += stages[i % kStages * kChunk + (thread + 1) % kChunk];
  }
  if (is("barrier_in_one_warp") && warp == 1) __syncthreads();
  if (is("exit_before_barrier") && thread == 77) return;
  if (is("lane_missing") && lane == 3) return;
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(is("half_mask") ? 0xffffu : 0xffffffffu, sum, lanes);
  if (lane == 0) sums[warp] = sum;
  if (!is("no_barrier_before_sums")) {
    if (is("two_barriers") && warp == 2)
      __syncthreads();
    else
      __syncthreads();
  }
  if (is("uninitialised") && thread == 0) sums[0] += stages[(kStages - 1) * kChunk];
  if (thread == 0) atomicAdd(total, static_cast<int>(sums[0] + sums[1] + sums[2] + sums[3]));
  if (is("warps_wait_for_each_other")) {
    if (lane < 16)
      __syncwarp(0xffffffffu);
    else
      __ballot_sync(0xffffffffu, 1);
  }
}

// Blocks write where other blocks write: only ThreadSanitizer can tell.
void overlap_kernel(int* out) {
  if (is("blocks_race")) out[threadIdx.x] = static_cast<int>(blockIdx.x);
  out[kThreads + blockIdx.x * kThreads + threadIdx.x] = 1;
}

}  // namespace

extern "C" void simt_set_seed(uint64_t);

int main(int argc, char** argv) {
  fault = argc > 1 ? argv[1] : "none";
  simt_set_seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
  constexpr int kBlocks = 5, kChunks = 6;
  std::vector<float> in(kBlocks * kChunks * kChunk);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 7);
  const int expected = static_cast<int>(std::accumulate(in.begin(), in.end(), 0.0f));
  int total = 0;
  std::vector<int> out((kBlocks + 1) * kThreads);
  try {
    simt::launch({dim3(kBlocks), dim3(is("too_many_threads") ? 1025 : kThreads), is("too_much_shared") ? 300000u : 0u},
                 [&] { sum_kernel(in.data(), is("read_past_the_end") ? kChunks + 1 : kChunks, &total); });
    simt::launch({dim3(kBlocks), dim3(kThreads)}, [&] { overlap_kernel(out.data()); });
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  for (int i = 0; i < kBlocks * kThreads; ++i) total += out[kThreads + i] - 1;
  return total == expected ? 0 : 1;
}
