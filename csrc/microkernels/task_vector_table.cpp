// The functions on task vectors of one instruction set, MOE_ISA; as table.cpp.
#include "microkernels/task_vector_table.h"

#include "microkernels/apply_ternary.h"

namespace moe::MOE_ISA {

template <class T>
static constexpr TaskVectorKernels<T> make() {
  return {
      .apply = apply<T>,
      .apply_undoable = apply_undoable<T>,
      .unapply = unapply<T>,
  };
}

extern const TaskVectorKernelTable task_vector_table;
const TaskVectorKernelTable task_vector_table = {make<float>(), make<bf16>(), make<fp16>(), make<double>()};

}  // namespace moe::MOE_ISA
