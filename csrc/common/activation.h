// The activation of an expert, as the kernels take it.
#pragma once

#include <cstdint>

namespace moe {

// Same order as KINDS in python/moe_kernels/activation.py.
enum class ActivationKind : int64_t { silu, gelu, gelu_tanh, relu, relu2 };

// python/moe_kernels/activation.py has the formula.
struct Activation {
  ActivationKind kind;
  bool gated;
  double alpha;
  double limit;
  bool clamp_output;
  double up_offset;
};

}  // namespace moe
