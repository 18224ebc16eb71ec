// Packed task vectors for the rooms that work on bit planes.
#pragma once

#include <vector>

#include "common/cuda_launch.cuh"

namespace moe {

// Of one call: their verdicts come back in one copy.
constexpr int kMaxPacked = 64;

// Planes of all packed vectors (uint8) among `deltas`, which are of `numel` elements each; the others as they are. Where
// there is a packed one the host waits for the device, once: for whether every block was one.
std::vector<Tensor> unpack_deltas(const char* op, const std::vector<Tensor>& deltas, int64_t numel);

}  // namespace moe
