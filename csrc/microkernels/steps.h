// Lossless patches: how many steps each weight's bits go in the order of floating-point numbers.
//
// Bits of sign and magnitude become a whole number, b ^ (b < 0 ? all but the sign : 0), in which neighbours among the
// floats differ by one (-0 and 0 too). An optimiser moves most weights by one step or none, so a step is coded as its
// sign beside its position, and its size in Elias's gamma code (1975), split as the positions are: the length of each in
// unary, then the bits below the leading one. The unary part has as many zeros before the n-th one as there are low bits
// before its own, so that these are found without a chain.
//
// Steps wrap around: every pair of bits has one, and the way back is the same number.
#pragma once

#include <limits>
#include <type_traits>

#include "microkernels/magnitudes.h"
#include "microkernels/split_rice.h"

namespace moe::MOE_ISA {

template <int size>
struct signed_bits;
template <>
struct signed_bits<2> {
  using type = int16_t;
};
template <>
struct signed_bits<4> {
  using type = int32_t;
};
template <>
struct signed_bits<8> {
  using type = int64_t;
};
template <class T>
using StepBits = typename signed_bits<sizeof(T)>::type;

// Its own inverse.
template <class Int>
MOE_INLINE Int in_order(Int bits) {
  return static_cast<Int>(bits ^ ((bits >> (8 * sizeof(Int) - 1)) & std::numeric_limits<Int>::max()));
}

template <class T>
MOE_INLINE StepBits<T> order_of(const T& x) {
  StepBits<T> bits;
  std::memcpy(&bits, &x, sizeof bits);
  return in_order(bits);
}

// From base to x, modulo 2^bits.
template <class T>
MOE_INLINE StepBits<T> step_of(const T& x, const T& base) {
  using Unsigned = std::make_unsigned_t<StepBits<T>>;
  return static_cast<StepBits<T>>(static_cast<Unsigned>(static_cast<Unsigned>(order_of(x)) - static_cast<Unsigned>(order_of(base))));
}

template <class Int>
MOE_INLINE uint64_t size_of_step(Int step) {
  using Unsigned = std::make_unsigned_t<Int>;
  const Unsigned bits = static_cast<Unsigned>(step);
  return step < 0 ? static_cast<Unsigned>(Unsigned{0} - bits) : bits;
}

// Bits below the leading one of a size that is not zero.
MOE_INLINE int low_bits(uint64_t size) { return 63 - __builtin_clzll(size); }

template <class T>
static int64_t find_steps(const T* x, const T* base, int64_t n, uint64_t* planes) {
  int64_t num_bits = 0;
  for (int64_t at = 0; at < n; at += kTernaryGroup, planes += 2) {
    const int64_t size = n - at < kTernaryGroup ? n - at : kTernaryGroup;
    planes[0] = planes[1] = 0;
    if (std::memcmp(x + at, base + at, static_cast<size_t>(size) * sizeof(T)) == 0) continue;
    for (int64_t i = 0; i < size; ++i) {
      const StepBits<T> step = step_of(x[at + i], base[at + i]);
      planes[0] |= static_cast<uint64_t>(step != 0) << i;
      planes[1] |= static_cast<uint64_t>(step < 0) << i;
    }
    for (uint64_t word = planes[0]; word != 0; word &= word - 1) {
      const int64_t i = at + __builtin_ctzll(word);
      num_bits += 2 * low_bits(size_of_step(step_of(x[i], base[i]))) + 1;
    }
  }
  return num_bits;
}

// Writes whole words of 32.
template <class T>
static void encode_steps(const T* x, const T* base, int64_t n, const uint64_t* planes, uint8_t* out) {
  BitWriter writer{out};
  const auto put = [&](uint64_t value, int count) {
    put_bits(writer, value & 0xffffffff, count < 32 ? count : 32);
    if (count > 32) put_bits(writer, value >> 32, count - 32);
  };
  each_nonzero(planes, n, [&](int64_t i) {
    const int low = low_bits(size_of_step(step_of(x[i], base[i])));
    put(uint64_t{1} << low, low + 1);
  });
  each_nonzero(planes, n, [&](int64_t i) {
    const uint64_t size = size_of_step(step_of(x[i], base[i]));
    const int low = low_bits(size);
    put(size ^ uint64_t{1} << low, low);
  });
  if (writer.held > 0) put_bits(writer, 0, 32 - writer.held);
}

// The sizes of block.count steps from its first bit on. False where the code is damaged.
template <class T>
MOE_INLINE bool decode_sizes(const PackedBlock& block, uint64_t* sizes) {
  uint8_t lows[kTernaryBlock];
  int64_t at = -1, base = 0;  // of the one before; of the word
  if (block.count > block.num_bits) return false;
  uint64_t word = load_word(block.bytes);
  for (int64_t i = 0; i < block.count; ++i) {
    while (word == 0) {
      base += 64;
      if (base >= block.num_bits) return false;
      word = load_word(block.bytes + base / 8);
    }
    const int64_t one = base + __builtin_ctzll(word);
    word &= word - 1;
    if (one - at > static_cast<int64_t>(8 * sizeof(T))) return false;
    lows[i] = static_cast<uint8_t>(one - at - 1);
    at = one;
  }
  int64_t bit = at + 1;
  if (bit + (bit - block.count) > block.num_bits) return false;
  for (int64_t i = 0; i < block.count; ++i) {
    const int low = lows[i];
    sizes[i] = uint64_t{1} << low;
    if (low == 0) continue;
    sizes[i] |= bits_at(block.bytes, bit) & ((uint64_t{1} << low) - 1);
    bit += low;
  }
  return true;
}

template <class T>
static bool move_steps(const PackedBlock& block, bool back, T* weight) {
  uint64_t planes[kTernaryBlock / kTernaryGroup * 2], sizes[kTernaryBlock];
  const int64_t end = decode_block(block, planes);
  if (end < 0) return false;
  const int64_t begin = (end + 31) / 32 * 4;
  PackedBlock rest = block;
  rest.bytes += begin;
  rest.num_bits -= 8 * begin;
  if (block.count == 0) return true;
  if (rest.num_bits <= 0 || !decode_sizes<T>(rest, sizes)) return false;
  using Unsigned = std::make_unsigned_t<StepBits<T>>;
  const uint64_t* size = sizes;
  each_nonzero(planes, block.size, [&](int64_t i) {
    const bool down = (planes[i / kTernaryGroup * 2 + 1] >> (i % kTernaryGroup) & 1) != back;
    const Unsigned from = static_cast<Unsigned>(order_of(weight[i])), step = static_cast<Unsigned>(*size++);
    const Unsigned to = static_cast<Unsigned>(down ? from - step : from + step);
    const StepBits<T> bits = in_order(static_cast<StepBits<T>>(to));
    std::memcpy(&weight[i], &bits, sizeof bits);
  });
  return true;
}

}  // namespace moe::MOE_ISA
