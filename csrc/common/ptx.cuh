// Every inline PTX instruction, one function each, with a body for the host that does the same (cuda_launch.cuh says why).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace moe::ptx {

#if defined(__CUDACC__)

#define MOE_PTX static __device__ __forceinline__

MOE_PTX bf16 cvt_rn_bf16_f32(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

MOE_PTX fp16 cvt_rn_f16_f32(float x) {
  fp16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

MOE_PTX float cvt_f32_f16(fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// A product that the compiler does not fuse with a sum.
MOE_PTX float mul_rn_f32(float a, float b) {
  float product;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
  return product;
}

// Stores 16 bytes at a multiple of 16. nvcc makes four stores of a struct of words, and of 2-byte elements as many as there are.
MOE_PTX void st_global_v4(void* to, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}

// Starts copying 4, 8 or 16 bytes from global to shared memory.
template <int kBytes>
MOE_PTX void cp_async(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "n"(kBytes)
               : "memory");
}

MOE_PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kGroupsLeft of this thread's groups are still under way.
template <int kGroupsLeft>
MOE_PTX void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// sums += A B by a warp: A [16, 16] in rows, B [16, 8] in columns, of pairs of 16-bit elements. With g = lane / 4 and
// c = lane % 4, a has rows g and g + 8 of columns 2c and 2c + 1, then both of columns 2c + 8 and 2c + 9; b those rows of
// column g; sums columns 2c and 2c + 1 of row g, then of row g + 8.
MOE_PTX void mma_m16n8k16(bf16, float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
MOE_PTX void mma_m16n8k16(fp16, float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

#define MOE_PTX static inline

MOE_PTX float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

MOE_PTX uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

MOE_PTX float mul_rn_f32(float a, float b) { return a * b; }

MOE_PTX bf16 cvt_rn_bf16_f32(float x) {
  const uint32_t bits = bits_of_float(x);
  if (x != x) return {0x7fff};  // the NaN of PTX
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

MOE_PTX float cvt_f32_f16(fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = x.bits >> 10 & 0x1f, mantissa = x.bits & 0x3ff;
  if (exponent == 0x1f) return float_of_bits(sign | 0x7f800000 | mantissa << 13);
  if (exponent != 0) return float_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return sign != 0 ? -magnitude : magnitude;
}

MOE_PTX fp16 cvt_rn_f16_f32(float x) {
  const uint16_t sign = static_cast<uint16_t>(bits_of_float(x) >> 16 & 0x8000);
  const uint32_t magnitude = bits_of_float(x) & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7fff};  // the NaN of PTX
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 puts 2^-24 at the last bit, and the addition rounds
    const uint32_t bits = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000;
    return {static_cast<uint16_t>(sign | bits)};
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}

MOE_PTX void st_global_v4(void* to, const uint32_t (&words)[4]) {
  struct alignas(16) [[gnu::may_alias]] Words {
    uint32_t values[4];
  };
  *static_cast<Words*>(to) = {{words[0], words[1], words[2], words[3]}};
}

MOE_PTX float element(bf16, uint32_t bits) { return float_of_bits(bits << 16); }
MOE_PTX float element(fp16, uint32_t bits) { return cvt_f32_f16({static_cast<uint16_t>(bits)}); }

template <class T>
MOE_PTX void mma_m16n8k16(T type, float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const int g = simt::lane() / 4, c = simt::lane() % 4;
  for (int half = 0; half < 2; ++half) {    // of the products' columns
    for (int lane = 0; lane < 4; ++lane) {  // that has two of them
      uint32_t rows[2], columns[2];
      for (int i = 0; i < 2; ++i) {
        rows[i] = __shfl_sync(0xffffffffu, a[2 * half + i], 4 * g + lane);
        columns[i] = __shfl_sync(0xffffffffu, b[half], 4 * (2 * c + i) + lane);
      }
      for (int part = 0; part < 32; part += 16)
        for (int i = 0; i < 4; ++i)
          sums[i] += element(type, rows[i / 2] >> part & 0xffff) * element(type, columns[i % 2] >> part & 0xffff);
    }
  }
}

template <int kBytes>
MOE_PTX void cp_async(void* shared, const void* global, simt::Site at = simt::Site::current()) {
  simt::copy_async(shared, global, kBytes, kBytes, at);
}

MOE_PTX void cp_async_commit() { simt::commit_copies(); }

template <int kGroupsLeft>
MOE_PTX void cp_async_wait() {
  simt::wait_copies(kGroupsLeft);
}

#endif

#undef MOE_PTX

}  // namespace moe::ptx
