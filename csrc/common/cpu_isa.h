// Which instruction sets this processor has, and which one the kernels use.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace moe {

// Names of the kernel sets compiled into this library that this processor can run, worst first.
std::vector<std::string> runnable_isas();

// The set to use: MOE_KERNELS_CPU_ISA if set, else the best runnable one. Throws std::runtime_error where the variable
// names a set that is unknown, was not compiled, or cannot run here.
std::string chosen_isa();

// One core's L2 cache in bytes; 512 KiB where the system does not say.
int64_t l2_bytes();

}  // namespace moe
