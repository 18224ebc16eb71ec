// The functions of products with ternary matrices that are compiled once for each instruction set; as in table.h.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace moe {

// Rows of a ternary matrix whose bits lie in the planes of task_vector_table.h: element j of row r is bit
// first_bit + r * row_bits + j. Rows need not begin with a group.
struct TernaryRows {
  const uint64_t* planes;
  int64_t first_bit, row_bits;
};

// As many rows as the ternary ones, of weights that will be read next: asked for while there is arithmetic to do. The
// product with the weights waits for memory, that with the planes does not: one token, 4096 x 4096 bfloat16 on Zen 4,
// takes 1.65 times the weights' product with it and 1.75 without.
template <class T>
struct NextWeights {
  const T* rows = nullptr;
  int64_t stride = 0;
};

template <class T>
struct TernaryLinearKernels {
  using Acc = acc_t<T>;
  // products[m][j] = sum_i x[m][i] * t[j][i] over i in [0, n), for num_rows rows j
  void (*products)(const T* const* x, int64_t m, const TernaryRows& rows, int64_t num_rows, int64_t n,
                   Acc* const* products, const NextWeights<T>& next);
  // out[r * out_stride + i] = t[r][i] for i in [0, n)
  void (*decode)(const TernaryRows& rows, int64_t num_rows, int64_t n, T* out, int64_t out_stride);
};

struct TernaryLinearKernelTable {
  TernaryLinearKernels<float> f32;
  TernaryLinearKernels<bf16> b16;
  TernaryLinearKernels<fp16> f16;
  TernaryLinearKernels<double> f64;
};

// The table of the instruction set that common/cpu_isa.h chose, once a process.
const TernaryLinearKernelTable& ternary_linear_kernel_table();

template <class T>
const TernaryLinearKernels<T>& ternary_linear_kernels() {
  return of_dtype<T>(ternary_linear_kernel_table());
}

}  // namespace moe
