// The microkernels of one instruction set, MOE_ISA. Compiled once for each, with that set's compiler flags.
#include "microkernels/table.h"

#if defined(__AVX512F__)
#include "microkernels/dot.h"
#else
#include "microkernels/dot_panels.h"
#endif
#include "microkernels/dot_quantized.h"
#include "microkernels/elementwise.h"
#include "microkernels/low_rank.h"
#include "microkernels/outer.h"
#include "microkernels/select.h"
#include "microkernels/weight_grad.h"

namespace moe::MOE_ISA {

template <class T>
static constexpr Microkernels<T> make() {
  Microkernels<T> kernels = {
      .dot = dot<T>,
      .dot_quantized = nullptr,
      .outer = outer<T>,
      .weight_grad = weight_grad<T>,
      .activation_forward = activation_forward<T>,
      .activation_backward = activation_backward<T>,
      .accumulate = accumulate<T>,
      .load_row = load_row<T>,
      .store_row = store_row<T>,
      .weighted_sum = weighted_sum<T>,
      .scale = scale<T>,
      .dropout = dropout<T>,
      .inner_product = inner_product<T>,
      .scores = scores<T>,
      .largest = largest<acc_t<T>>,
      .threshold = threshold<acc_t<T>>,
      .reaching = reaching<acc_t<T>>,
      .transpose_rows = transpose_rows<acc_t<T>>,
      .rank_products = rank_products<T>,
      .rank_sums = rank_sums<T>,
#if defined(__AVX512F__)
      .dot_step = DotOperand<T>::kStep,
      .dot_panel_rows = kDotTileN,
#else
      .dot_step = 1,
      .dot_panel_rows = kPanel<T>,
#endif
      .outer_panel = kPanel<T>,
      .outer_max_block = kMaxOuterBlock,
#if defined(__AVX512F__)
      .dot_packs = false,
#else
      .dot_packs = true,
#endif
      .scratch_bytes = kScratchBytes<T>,
  };
  if constexpr (__is_same(acc_t<T>, float)) kernels.dot_quantized = dot_quantized<T>;
  return kernels;
}

extern const MicrokernelTable table;
const MicrokernelTable table = {make<float>(), make<double>(), make<bf16>(), make<fp16>()};

}  // namespace moe::MOE_ISA
