// Random words by counter, for whole rows: common/philox.h's in vectors.
#pragma once

#include "microkernels/vec.h"

namespace moe::MOE_ISA {

// bits[i], for i in [0, n): word (first + i) % 4 of Philox at ((first + i) / 4, row), 64 bits each, under the key. `first`
// is a multiple of 4. All lanes at once.
MOE_INLINE void random_bits(uint64_t key, uint64_t row, int64_t first, int64_t n, uint32_t* bits) {
  constexpr int kAtOnce = 16;
  for (int64_t done = 0; done < n; done += 4 * kAtOnce) {
    uint32_t c0[kAtOnce], c1[kAtOnce], c2[kAtOnce], c3[kAtOnce];
    const uint64_t block = static_cast<uint64_t>(first + done) / 4;
    for (int i = 0; i < kAtOnce; ++i) {
      c0[i] = static_cast<uint32_t>(block + i);
      c1[i] = static_cast<uint32_t>((block + i) >> 32);
      c2[i] = static_cast<uint32_t>(row);
      c3[i] = static_cast<uint32_t>(row >> 32);
    }
    uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int i = 0; i < kAtOnce; ++i) {
        const uint64_t product0 = uint64_t{0xD2511F53} * c0[i], product1 = uint64_t{0xCD9E8D57} * c2[i];
        c0[i] = static_cast<uint32_t>(product1 >> 32) ^ c1[i] ^ key0;
        c2[i] = static_cast<uint32_t>(product0 >> 32) ^ c3[i] ^ key1;
        c1[i] = static_cast<uint32_t>(product1);
        c3[i] = static_cast<uint32_t>(product0);
      }
      key0 += 0x9E3779B9;
      key1 += 0xBB67AE85;
    }
    for (int i = 0; i < kAtOnce && done + 4 * i < n; ++i) {
      const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
      const int64_t rest = n - done - 4 * i;
      std::memcpy(bits + done + 4 * i, words, (rest < 4 ? rest : 4) * sizeof(uint32_t));
    }
  }
}

}  // namespace moe::MOE_ISA
