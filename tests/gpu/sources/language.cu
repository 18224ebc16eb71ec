// What compiled CUDA does apart from tensor cores, for the tests of the PTX interpreter.
__device__ __noinline__ int collatz(int n) {
  int steps = 0;
  for (; n > 1; ++steps) n = n & 1 ? 3 * n + 1 : n / 2;
  return steps;
}

// a called function, a loop whose length differs within a warp
extern "C" __global__ void calls(const int* x, int* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = collatz(x[i]);
}

// an array in local memory, read at a place that only the thread knows
extern "C" __global__ void local_array(const int* x, int* y) {
  int values[8];
  for (int j = 0; j < 8; ++j) values[j] = x[threadIdx.x * 8 + j];
  for (int j = 1; j < 8; ++j)
    for (int k = j; k > 0 && values[k] < values[k - 1]; --k) {
      int larger = values[k - 1];
      values[k - 1] = values[k];
      values[k] = larger;
    }
  for (int j = 0; j < 8; ++j) y[threadIdx.x * 8 + j] = values[j];
}

// a jump table
extern "C" __global__ void jump(const int* x, int* y) {
  int v = x[threadIdx.x], r;
  switch (v & 7) {
    case 0: r = v * 3; break;   case 1: r = v ^ 0x55; break; case 2: r = __popc(v); break;
    case 3: r = __clz(v); break; case 4: r = v / 7; break;   case 5: r = v % 7; break;
    case 6: r = __brev(v); break; default: r = -v;
  }
  y[threadIdx.x] = r;
}

__constant__ int kTable[5] = {3, 1, 4, 1, 5};
__device__ int counter = 100;

// votes, matches, reductions and shuffles of part of a warp; constants; a module's variable
extern "C" __global__ void warp_ops(const int* x, unsigned* y) {
  int v = x[threadIdx.x];
  unsigned part = 0;
  if (threadIdx.x < 20) part = __ballot_sync(0xfffffu, v & 1);
  unsigned odd = __ballot_sync(~0u, v & 1);
  unsigned group = __match_any_sync(~0u, v % 3);
  int sum = __reduce_add_sync(group, v);
  int low = 0;
  if (v & 1) low = __shfl_sync(odd, v, __ffs(odd) - 1);
  int up = __shfl_up_sync(~0u, v, 3, 16);
  y[threadIdx.x * 8 + 0] = odd;  y[threadIdx.x * 8 + 1] = group; y[threadIdx.x * 8 + 2] = sum;
  y[threadIdx.x * 8 + 3] = low;  y[threadIdx.x * 8 + 4] = up;    y[threadIdx.x * 8 + 5] = part;
  y[threadIdx.x * 8 + 6] = kTable[threadIdx.x % 5];
  y[threadIdx.x * 8 + 7] = atomicAdd(&counter, 1);
}

// each half of a warp votes for the whole, at another place
extern "C" __global__ void divergent_vote(const int* x, unsigned* y) {
  int v = x[threadIdx.x];
  y[threadIdx.x] = v & 1 ? __ballot_sync(~0u, v > 1) : __ballot_sync(~0u, v > 2);
}

// some threads of a warp wait where the others do not come by
extern "C" __global__ void divergent_barrier(const int* x, int* y) {
  if (threadIdx.x < 40) { y[threadIdx.x] = 1; asm volatile("bar.sync 0;" ::: "memory"); }
  else { y[threadIdx.x] = 2; asm volatile("bar.sync 1;" ::: "memory"); }
}

// counts by shared atomics, then a scan
extern "C" __global__ void histogram(const int* ids, int* counts, int* first, int n) {
  extern __shared__ int bins[];
  for (int b = threadIdx.x; b < 16; b += blockDim.x) bins[b] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) atomicAdd(&bins[ids[i]], 1);
  __syncthreads();
  if (threadIdx.x < 16) {
    int total = 0;
    for (int b = 0; b < (int)threadIdx.x; ++b) total += bins[b];
    first[threadIdx.x] = total;
    atomicAdd(&counts[threadIdx.x], bins[threadIdx.x]);
  }
}

// a sum over a block, warp by warp
extern "C" __global__ void block_sum(const float* x, float* y, int n) {
  __shared__ float partial[8];
  float v = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) v += x[i];
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) { v = 0; for (int w = 0; w < 8; ++w) v += partial[w]; y[blockIdx.x] = v; }
}
