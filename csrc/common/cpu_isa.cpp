#include <unistd.h>

#include <cstdlib>
#include <stdexcept>

#include "common/cpu_isa.h"

namespace moe {

std::vector<std::string> runnable_isas() {
  std::vector<std::string> isas{"portable"};
#if defined(__x86_64__)
  __builtin_cpu_init();
#ifdef MOE_HAS_avx2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("bmi2"))
    isas.push_back("avx2");
#endif
#ifdef MOE_EMULATE_AVX512
  isas.insert(isas.end(), {"avx512", "avx512_bf16"});
  return isas;
#endif
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#ifdef MOE_HAS_avx512
  if (avx512) isas.push_back("avx512");
#endif
#ifdef MOE_HAS_avx512_bf16
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) isas.push_back("avx512_bf16");
#endif
#endif
  return isas;
}

std::string chosen_isa() {
  const std::vector<std::string> isas = runnable_isas();
  const char* forced = std::getenv("MOE_KERNELS_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return isas.back();
  std::string known;
  for (const std::string& isa : isas) {
    if (isa == forced) return isa;
    known += (known.empty() ? "" : ", ") + isa;
  }
  throw std::runtime_error("moe_kernels: MOE_KERNELS_CPU_ISA must be one of " + known + " on this machine, got " + forced);
}

int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return int64_t{512} << 10;
}

}  // namespace moe
