// The functions on experts' tensors of one instruction set, MOE_ISA; as table.cpp. Compiled without contraction: a fused
// multiply-add rounds once where PyTorch rounds twice, and results are to be its bits.
#include "microkernels/merge_table.h"

#include "microkernels/merge.h"

namespace moe::MOE_ISA {

template <class T>
static constexpr MergeKernels<T> make() {
  return {.merge = merge<T>, .magnitudes = magnitudes<T>};
}

extern const MergeKernelTable merge_table;
const MergeKernelTable merge_table = {make<float>(), make<bf16>(), make<fp16>(), make<double>()};

}  // namespace moe::MOE_ISA
