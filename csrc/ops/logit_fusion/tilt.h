// One row's exponential tilt, P_a ~ exp(base + a direction), and the solutions that python/moe_kernels/ops/logit_fusion/tilt.py
// defines. The row is read once; every evaluation is one pass over what of it is in a cache.
#pragma once

#include "ops/logit_fusion/logit_fusion.h"

namespace moe {

// Same order as TARGETS and STATUSES in tilt.py.
enum class TiltTarget : int64_t { kl, reverse_kl, jeffreys, symmetry, match };
enum class TiltStatus : int32_t { solved, at_low, at_high, broken };

// A(a) up to a constant of the row, A'(a) and A''(a).
struct TiltStats {
  double log_sum, mean, variance;
  double top;  // the largest exponent
};

template <class Acc>
class TiltRow {
 public:
  // sources: base and direction, or base and two whose difference is the direction
  TiltRow(const Sources<Acc>& sources, int64_t row, Scratch& scratch) {
    const int64_t n = sources.vocab_size();
    base_ = scratch.take<Acc>(n);
    direction_ = scratch.take<Acc>(n);
    const auto load = [&](int64_t k, Acc* out) {
      usable_ &= logit_kernels<Acc>().load(sources.source(row, k), 0, n, out);
    };
    load(0, base_);
    load(1, direction_);
    Acc* subtracted = sources.num_sources() > 2 ? scratch.take<Acc>(n) : nullptr;
    if (subtracted != nullptr) load(2, subtracted);
    if (usable_) size_ = logit_kernels<Acc>().tilt_row(base_, direction_, subtracted, n);
    usable_ = size_ > 0;
  }

  bool usable() const { return usable_; }
  int64_t num_sweeps() const { return num_sweeps_; }

  TiltStats at(double alpha) {
    ++num_sweeps_;
    TiltBlock total{-std::numeric_limits<double>::infinity(), 0, 0, 0};
    for (int64_t begin = 0; begin < size_; begin += kLogitBlock) {
      const TiltBlock part = logit_kernels<Acc>().tilt_block(
          base_ + begin, direction_ + begin, std::min(kLogitBlock, size_ - begin), alpha);
      const double top = std::max(total.top, part.top);
      const double before = std::exp(total.top - top), now = std::exp(part.top - top);
      total = {top, total.sum * before + part.sum * now, total.first * before + part.first * now,
               total.second * before + part.second * now};
    }
    const double mean = total.first / total.sum;
    return {total.top + std::log(total.sum), mean, std::max(0.0, total.second / total.sum - mean * mean),
            total.top};
  }

  // Only log_sum and mean, at low + j step for j in [0, num_points), in one pass where the row's numbers allow it.
  void at_grid(double low, double step, int64_t num_points, TiltStats* stats) {
    Scratch scratch;
    double* sums = scratch.take<double>(num_points);
    double* means = scratch.take<double>(num_points);
    fill_zero(sums, num_points);
    fill_zero(means, num_points);
    // the largest base + alpha direction is convex in alpha: no point's is above the chord between the ends'
    const double last = low + step * static_cast<double>(num_points - 1);
    const double first_top = at(low).top, last_top = at(last).top;
    const TiltGrid grid{low, step, first_top, (last_top - first_top) / static_cast<double>(num_points - 1), num_points};
    bool in_range = true;
    ++num_sweeps_;
    for (int64_t begin = 0; begin < size_ && in_range; begin += kLogitBlock)
      in_range = logit_kernels<Acc>().tilt_grid(base_ + begin, direction_ + begin, std::min(kLogitBlock, size_ - begin),
                                                grid, sums, means);
    for (int64_t j = 0; j < num_points; ++j) {
      const double alpha = low + step * static_cast<double>(j);
      if (in_range && sums[j] > 1e-6)
        stats[j] = {first_top + static_cast<double>(j) * grid.top_step + std::log(sums[j]), means[j] / sums[j], 0,
                    0};
      else
        stats[j] = at(alpha);
    }
  }

 private:
  Acc* base_;
  Acc* direction_;
  int64_t size_ = 0, num_sweeps_ = 0;
  bool usable_ = true;
};

struct TiltSolution {
  double alpha, residual;
  TiltStatus status;
};

template <class Acc>
class TiltSolver {
 public:
  TiltSolver(TiltRow<Acc>& row, double low, double high) : row_(row), low_(low), high_(high), origin_(row.at(0)) {}

  // The root of a rising function: value(alpha) = wanted.
  TiltSolution root(TiltTarget target, double wanted) {
    if (target == TiltTarget::symmetry) wanted += row_.at(1).log_sum - origin_.log_sum;
    double low = low_, high = high_;
    const double at_low = evaluate(target, low).value - wanted;
    if (at_low >= 0) return {low, at_low, TiltStatus::at_low};
    const double at_high = evaluate(target, high).value - wanted;
    if (at_high <= 0) return {high, at_high, TiltStatus::at_high};
    double alpha = first_guess(target, wanted);
    if (!(alpha > low && alpha < high)) alpha = (low + high) / 2;
    double residual = 0;
    for (int step = 0; step < kMaxSteps; ++step) {
      const Value here = evaluate(target, alpha);
      residual = here.value - wanted;
      (residual > 0 ? high : low) = alpha;
      if (steps(alpha, residual / here.slope, low, high)) break;
    }
    return {alpha, residual, TiltStatus::solved};
  }

