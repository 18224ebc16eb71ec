// The number that a token is drawn with: a function of seed, request and step alone.
#pragma once

#include "common/philox.h"

namespace moe {

constexpr uint32_t kDrawKey = 0x6C6F6769;  // as in reference.py

// In [0, 1), of 53 bits.
MOE_EVERYWHERE inline double uniform(int64_t request, int64_t seed, int64_t step) {
  const uint64_t id = static_cast<uint64_t>(request);
  const PhiloxBlock block =
      philox({{static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32), static_cast<uint32_t>(step), 0}},
             static_cast<uint32_t>(seed), kDrawKey);
  return static_cast<double>((uint64_t{block.words[0]} << 21) | (block.words[1] >> 11)) * 0x1p-53;
}

}  // namespace moe
