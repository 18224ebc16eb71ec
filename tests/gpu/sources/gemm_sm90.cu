// out = a @ b.T with tensor copies, mbarriers and wgmma, as warp-specialised kernels are built: one thread of the first
// warpgroup fetches, the second multiplies, and a tensor copy brings the tile out. Every synchronisation of it is needed,
// so that the tests can take each away. One block of 256 threads for each 64 x 64 tile, two stages of 64 along depth.
#include <cstdint>
#include <cuda_bf16.h>

struct __align__(64) TensorMap { char bytes[128]; };

constexpr int kTile = 64, kStages = 2;
constexpr uint32_t kMatrix = kTile * kTile * 2;

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
}

__device__ void fetch(uint32_t to, const TensorMap* map, int column, int row, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

// 64 rows of 128 bytes in the 128-byte swizzle
__device__ uint64_t descriptor(uint32_t address) {
  return (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 16) | (address >> 4);
}

__device__ void multiply(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, 1, 0, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b));
}

extern "C" __global__ void __launch_bounds__(256)
gemm(const __grid_constant__ TensorMap a,    // [rows, depth], box 64 x 64, 128-byte swizzle
     const __grid_constant__ TensorMap b,    // [columns, depth], the same
     const __grid_constant__ TensorMap out,  // [rows, columns] bf16, box 64 x 64, no swizzle
     int depth) {
  extern __shared__ __align__(1024) char memory[];  // kStages x (a, b), then the tile of out
  __shared__ __align__(8) uint64_t full[kStages], empty[kStages];
  uint32_t stages = shared_address(memory), full0 = shared_address(full), empty0 = shared_address(empty);
  int row = blockIdx.x * kTile, column = blockIdx.y * kTile;
  if (threadIdx.x == 0)
    for (int s = 0; s < kStages; ++s) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full0 + 8 * s) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 128;" ::"r"(empty0 + 8 * s) : "memory");
    }
  __syncthreads();

  if (threadIdx.x < 128) {
    if (threadIdx.x == 0) {
#pragma unroll 1
      for (int k = 0, stage = 0, phase = 0; k < depth; k += kTile) {
        wait(empty0 + 8 * stage, phase ^ 1);
        uint32_t to = stages + stage * 2 * kMatrix, barrier = full0 + 8 * stage;
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 16384;" ::"r"(barrier) : "memory");
        fetch(to, &a, k, row, barrier);
        fetch(to + kMatrix, &b, k, column, barrier);
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
    }
    return;
  }
  float sum[32] = {};
#pragma unroll 1
  for (int k = 0, stage = 0, phase = 0; k < depth; k += kTile) {
    wait(full0 + 8 * stage, phase);
    uint32_t tile = stages + stage * 2 * kMatrix;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int step = 0; step < 4; ++step) multiply(sum, descriptor(tile + step * 32), descriptor(tile + kMatrix + step * 32));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty0 + 8 * stage) : "memory");
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
  auto* tile = reinterpret_cast<__nv_bfloat162*>(memory + kStages * 2 * kMatrix);
  int lane = threadIdx.x % 32, first = (threadIdx.x - 128) / 32 * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      tile[(first + 8 * half) * 32 + n * 4 + lane % 4] =
          __floats2bfloat162_rn(sum[4 * n + 2 * half], sum[4 * n + 2 * half + 1]);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("bar.sync 1, 128;" ::: "memory");
  if (threadIdx.x == 128) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];"
                 ::"l"(&out), "r"(column), "r"(row), "r"(shared_address(tile)) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
}
