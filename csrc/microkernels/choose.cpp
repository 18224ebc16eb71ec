// Chooses the microkernels of one instruction set, once a process.
#include "common/cpu_isa.h"

#include "microkernels/table.h"

namespace moe {

#define MOE_DECLARE(isa)                \
  namespace isa {                       \
  extern const MicrokernelTable table;  \
  }
MOE_DECLARE(portable)
#ifdef MOE_HAS_avx512_bf16
MOE_DECLARE(avx2)
MOE_DECLARE(avx512)
MOE_DECLARE(avx512_bf16)
#endif
#undef MOE_DECLARE

namespace {

const MicrokernelTable& choose() {
  const std::string isa = chosen_isa();
#ifdef MOE_HAS_avx512_bf16
  if (isa == "avx2") return avx2::table;
  if (isa == "avx512") return avx512::table;
  if (isa == "avx512_bf16") return avx512_bf16::table;
#endif
  return portable::table;
}

}  // namespace

const MicrokernelTable& microkernel_table() {
  static const MicrokernelTable& table = choose();
  return table;
}

}  // namespace moe
