// Small float tensors of any dtype (routing weights and their gradients) from and to the accumulator's type.
#pragma once

#include "common/dispatch.h"
#include "common/workspace.h"
#include "microkernels/table.h"

namespace moe {

// out[0, numel) = tensor, in row-major order.
template <class Acc>
void read_floats(const Tensor& tensor, Acc* out) {
  const Tensor values = torch::stable::contiguous(tensor);
  const int64_t n = values.numel();
  dispatch_float("read_floats", values.scalar_type(), [&]<class T>() {
    if constexpr (__is_same(acc_t<T>, Acc)) {
      microkernels<T>().load_row(data<T>(values), out, n);
    } else {
      Scratch scratch;
      acc_t<T>* converted = scratch.take<acc_t<T>>(n);
      microkernels<T>().load_row(data<T>(values), converted, n);
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Acc>(converted[i]);
    }
  });
}

// tensor (contiguous) = values[0, numel), rounded.
template <class Acc>
void write_floats(const Acc* values, const Tensor& tensor) {
  const int64_t n = tensor.numel();
  dispatch_float("write_floats", tensor.scalar_type(), [&]<class T>() {
    if constexpr (__is_same(acc_t<T>, Acc)) {
      microkernels<T>().store_row(values, nullptr, mutable_data<T>(tensor), n);
    } else {
      Scratch scratch;
      acc_t<T>* converted = scratch.take<acc_t<T>>(n);
      for (int64_t i = 0; i < n; ++i) converted[i] = static_cast<acc_t<T>>(values[i]);
      microkernels<T>().store_row(converted, nullptr, mutable_data<T>(tensor), n);
    }
  });
}

}  // namespace moe
