// Exponential tilts of rows of logits on the CPU, one row at a time.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/parallel.h"
#include "ops/logit_fusion/tilt.h"

namespace moe {
namespace {

// Calls f.operator()<Acc>(sources) with the sources of a tilt.
template <class F>
void with_tilt_sources(const std::vector<Tensor>& sources_in, const F& f) {
  MOE_CHECK(sources_in.size() == 2 || sources_in.size() == 3,
            "tilt: sources must be base and direction, or base and two whose difference is the direction");
  int64_t vocab_size = sources_in[0].size(1);
  for (const Tensor& source : sources_in) vocab_size = std::min(vocab_size, source.size(1));
  const auto run = [&]<class Acc>() {
    Scratch scratch;
    const std::vector<int64_t> sizes{sources_in[0].size(0), static_cast<int64_t>(sources_in.size())};
    Tensor weights = torch::stable::new_empty(sources_in[0], sizes, ScalarType::Float);
    fill_zero(mutable_data<float>(weights), weights.numel());
    f.template operator()<Acc>(Sources<Acc>(sources_in, std::nullopt, weights, vocab_size, scratch));
  };
  if (sources_in[0].scalar_type() == ScalarType::Double)
    run.template operator()<double>();
  else
    run.template operator()<float>();
}

// stats[b, j] = A, A', A'' at alpha[b, j]
Tensor tilt_stats_cpu(std::vector<Tensor> sources_in, Tensor alpha_in) {
  MOE_CHECK(alpha_in.dim() == 2 && alpha_in.scalar_type() == ScalarType::Double &&
                alpha_in.size(0) == sources_in[0].size(0),
            "tilt_stats: alpha must be float64 of shape [num_rows, num_alphas]");
  const Tensor alpha = torch::stable::contiguous(alpha_in);
  const int64_t num_alphas = alpha.size(1);
  Tensor stats = torch::stable::new_empty(alpha, {alpha.size(0), num_alphas, 3});
  with_tilt_sources(sources_in, [&]<class Acc>(const Sources<Acc>& sources) {
    parallel_tasks(sources.num_rows(), [&](int64_t row) {
      Scratch scratch;
      TiltRow<Acc> tilt(sources, row, scratch);
      double* out = mutable_data<double>(stats) + row * num_alphas * 3;
      if (!tilt.usable()) return static_cast<void>(std::fill_n(out, num_alphas * 3, std::numeric_limits<double>::quiet_NaN()));
      const double origin = tilt.at(0).log_sum;
      for (int64_t j = 0; j < num_alphas; ++j) {
        const double a = data<double>(alpha)[row * num_alphas + j];
        const TiltStats here = tilt.at(a);
        out[3 * j] = here.log_sum - origin;
        out[3 * j + 1] = here.mean;
        out[3 * j + 2] = here.variance;
      }
    });
  });
  return stats;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> solve_tilt_cpu(std::vector<Tensor> sources_in, Tensor values_in, int64_t target,
                                                          double low, double high, int64_t grid) {
  MOE_CHECK(values_in.dim() == 2 && values_in.size(1) == 2 && values_in.scalar_type() == ScalarType::Double &&
                values_in.size(0) == sources_in[0].size(0),
            "solve_tilt: values must be float64 of shape [num_rows, 2]");
  MOE_CHECK(low < high && (grid == 0 || grid >= 2), "solve_tilt: bounds must rise and grid be 0 or at least 2");
  const Tensor values = torch::stable::contiguous(values_in);
  const int64_t num_rows = values.size(0);
  Tensor alpha = torch::stable::new_empty(values, {num_rows});
  Tensor residual = torch::stable::new_empty(values, {num_rows});
  Tensor status = torch::stable::new_empty(values, {num_rows}, ScalarType::Int);
  Tensor num_sweeps = torch::stable::new_empty(values, {num_rows}, ScalarType::Int);
  with_tilt_sources(sources_in, [&]<class Acc>(const Sources<Acc>& sources) {
    parallel_tasks(num_rows, [&](int64_t row) {
      Scratch scratch;
      TiltRow<Acc> tilt(sources, row, scratch);
      const double* wanted = data<double>(values) + 2 * row;
      constexpr double nan = std::numeric_limits<double>::quiet_NaN();
      TiltSolution solution{nan, nan, TiltStatus::broken};
      if (tilt.usable() && std::isfinite(wanted[0]) && std::isfinite(wanted[1])) {
        TiltSolver<Acc> solver(tilt, low, high);
        const TiltTarget kind = static_cast<TiltTarget>(target);
        solution = kind != TiltTarget::match ? solver.root(kind, wanted[0])
                   : grid == 0               ? solver.match(wanted[0], wanted[1])
                                             : solver.match_on_grid(wanted[0], wanted[1], grid);
      }
      mutable_data<double>(alpha)[row] = solution.alpha;
      mutable_data<double>(residual)[row] = solution.residual;
      mutable_data<int32_t>(status)[row] = static_cast<int32_t>(solution.status);
      mutable_data<int32_t>(num_sweeps)[row] = static_cast<int32_t>(tilt.num_sweeps());
    });
  });
  return {alpha, residual, status, num_sweeps};
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("tilt_stats", TORCH_BOX(&moe::tilt_stats_cpu));
  m.impl("solve_tilt", TORCH_BOX(&moe::solve_tilt_cpu));
}
