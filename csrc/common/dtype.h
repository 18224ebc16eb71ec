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

// Of a table that has something for each element type, what is for T.
template <class T, class Table>
const auto& of_dtype(const Table& table) {
  if constexpr (__is_same(T, float))
    return table.f32;
  else if constexpr (__is_same(T, double))
    return table.f64;
  else if constexpr (__is_same(T, bf16))
    return table.b16;
  else
    return table.f16;
}

}  // namespace moe
