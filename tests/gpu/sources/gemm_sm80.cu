// out = a @ b.T with cp.async, ldmatrix and mma.sync: every barrier, wait and predicate of it is needed, so that the tests
// can take each away. One block of 128 threads for each 64 x 64 tile of out, two stages of 32 along depth.
#include <cstdint>
#include <cuda_bf16.h>

constexpr int kTile = 64, kDepth = 32, kStages = 2;
// a row of 80 bytes: eight of them start in different banks
constexpr int kStride = kDepth + 8;

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void copy16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}

__device__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// [64, 32] of a matrix into shared memory, rows past the end as zeros
__device__ void fetch(__nv_bfloat16* to, const __nv_bfloat16* from, int first, int rows, int depth, int k) {
#pragma unroll 1
  for (int chunk = threadIdx.x; chunk < kTile * kDepth / 8; chunk += 128) {
    int row = chunk / 4, column = chunk % 4 * 8;
    bool inside = first + row < rows;
    copy16(to + row * kStride + column, from + (inside ? static_cast<int64_t>(first + row) * depth + k + column : 0),
           inside ? 16 : 0);
  }
}

extern "C" __global__ void gemm(const __nv_bfloat16* a,  // [rows, depth]
                                const __nv_bfloat16* b,  // [columns, depth]
                                float* out,              // [rows, columns]
                                int rows, int columns, int depth) {
  extern __shared__ __align__(16) __nv_bfloat16 stages[];  // kStages x (a, b) x [64, kStride]
  constexpr int kMatrix = kTile * kStride;
  int first_row = blockIdx.x * kTile, first_column = blockIdx.y * kTile;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum[8][4] = {};

  fetch(stages, a, first_row, rows, depth, 0);
  fetch(stages + kMatrix, b, first_column, columns, depth, 0);
  asm volatile("cp.async.commit_group;" ::: "memory");
#pragma unroll 1
  for (int k = 0, stage = 0; k < depth; k += kDepth, stage ^= 1) {
    __nv_bfloat16* next = stages + (stage ^ 1) * 2 * kMatrix;
    if (k + kDepth < depth) {
      fetch(next, a, first_row, rows, depth, k + kDepth);
      fetch(next + kMatrix, b, first_column, columns, depth, k + kDepth);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();
    __nv_bfloat16 *tile_a = stages + stage * 2 * kMatrix, *tile_b = tile_a + kMatrix;
#pragma unroll
    for (int step = 0; step < kDepth; step += 16) {
      uint32_t left[4];
      load_matrices(left, tile_a + (warp * 16 + lane % 16) * kStride + step + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t right[4];  // two groups of 8 columns
        load_matrices(right, tile_b + (n * 16 + lane % 8 + lane / 16 * 8) * kStride + step + lane / 8 % 2 * 8);
        multiply(sum[2 * n], left, right[0], right[1]);
        multiply(sum[2 * n + 1], left, right[2], right[3]);
      }
    }
    asm volatile("bar.sync 1, 128;" ::: "memory");
  }
  int row = first_row + warp * 16 + lane / 4, column = first_column + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (row + half * 8 < rows)
        *reinterpret_cast<float2*>(out + static_cast<int64_t>(row + half * 8) * columns + column + n * 8) =
            make_float2(sum[n][half * 2], sum[n][half * 2 + 1]);
}
