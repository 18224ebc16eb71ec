// Task vectors whose t are no signs: their magnitudes in a block of the packed format. docs/task_vector_format.md
#pragma once

#include "microkernels/apply_ternary.h"

namespace moe::MOE_ISA {

// Calls f with a T* of the dtype.
template <class F>
MOE_INLINE void with_magnitude_type(PackedDtype dtype, const F& f) {
  if (dtype == PackedDtype::f32)
    f(static_cast<float*>(nullptr));
  else if (dtype == PackedDtype::b16)
    f(static_cast<bf16*>(nullptr));
  else
    f(static_cast<fp16*>(nullptr));
}

// Calls each(position) for the elements that a plane has, in order.
template <class F>
MOE_INLINE void each_nonzero(const uint64_t* planes, int64_t n, const F& each) {
  for (int64_t g = 0; g * kTernaryGroup < n; ++g)
    for (uint64_t word = planes[2 * g]; word != 0; word &= word - 1) each(g * kTernaryGroup + __builtin_ctzll(word));
}

static void encode_magnitudes(const float* t, float inverse_scale, int64_t n, const uint64_t* planes, PackedDtype dtype,
                              uint8_t* out) {
  with_magnitude_type(dtype, [&]<class T>(T*) {
    each_nonzero(planes, n, [&](int64_t i) {
      const T magnitude = from_acc<T>(__builtin_fabsf(t[i]) * inverse_scale);  // exact: a power of two
      std::memcpy(out, &magnitude, sizeof magnitude);
      out += sizeof magnitude;
    });
  });
}

// The product is rounded here, so that no multiply-add fuses it with a sum: all backends have the same two roundings.
template <class Acc>
static bool decode_magnitudes(const uint8_t* bytes, PackedDtype dtype, int64_t size, const uint64_t* planes, Acc value,
                              Acc* terms) {
  bool valid = true;
  with_magnitude_type(dtype, [&]<class T>(T*) {
    each_nonzero(planes, size, [&](int64_t i) {
      T magnitude;
      std::memcpy(&magnitude, bytes, sizeof magnitude);
      bytes += sizeof magnitude;
      const float x = to_acc(magnitude);
      valid &= x >= 0 && x <= 1;  // not NaN
      const bool negative = planes[i / kTernaryGroup * 2 + 1] >> (i % kTernaryGroup) & 1;
      terms[i] = value * static_cast<Acc>(negative ? -x : x);
    });
  });
  return valid;
}

}  // namespace moe::MOE_ISA
