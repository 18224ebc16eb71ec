// Bit planes of ternary task vectors, as kernels read them.
#pragma once

#include "common/vec.cuh"
#include "microkernels/task_vector_table.h"

namespace moe {

// Of a group of elements: which are not zero, and which of those negative.
struct alignas(16) Planes {
  uint64_t nonzero, negative;
};

// The planes of `numel` elements, which lie where `like` does.
inline const uint64_t* planes_of(const char* op, const Tensor& planes, int64_t numel, const Tensor& like) {
  const int64_t groups = ceil_div(numel, kTernaryGroup);
  MOE_CHECK(planes.scalar_type() == ScalarType::Long && planes.is_contiguous() && planes.dim() == 2 &&
                planes.size(0) == groups && planes.size(1) == 2 && planes.is_cpu() == like.is_cpu(),
            op, ": the planes of ", numel, " elements must be int64 of shape [", groups, ", 2] on the weight's device");
  return reinterpret_cast<const uint64_t*>(data<int64_t>(planes));
}

}  // namespace moe
