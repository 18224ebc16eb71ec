// The functions of products with ternary matrices of one instruction set, MOE_ISA; as table.cpp.
#include "microkernels/ternary_linear_table.h"

#include "microkernels/ternary_dot.h"

namespace moe::MOE_ISA {

template <class T>
static constexpr TernaryLinearKernels<T> make() {
  return {.products = ternary_products<T>, .decode = ternary_decode<T>};
}

extern const TernaryLinearKernelTable ternary_linear_table;
const TernaryLinearKernelTable ternary_linear_table = {
    .f32 = make<float>(),
    .b16 = make<bf16>(),
    .f16 = make<fp16>(),
    .f64 = make<double>(),
};

}  // namespace moe::MOE_ISA