  // The smallest (kl - kls[0])^2 + (reverse_kl - kls[1])^2.
  TiltSolution match(double kl, double reverse_kl) {
    // both terms fall below the smaller of the two roots, and rise above the larger
    const double first = root(TiltTarget::kl, kl).alpha, second = root(TiltTarget::reverse_kl, reverse_kl).alpha;
    const double begin = std::min(first, second), width = std::max(first, second) - begin;
    // between them there may be several minima
    int64_t best = 0;
    double smallest = std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i <= kIntervals && (i == 0 || width > 0); ++i) {
      const double cost = misfit(begin + width * static_cast<double>(i) / kIntervals, kl, reverse_kl).cost;
      if (cost < smallest) {
        smallest = cost;
        best = i;
      }
    }
    double alpha = begin + width * static_cast<double>(best) / kIntervals;
    double low = std::max(begin, alpha - width / kIntervals), high = std::min(begin + width, alpha + width / kIntervals);
    for (int step = 0; step < kMaxSteps && width > 0; ++step) {
      const Misfit here = misfit(alpha, kl, reverse_kl);
      (here.slope > 0 ? high : low) = alpha;
      if (low >= high) break;  // still falling at the end
      if (steps(alpha, here.slope / here.curvature, low, high)) break;
    }
    const TiltStatus status = alpha <= low_    ? TiltStatus::at_low
                              : alpha >= high_ ? TiltStatus::at_high
                                               : TiltStatus::solved;
    return {alpha, misfit(alpha, kl, reverse_kl).cost, status};
  }

  // The first point of a grid from low to high whose misfit is the smallest.
  TiltSolution match_on_grid(double kl, double reverse_kl, int64_t num_points) {
    Scratch scratch;
    TiltStats* stats = scratch.take<TiltStats>(num_points);
    double* costs = scratch.take<double>(num_points);
    const double step = (high_ - low_) / static_cast<double>(num_points - 1);
    row_.at_grid(low_, step, num_points, stats);
    double smallest = std::numeric_limits<double>::infinity();
    for (int64_t j = 0; j < num_points; ++j) {
      costs[j] = misfit(low_ + step * static_cast<double>(j), stats[j], kl, reverse_kl).cost;
      smallest = std::min(smallest, costs[j]);
    }
    // powers carry the rounding of their factors: what comes close to the smallest is evaluated by itself
    int64_t best = -1;
    const double close = smallest * 1.001 + 1e-9;
    for (int64_t j = 0; j < num_points; ++j) {
      if (costs[j] > close) continue;
      const double cost = misfit(low_ + step * static_cast<double>(j), kl, reverse_kl).cost;
      if (best >= 0 && !(cost < smallest)) continue;
      smallest = cost;
      best = j;
    }
    const TiltStatus status = best == 0                ? TiltStatus::at_low
                              : best == num_points - 1 ? TiltStatus::at_high
                                                       : TiltStatus::solved;
    return {low_ + step * static_cast<double>(best), smallest, status};
  }

 private:
  static constexpr int kMaxSteps = 60;
  static constexpr int64_t kIntervals = 8;
  // the last step: what is left after it is its square for a root, a share of it for a misfit that is not zero
  static constexpr double kStep = 1e-9;

  struct Value {
    double value, slope;
  };
  struct Misfit {
    double cost, slope, curvature;  // of Gauss and Newton
  };

  Value evaluate(TiltTarget target, double alpha) {
    const TiltStats here = row_.at(alpha);
    const double log_sum = here.log_sum - origin_.log_sum, shift = here.mean - origin_.mean;
    switch (target) {
      case TiltTarget::kl: return {alpha * here.mean - log_sum, alpha * here.variance};
      case TiltTarget::reverse_kl: return {log_sum - alpha * origin_.mean, shift};
      case TiltTarget::jeffreys: return {alpha * shift, shift + alpha * here.variance};
      default: return {here.mean, here.variance};
    }
  }

  // All divergences begin as squares: a^2 A''(0), and half of that for one direction.
  double first_guess(TiltTarget target, double wanted) const {
    if (target == TiltTarget::symmetry) return (low_ + high_) / 2;
    const double scale = target == TiltTarget::jeffreys ? 1 : 2;
    return std::sqrt(scale * wanted / std::max(origin_.variance, 1e-300));
  }

  Misfit misfit(double alpha, const TiltStats& here, double kl, double reverse_kl) const {
    const double log_sum = here.log_sum - origin_.log_sum, shift = here.mean - origin_.mean;
    const double first = alpha * here.mean - log_sum - kl, second = log_sum - alpha * origin_.mean - reverse_kl;
    const double first_slope = alpha * here.variance;
    return {first * first + second * second, first * first_slope + second * shift,
            first_slope * first_slope + shift * shift};
  }
  Misfit misfit(double alpha, double kl, double reverse_kl) {
    return misfit(alpha, row_.at(alpha), kl, reverse_kl);
  }

  // Newton's step, or the middle of the bracket where it would leave it. True where it was the last: one so small is taken
  // whatever the bracket says, whose ends are known no better than the sums are rounded.
  bool steps(double& alpha, double step, double low, double high) const {
    if (std::abs(step) <= kStep * std::max(1.0, std::abs(alpha))) {
      alpha = std::min(std::max(alpha - step, low_), high_);
      return true;
    }
    const double next = alpha - step;
    alpha = next > low && next < high ? next : (low + high) / 2;
    return high - low <= kStep * std::max(1.0, std::abs(alpha));
  }

  TiltRow<Acc>& row_;
  double low_, high_;
  TiltStats origin_;
};

}  // namespace moe
