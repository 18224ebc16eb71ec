// Element types of tensors and the type their sums run in.
#pragma once

#include <cstdint>
#include <cstring>

namespace moe {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// accumulator of T: float, except double for double
template <class T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename accumulator<T>::type;

}  // namespace moe
