// The functions on rows of logits that are compiled once for each instruction set; as in table.h.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace moe {

// What a row of logits may be made of; the fused row is in Acc.
enum class LogitDtype : int64_t { f32, b16, f16, f64 };

// One source's row: weight * max(logit, floor), or weight * softmax(logit).
template <class Acc>
struct LogitSource {
  const void* row;
  LogitDtype dtype;
  Acc weight;  // not zero
  Acc floor;   // of a negative weight; -inf where there is none
  // of a mixture: the largest logit, log(sum(exp(logit - top))) and log(weight) less that. Apart, as sums would be rounded
  Acc top, log_sum, shift;
};

// What a fusion gives; same order as OUTS in python/moe_kernels/ops/logit_fusion/api.py, which has the equations.
enum class LogitOut : int64_t { logits, log_probs, probs, argmax, sample };

// What a negative weight makes of -inf; same order as NEG_INF there.
enum class NegInf : int64_t { mask, floor, zero };

template <class Acc>
struct FusedRow {
  const LogitSource<Acc>* sources;
  int64_t num_sources;
  const LogitSource<Acc>* anchor;  // null where its weight is zero
  bool mixture;
  bool anchored;    // where a negative weight meets -inf the anchor stands alone
  Acc weight_sum;   // over all sources
  Acc temperature;
  Acc shift;  // of chosen tokens: taken off the result before it is rounded; else 0
};

constexpr int64_t kLogitBlock = 512;         // tokens whose sum of exponentials runs in Acc; longer sums in double
constexpr int64_t kLogitBuckets = 4096;      // by distance from the largest logit
constexpr double kLogitBucketsPerNat = 128;  // the last bucket holds all below exp(-32) of the largest

// Of weights exp(base + alpha direction - top): their sum, and with direction and its square.
struct TiltBlock {
  double top, sum, first, second;
};

// Points low + j step. top(j) = first_top + j top_step is at least the largest base + alpha direction of the row.
struct TiltGrid {
  double low, step, first_top, top_step;
  int64_t num_points;
};

struct GradSums {
  double grad, mass;
};

template <class Acc>
struct LogitKernels {
  // z[i] of the tokens begin + i, or tokens[begin + i], for i in [0, n), n <= kLogitBlock. False where a source holds NaN
  // or +inf there.
  bool (*combine)(const FusedRow<Acc>& row, const int32_t* tokens, int64_t begin, int64_t n, Acc* z);
  // out[i] = source.row[begin + i] for any n. False where there is NaN or +inf.
  bool (*load)(const LogitSource<Acc>& source, int64_t begin, int64_t n, Acc* out);
  // the largest value; -inf where there is none, and of NaN
  Acc (*largest)(const Acc* z, int64_t n);
  // the smallest value above -inf; +inf where there is none
  Acc (*smallest_finite)(const Acc* z, int64_t n);
  // sum_i exp(z[i] - shift), n <= kLogitBlock; shift is finite
  Acc (*exp_sum)(const Acc* z, int64_t n, Acc shift);
  // exps[i] = exp(z[i] - shift)
  void (*exponentials)(const Acc* z, int64_t n, Acc shift, Acc* exps);
  // z[i] = (z[i] - first) - second
  void (*subtract)(Acc* z, int64_t n, Acc first, Acc second);
  // appends first + i for z[i] >= bound; returns how many there were
  int64_t (*at_least)(const Acc* z, int64_t n, Acc bound, int32_t first, int32_t* tokens);
  // counts[b] and masses[b], sums of exp(z - largest), of the values above -inf in each bucket; masses may be null
  void (*histogram)(const Acc* z, int64_t n, Acc largest, int64_t* counts, double* masses);
  // the values in one bucket; returns how many there were
  int64_t (*bucket_values)(const Acc* z, int64_t n, Acc largest, int64_t bucket, Acc* values);

  // Backward, n <= kLogitBlock; python/moe_kernels/ops/logit_fusion/autograd.py has the equations. What a row sums is
  // in double: gradients of weights and temperature are small differences of large sums.
  // one block's part of sum(g) (log_probs) or sum(probs g) (probs), and of sum(probs), over the tokens above -inf
  GradSums (*grad_sums)(LogitOut out, const Acc* grad, const Acc* fused, int64_t n);
  // dz, 0 for tokens at -inf; total: the whole row's sums
  void (*score_grad)(LogitOut out, const Acc* grad, const Acc* fused, GradSums total, int64_t n, Acc* dz);
  // flags[i] = 1 where the anchor stands alone; returns the sum of dz times the anchor's logit there
  double (*anchored)(const FusedRow<Acc>& row, int64_t begin, int64_t n, const Acc* dz, Acc* flags);
  // grad[begin + i] = dl in the source's dtype; returns the sum of dz times the (raised) logits. flags may be null
  double (*linear_grad)(const FusedRow<Acc>& row, const LogitSource<Acc>& source, int64_t begin, int64_t n,
                        const Acc* dz, const Acc* flags, void* grad);
  // grad (may be null) likewise, with sum = sum(r dz) over the row; returns one block's part of that. z: the mixture's
  // logarithm without temperature
  double (*mixture_grad)(const FusedRow<Acc>& row, const LogitSource<Acc>& source, int64_t begin, int64_t n,
                         const Acc* dz, const Acc* z, Acc sum, void* grad);
  // sum_i a[i] b[i], of a[i] = 0 nothing whatever b[i] is
  double (*inner_of_nonzero)(const Acc* a, const Acc* b, int64_t n);

  // The exponential tilt (tilt.h): of a row, then of blocks of n <= kLogitBlock finite numbers.
  int64_t (*tilt_row)(Acc* base, Acc* direction, const Acc* subtracted, int64_t n);
  TiltBlock (*tilt_block)(const Acc* base, const Acc* direction, int64_t n, double alpha);
  bool (*tilt_grid)(const Acc* base, const Acc* direction, int64_t n, const TiltGrid& grid, double* sums, double* means);
};

struct LogitKernelTable {
  LogitKernels<float> f32;
  LogitKernels<double> f64;
};

// The table of the instruction set that common/cpu_isa.h chose, once a process.
const LogitKernelTable& logit_kernel_table();

template <class Acc>
const LogitKernels<Acc>& logit_kernels() {
  if constexpr (__is_same(Acc, float))
    return logit_kernel_table().f32;
  else
    return logit_kernel_table().f64;
}

}  // namespace moe
