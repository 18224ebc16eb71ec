// Choosing the largest values of a row.
//
// A row's sorted best cannot be kept in vectors cheaply, but a value that few others exceed can be found quickly. So:
// a threshold that the wanted values reach and few others do, those values by their mask, their order by comparing each
// with each. Where that leaves too many (equal values), one by one.
#pragma once

#include "microkernels/vec.h"

#if !defined(__AVX512F__)
#include "microkernels/transpose.h"
#endif

namespace moe::MOE_ISA {

constexpr int64_t kMaxFew = 32;  // candidates that are compared each with each

// order[i] = how many of the n <= kMaxFew values stand before values[i]: larger ones, and equal ones of a lower index.
// What follows the values up to a whole vector is at -inf, so that every loop has the length of a vector.
template <class Acc>
static void rank_few(const Acc* values, int64_t n, Index<Acc>* order) {
  constexpr int kN = kLanes<Acc>;
  VecIndex<Acc> lane;
  for (int i = 0; i < kN; ++i) lane[i] = i;
  for (int64_t at = 0; at < n; at += kN) {
    const Vec<Acc> v = load(values + at);
    VecIndex<Acc> rank{};
    for (int64_t other = 0; other < at; other += kN)
#pragma GCC unroll 8
      for (int j = 0; j < kN; ++j) rank -= broadcast(values[other + j]) >= v;
#pragma GCC unroll 8
    for (int j = 0; j < kN; ++j) {
      const Vec<Acc> other = broadcast(values[at + j]);
      rank -= (other > v) | ((other == v) & (lane > static_cast<Index<Acc>>(j)));
    }
    for (int64_t other = at + kN; other < n; other += kN)
#pragma GCC unroll 8
      for (int j = 0; j < kN; ++j) rank -= broadcast(values[other + j]) > v;
    std::memcpy(order + at, &rank, sizeof rank);
  }
}

// A value that at least `count` <= kBins of the n values reach, and few more: the count-th largest of the maxima of kBins
// interleaved parts. Of 128 random values, 10.6 reach the eighth of 16 parts.
template <class Acc, int kBins>
static Acc lower_bound(const Acc* values, int64_t n, int64_t count) {
  constexpr int kN = kLanes<Acc>;
  const Vec<Acc> none = Vec<Acc>{} - static_cast<Acc>(__builtin_inf());
  Acc bins[kBins];
  int64_t full = n / kBins * kBins;
  for (int bin = 0; bin < kBins; bin += kN) {
    Vec<Acc> most = none;
    for (int64_t i = bin; i < full; i += kBins) most = larger_of<Acc>(load(values + i), most);
    store(bins + bin, most);
  }
  for (int64_t i = full; i < n; ++i) bins[i - full] = values[i] > bins[i - full] ? values[i] : bins[i - full];
  // the largest maximum that `count` of them reach
  Vec<Acc> reached = none;
  const Index<Acc> enough = static_cast<Index<Acc>>(count);
  for (int bin = 0; bin < kBins; bin += kN) {
    const Vec<Acc> most = load(bins + bin);
    VecIndex<Acc> num_above{};
#pragma GCC unroll 8
    for (int j = 0; j < kBins; ++j) num_above -= broadcast(bins[j]) >= most;
    reached = larger_of<Acc>(num_above >= enough ? most : none, reached);
  }
  return reduce_largest<Acc>(reached);
}

// Bit i: whether values[i] reaches threshold(i), for i in [0, size), size <= 64. threshold gives vectors and scalars alike.
template <class Acc, class AtVector, class AtScalar>
MOE_INLINE uint64_t reaching_bits(const Acc* values, int64_t size, const AtVector& vector_at, const AtScalar& scalar_at) {
  constexpr int kN = kLanes<Acc>;
  uint64_t bits = 0;
  int64_t i = 0;
  for (; i + kN <= size; i += kN) bits |= lane_bits<Acc>(load(values + i) >= vector_at(i)) << i;
  for (; i < size; ++i) bits |= static_cast<uint64_t>(values[i] >= scalar_at(i)) << i;
  return bits;
}

// One pass that keeps a sorted list of the best: for more than a few.
template <class Acc>
static int64_t largest_one_by_one(const Acc* values, int64_t n, int64_t count, int32_t* indices, Acc* best) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Acc value = values[i];
    if (!(value > -static_cast<Acc>(__builtin_inf())) || (found == count && !(value > best[count - 1]))) continue;
    int64_t at = found < count ? found++ : count - 1;
    for (; at > 0 && best[at - 1] < value; --at) {
      best[at] = best[at - 1];
      indices[at] = indices[at - 1];
    }
    best[at] = value;
    indices[at] = static_cast<int32_t>(i);
  }
  return found;
}

