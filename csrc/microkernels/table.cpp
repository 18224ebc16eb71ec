// The microkernels of one instruction set, MOE_ISA. Compiled once for each, with that set's compiler flags.
#include "microkernels/table.h"

#include "microkernels/dot.h"
#include "microkernels/elementwise.h"
#include "microkernels/outer.h"

namespace moe::MOE_ISA {

template <class T>
static constexpr Microkernels<T> make() {
  return {
      .dot = dot<T>,
      .outer = outer<T>,
      .weight_grad = weight_grad<T>,
      .activation_forward = activation_forward<T>,
      .activation_backward = activation_backward<T>,
      .accumulate = accumulate<T>,
      .load_row = load_row<T>,
      .store_row = store_row<T>,
      .weighted_sum = weighted_sum<T>,
      .scale = scale<T>,
      .inner_product = inner_product<T>,
      .scores = scores<T>,
      .dot_step = DotOperand<T>::kStep,
      .dot_panel_rows = kDotTileN,
      .outer_panel = kPanel<T>,
      .outer_max_block = kMaxOuterBlock,
      .outer_scratch_bytes = kOuterScratchBytes<T>,
  };
}

extern const MicrokernelTable table;
const MicrokernelTable table = {make<float>(), make<double>(), make<bf16>(), make<fp16>()};

}  // namespace moe::MOE_ISA
