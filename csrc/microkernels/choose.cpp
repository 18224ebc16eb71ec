// Chooses the microkernels of one instruction set, once a process.
#include "common/cpu_isa.h"

#include "microkernels/logit_table.h"
#include "microkernels/merge_table.h"
#include "microkernels/table.h"
#include "microkernels/task_vector_table.h"
#include "microkernels/ternary_linear_table.h"

namespace moe {

#define MOE_DECLARE(isa)                                      \
  namespace isa {                                             \
  extern const MicrokernelTable table;                        \
  extern const LogitKernelTable logit_table;                  \
  extern const TaskVectorKernelTable task_vector_table;       \
  extern const MergeKernelTable merge_table;                  \
  extern const TernaryLinearKernelTable ternary_linear_table; \
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
  const MergeKernelTable& merging;
  const TernaryLinearKernelTable& ternary_linear;
};

Tables choose() {
  const std::string isa = chosen_isa();
#define MOE_TABLES(isa) \
  {isa::table, isa::logit_table, isa::task_vector_table, isa::merge_table, isa::ternary_linear_table}
#ifdef MOE_HAS_avx512_bf16
  if (isa == "avx2") return MOE_TABLES(avx2);
  if (isa == "avx512") return MOE_TABLES(avx512);
  if (isa == "avx512_bf16") return MOE_TABLES(avx512_bf16);
#endif
  return MOE_TABLES(portable);
#undef MOE_TABLES
}

const Tables& tables() {
  static const Tables chosen = choose();
  return chosen;
}

}  // namespace

const MicrokernelTable& microkernel_table() { return tables().experts; }
const LogitKernelTable& logit_kernel_table() { return tables().logits; }
const TaskVectorKernelTable& task_vector_kernel_table() { return tables().task_vectors; }
const MergeKernelTable& merge_kernel_table() { return tables().merging; }
const TernaryLinearKernelTable& ternary_linear_kernel_table() { return tables().ternary_linear; }

}  // namespace moe
