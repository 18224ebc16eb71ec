// Chooses the microkernels of one instruction set, once a process.
#include "common/cpu_isa.h"

#include "microkernels/logit_table.h"
#include "microkernels/table.h"
#include "microkernels/task_vector_table.h"

namespace moe {

#define MOE_DECLARE(isa)                                \
  namespace isa {                                       \
  extern const MicrokernelTable table;                  \
  extern const LogitKernelTable logit_table;            \
  extern const TaskVectorKernelTable task_vector_table; \
  }
MOE_DECLARE(portable)
#ifdef MOE_HAS_avx512_bf16
MOE_DECLARE(avx2)
MOE_DECLARE(avx512)
MOE_DECLARE(avx512_bf16)
#endif
#undef MOE_DECLARE

namespace {

struct Tables {
  const MicrokernelTable& experts;
  const LogitKernelTable& logits;
  const TaskVectorKernelTable& task_vectors;
};

Tables choose() {
  const std::string isa = chosen_isa();
#ifdef MOE_HAS_avx512_bf16
  if (isa == "avx2") return {avx2::table, avx2::logit_table, avx2::task_vector_table};
  if (isa == "avx512") return {avx512::table, avx512::logit_table, avx512::task_vector_table};
  if (isa == "avx512_bf16") return {avx512_bf16::table, avx512_bf16::logit_table, avx512_bf16::task_vector_table};
#endif
  return {portable::table, portable::logit_table, portable::task_vector_table};
}

const Tables& tables() {
  static const Tables chosen = choose();
  return chosen;
}

}  // namespace

const MicrokernelTable& microkernel_table() { return tables().experts; }
const LogitKernelTable& logit_kernel_table() { return tables().logits; }
const TaskVectorKernelTable& task_vector_kernel_table() { return tables().task_vectors; }

}  // namespace moe
