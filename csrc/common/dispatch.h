// A tensor's run-time dtype becomes a template argument.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/check.h"
#include "common/dtype.h"

namespace moe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls f.template operator()<T>() with the element type of a floating tensor.
template <class F>
decltype(auto) dispatch_float(const char* op, ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f.template operator()<float>();
    case ScalarType::BFloat16: return f.template operator()<bf16>();
    case ScalarType::Half: return f.template operator()<fp16>();
    case ScalarType::Double: return f.template operator()<double>();
    default: MOE_CHECK(false, op, ": dtype must be float32, bfloat16, float16 or float64");
  }
  __builtin_unreachable();
}

template <class F>
decltype(auto) dispatch_id(const char* op, ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Int) return f.template operator()<int32_t>();
  MOE_CHECK(dtype == ScalarType::Long, op, ": ids must be int32 or int64");
  return f.template operator()<int64_t>();
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// A tensor of at most two dimensions whose rows are contiguous; others are copied (they are small: inputs, not weights).
inline Tensor with_contiguous_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) <= 1 || tensor.stride(last) == 1) return tensor;
  return torch::stable::contiguous(tensor);
}

}  // namespace moe
