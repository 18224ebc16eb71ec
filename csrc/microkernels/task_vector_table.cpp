// The functions on task vectors of one instruction set, MOE_ISA; as table.cpp.
#include "microkernels/task_vector_table.h"

#include "microkernels/apply_ternary.h"
#include "microkernels/magnitudes.h"
#include "microkernels/select_ternary.h"
#include "microkernels/split_rice.h"
#include "microkernels/steps.h"

namespace moe::MOE_ISA {

template <class T>
static constexpr TaskVectorKernels<T> make() {
  return {
      .differences = differences<T>,
      .apply = apply<T>,
      .apply_undoable = apply_undoable<T>,
      .unapply = unapply<T>,
      .decode_magnitudes = decode_magnitudes<acc_t<T>>,
      .find_steps = find_steps<T>,
      .encode_steps = encode_steps<T>,
      .move_steps = move_steps<T>,
  };
}

extern const TaskVectorKernelTable task_vector_table;
const TaskVectorKernelTable task_vector_table = {
    .f32 = make<float>(),
    .b16 = make<bf16>(),
    .f16 = make<fp16>(),
    .f64 = make<double>(),
    .codec =
        {
            .count_magnitudes = count_magnitudes,
            .count_low_magnitudes = count_low_magnitudes,
            .count_window = count_window,
            .add_moments = add_moments,
            .select_ternary = select_ternary,
            .choose_block = choose_block,
            .encode_block = encode_block,
            .decode_block = decode_block,
            .encode_magnitudes = encode_magnitudes,
        },
};

}  // namespace moe::MOE_ISA
