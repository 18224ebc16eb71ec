// Steps of inner products whose operands are both contiguous along the sum.
#pragma once

#include "microkernels/vec.h"

namespace moe::MOE_ISA {

// How a step of one row is held in a register and multiplied.
template <class T>
struct DotOperand {
  using Reg = Vec<acc_t<T>>;
  static constexpr int kStep = kLanes<acc_t<T>>;
  MOE_INLINE Reg load_step(const T* p) { return load_converted(p); }
  MOE_INLINE Reg load_partial(const T* p, int64_t n) { return load_converted_partial(p, n); }
  MOE_INLINE Vec<acc_t<T>> multiply_add(Vec<acc_t<T>> sum, Reg a, Reg b) { return a * b + sum; }
};

#if defined(__AVX512BF16__)
// vdpbf16ps: two products a lane; each step takes 32 elements
template <>
struct DotOperand<bf16> {
  using Reg = __m512i;
  static constexpr int kStep = 32;
  MOE_INLINE Reg load_step(const bf16* p) { return _mm512_loadu_si512(p); }
  MOE_INLINE Reg load_partial(const bf16* p, int64_t n) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1), p);
  }
  MOE_INLINE Vec<float> multiply_add(Vec<float> sum, Reg a, Reg b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

}  // namespace moe::MOE_ISA
