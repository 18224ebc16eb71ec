// moe_kernels._host: host-side questions that are no tensor op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu_isa.h"

#define MOE_STRING_(x) #x
#define MOE_STRING(x) MOE_STRING_(x)

PYBIND11_MODULE(_host, module) {
  module.doc() = "Instruction sets and build facts of the compiled part of moe_kernels.";
  module.def("runnable_isas", &moe::runnable_isas, "Kernel sets that this processor can run, worst first.");
  module.def("chosen_isa", &moe::chosen_isa,
             "The kernel set in use: MOE_KERNELS_CPU_ISA or the best runnable one. Raises RuntimeError where the variable "
             "names one that cannot run here.");
  module.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = "g++ " __VERSION__;
        info["torch headers"] = MOE_TORCH_VERSION;
        info["kernel set"] = moe::chosen_isa();
        std::string isas;
        for (const std::string& isa : moe::runnable_isas()) isas += (isas.empty() ? "" : ", ") + isa;
        info["runnable kernel sets"] = isas;
        info["sanitizers"] = MOE_SANITIZE ? "address, undefined" : "none";
        return info;
      },
      "Compiler, torch headers and kernel sets of this build, by name.");
}
