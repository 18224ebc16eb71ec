// What this machine can do at most: multiply-add rate from registers, reading and copying memory. Built when first used, for
// the machine at hand (-march=native), and called through ctypes. GCC's vector types keep it free of instruction-set names:
// one source for AVX-512, AVX2, SSE and NEON. Only the bf16 dot product needs an intrinsic.
#include <omp.h>
#include <time.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef int64_t IntVector __attribute__((vector_size(kVectorBytes), aligned(16), may_alias));

// latency times issue width is 8 to 10 on current cores; with 12 there are still registers left where there are 16
constexpr int kChains = 12;

static double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Operations per second of all threads together, each by its own CPU time: what registers can do does not depend on
// whether somebody else had the core for a while.
template <typename Body>
static double rate(int threads, double operations, Body body) {
  double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    timespec begin, end;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &begin);
    body();
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
    total += operations / (double(end.tv_sec - begin.tv_sec) + 1e-9 * double(end.tv_nsec - begin.tv_nsec));
  }
  return total;
}

// seconds between a start and an end that all threads share; the start of the threads is outside
template <typename Body>
static double timed(int threads, Body body) {
  double begin = 0, end = 0;
#pragma omp parallel num_threads(threads)
  {
#pragma omp barrier
#pragma omp master
    begin = seconds();
    body(omp_get_thread_num(), omp_get_num_threads());
#pragma omp barrier
#pragma omp master
    end = seconds();
  }
  return end - begin;
}

static void multiply_add_fp32(int64_t iterations) {
  FloatVector sums[kChains] = {};
  FloatVector a = {}, b = {};
  a += 0.5f;
  b += 1.0f;
  // values the compiler cannot see: it would compute twelve equal chains once
  for (FloatVector& sum : sums) asm volatile("" : "+m"(sum));
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = sums[chain] * a + b;  // contracted to one FMA
  }
  for (FloatVector& sum : sums) asm volatile("" : : "m"(sum) : "memory");
}

#if defined(__AVX512BF16__)
static void multiply_add_bf16(int64_t iterations) {
  __m512 sums[kChains];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f003f00);  // pairs of 0.5
  for (__m512& sum : sums) asm volatile("" : "+v"(sum));
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = _mm512_dpbf16_ps(sums[chain], a, a);
  }
  for (__m512& sum : sums) asm volatile("" : : "m"(sum) : "memory");
}
#endif

// kStreams sequential streams over equal parts of [begin, begin + bytes), each asking for the lines `prefetch` bytes ahead
template <int kStreams>
static void read_range(const char* begin, int64_t bytes, int64_t prefetch) {
  constexpr int kUnroll = 256 / kVectorBytes / kStreams > 0 ? 256 / kVectorBytes / kStreams : 1;
  constexpr int64_t kStep = int64_t(kUnroll) * kVectorBytes;
  const int64_t part = bytes / kStreams / 64 * 64;
  IntVector sums[kStreams][kUnroll] = {};
  int64_t i = 0;
  for (; i + kStep <= part; i += kStep) {
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      const char* here = begin + s * part + i;
      if (prefetch) __builtin_prefetch(here + prefetch, 0, 3);
#pragma GCC unroll 16
      for (int u = 0; u < kUnroll; ++u) sums[s][u] ^= *reinterpret_cast<const IntVector*>(here + u * kVectorBytes);
    }
  }
  for (auto& stream : sums)
    for (IntVector& sum : stream) asm volatile("" : : "m"(sum) : "memory");
}

extern "C" {

int limits_vector_bits() { return kVectorBytes * 8; }

int limits_has_bf16_dot() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}

// FLOP/s of all threads together
double limits_multiply_add_fp32(int threads, int64_t iterations) {
  return rate(threads, 2.0 * (kVectorBytes / 4) * kChains * double(iterations), [&] { multiply_add_fp32(iterations); });
}

// 0 where there is no such instruction
double limits_multiply_add_bf16(int threads, int64_t iterations) {
#if defined(__AVX512BF16__)
  return rate(threads, 2.0 * 32 * kChains * double(iterations), [&] { multiply_add_bf16(iterations); });
#else
  (void)threads, (void)iterations;
  return 0;
#endif
}

// Seconds to read `count` pieces of memory, each cut into one range a thread. variant: 0 one stream, 1 one with prefetch,
// 2 four streams, 3 four with prefetch: which one is fastest differs between machines.
double limits_read(const void* const* begins,  // [count], 16-byte aligned
                   const int64_t* bytes,       // [count]
                   int64_t count, int threads, int variant) {
  return timed(threads, [&](int thread, int num_threads) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t lines = bytes[i] / 64;
      const int64_t from = lines * thread / num_threads * 64, to = lines * (thread + 1) / num_threads * 64;
      const char* begin = static_cast<const char*>(begins[i]) + from;
      if (variant < 2) {
        read_range<1>(begin, to - from, variant ? 2048 : 0);
      } else {
        read_range<4>(begin, to - from, variant == 3 ? 1024 : 0);
      }
    }
  });
}

// seconds of memcpy, one range a thread
double limits_copy(void* to, const void* from, int64_t bytes, int threads) {
  return timed(threads, [&](int thread, int num_threads) {
    const int64_t lines = bytes / 64;
    const int64_t first = lines * thread / num_threads * 64, last = lines * (thread + 1) / num_threads * 64;
    std::memcpy(static_cast<char*>(to) + first, static_cast<const char*>(from) + first, last - first);
  });
}

}  // extern "C"
