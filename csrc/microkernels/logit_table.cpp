// The functions on rows of logits of one instruction set, MOE_ISA; as table.cpp.
#include "microkernels/logit_table.h"

#include "microkernels/logits_backward.h"
#include "microkernels/tilt.h"

namespace moe::MOE_ISA {

template <class Acc>
static constexpr LogitKernels<Acc> make() {
  return {
      .combine = combine<Acc>,
      .load = load_logits<Acc>,
      .largest = largest<Acc>,
      .smallest_finite = smallest_finite<Acc>,
      .exp_sum = exp_sum<Acc>,
      .exponentials = exponentials<Acc>,
      .subtract = subtract<Acc>,
      .at_least = at_least<Acc>,
      .histogram = histogram<Acc>,
      .bucket_values = bucket_values<Acc>,
      .grad_sums = grad_sums<Acc>,
      .score_grad = score_grad<Acc>,
      .anchored = anchored<Acc>,
      .linear_grad = linear_grad<Acc>,
      .mixture_grad = mixture_grad<Acc>,
      .inner_of_nonzero = inner_of_nonzero<Acc>,
      .tilt_row = tilt_row<Acc>,
      .tilt_block = tilt_block<Acc>,
      .tilt_grid = tilt_grid<Acc>,
  };
}

extern const LogitKernelTable logit_table;
const LogitKernelTable logit_table = {make<float>(), make<double>()};

}  // namespace moe::MOE_ISA