template <class Acc>
static int64_t largest(const Acc* values, int64_t n, int64_t count, int32_t* indices, Acc* best) {
  constexpr Acc kLowest = sizeof(Acc) == 4 ? static_cast<Acc>(-__FLT_MAX__) : static_cast<Acc>(-__DBL_MAX__);
  if (count == 0) return 0;
  if (count > 16) return largest_one_by_one(values, n, count, indices, best);
  Acc threshold = n <= 16 ? kLowest : count <= 8 ? lower_bound<Acc, 16>(values, n, count) : lower_bound<Acc, 32>(values, n, count);
  threshold = threshold > kLowest ? threshold : kLowest;  // nothing at -inf
  Acc few[kMaxFew];
  for (int i = 0; i < kMaxFew; i += kLanes<Acc>) store(few + i, Vec<Acc>{} - static_cast<Acc>(__builtin_inf()));
  int32_t few_indices[kMaxFew], sorted[kMaxFew];
  int64_t found = 0;
  for (int64_t begin = 0; begin < n; begin += 64) {
    uint64_t bits = reaching_bits<Acc>(
        values + begin, n - begin < 64 ? n - begin : 64, [&](int64_t) { return broadcast(threshold); },
        [&](int64_t) { return threshold; });
    if (found + __builtin_popcountll(bits) > kMaxFew) return largest_one_by_one(values, n, count, indices, best);
    for (; bits != 0; bits &= bits - 1) {
      const int64_t i = begin + __builtin_ctzll(bits);
      few[found] = values[i];
      few_indices[found++] = static_cast<int32_t>(i);
    }
  }
  Index<Acc> order[kMaxFew];
  rank_few(few, found, order);
  for (int64_t i = 0; i < found; ++i) sorted[order[i]] = few_indices[i];
  if (found > count) found = count;
  for (int64_t i = 0; i < found; ++i) indices[i] = sorted[i];
  return found;
}

template <class Acc>
static int64_t num_reaching(const Acc* values, int64_t n, Acc threshold) {
  constexpr int kN = kLanes<Acc>;
  VecIndex<Acc> counts[4] = {};
  const Vec<Acc> least = broadcast(threshold);
  int64_t i = 0;
  for (; i + 4 * kN <= n; i += 4 * kN)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) counts[v] -= load(values + i + v * kN) >= least;
  const VecIndex<Acc> all = (counts[0] + counts[1]) + (counts[2] + counts[3]);
  int64_t count = 0;
  for (int lane = 0; lane < kN; ++lane) count += all[lane];
  for (; i < n; ++i) count += values[i] >= threshold;
  return count;
}

// Bisects the bits of the threshold: those of values >= 0 rise as the values do. Usually some 12 passes over a row in L1
// find a threshold that exactly `count` values reach.
template <class Acc>
static Acc threshold(const Acc* values, int64_t n, int64_t count, int64_t* num_equal) {
  const auto value_of = [](Index<Acc> bits) {
    Acc value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  const auto bits_of = [](Acc value) {
    Index<Acc> bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
  };
  *num_equal = n;
  if (num_reaching(values, n, Acc{0}) <= count) return 0;
  constexpr int kN = kLanes<Acc>;
  constexpr Acc kInfinity = static_cast<Acc>(__builtin_inf());
  Vec<Acc> most_of_lanes{}, least_of_lanes = Vec<Acc>{} + kInfinity;
  int64_t i = 0;
  for (; i + kN <= n; i += kN) {
    const Vec<Acc> v = load(values + i);
    most_of_lanes = v > most_of_lanes ? v : most_of_lanes;
    least_of_lanes = (v >= Acc{0}) & (v < least_of_lanes) ? v : least_of_lanes;
  }
  Acc most = reduce_largest<Acc>(most_of_lanes), least = -reduce_largest<Acc>(-least_of_lanes);
  for (; i < n; ++i) {
    most = values[i] > most ? values[i] : most;
    least = values[i] >= 0 && values[i] < least ? values[i] : least;
  }
  Index<Acc> low = bits_of(least), high = bits_of(most) + 1;  // more than `count` values reach low, fewer reach high
  int64_t reaching_high = 0;
  while (high - low > 1) {
    const Index<Acc> middle = low + (high - low) / 2;
    const int64_t reaching_middle = num_reaching(values, n, value_of(middle));
    if (reaching_middle == count) return value_of(middle);
    if (reaching_middle > count) {
      low = middle;
    } else {
      high = middle;
      reaching_high = reaching_middle;
    }
  }
  *num_equal = count - reaching_high;
  return value_of(low);
}

template <class Acc>
static int64_t reaching(const Acc* values, const Acc* thresholds, int64_t n, Acc factor, int32_t* indices, Acc* out) {
  int64_t found = 0;
  for (int64_t begin = 0; begin < n; begin += 64) {
    uint64_t bits = reaching_bits<Acc>(
        values + begin, n - begin < 64 ? n - begin : 64, [&](int64_t i) { return load(thresholds + begin + i); },
        [&](int64_t i) { return thresholds[begin + i]; });
    for (; bits != 0; bits &= bits - 1) {
      const int64_t i = begin + __builtin_ctzll(bits);
      indices[found] = static_cast<int32_t>(i);
      out[found++] = values[i] * factor;
    }
  }
  return found;
}

template <class Acc>
static void transpose_rows(const Acc* rows, int64_t row_stride, int64_t num_rows, int64_t n, Acc* out, int64_t out_stride) {
  int64_t turned_rows = 0, turned = 0;  // in squares of vectors; transpose() has none of 64 bytes
#if !defined(__AVX512F__)
  constexpr int kN = kLanes<Acc>;
  turned_rows = num_rows / kN * kN;
  turned = n / kN * kN;
  for (int64_t j = 0; j < turned; j += kN)
    for (int64_t i = 0; i < turned_rows; i += kN) {
      Vec<Acc> square[kN];
      for (int v = 0; v < kN; ++v) square[v] = load(rows + (i + v) * row_stride + j);
      transpose<Acc>(square);
      for (int v = 0; v < kN; ++v) store(out + (j + v) * out_stride + i, square[v]);
    }
#endif
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = j < turned ? turned_rows : 0; i < num_rows; ++i) out[j * out_stride + i] = rows[i * row_stride + j];
}

}  // namespace moe::MOE_ISA
