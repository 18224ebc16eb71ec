// Gradients of logit fusion on the CPU, one row at a time; a mixture's logits are made again from the sources.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/parallel.h"
#include "ops/logit_fusion/logit_fusion.h"

namespace moe {
namespace {

template <class Acc>
class RowGradient {
 public:
  // stats: [num_sources], as the forward left it
  RowGradient(const Sources<Acc>& sources, int64_t row, Acc temperature, const SourceStats<Acc>* stats, bool mixture, int64_t anchor,
              NegInf neg_inf, LogitOut out)
      : out_(out), vocab_size_(sources.vocab_size()), sources_(scratch_.take<LogitSource<Acc>>(sources.num_sources())),
        numbers_(scratch_.take<int64_t>(sources.num_sources())),
        sums_(scratch_.take<double>(sources.num_sources())) {
    fused_ = {.sources = sources_, .num_sources = 0, .anchor = nullptr, .mixture = mixture,
              .anchored = !mixture && neg_inf == NegInf::zero, .weight_sum = 0,
              .temperature = temperature,
              .shift = 0};
    for (int64_t k = 0; k < sources.num_sources(); ++k) {
      if (sources.weight(row, k) == 0) continue;
      numbers_[fused_.num_sources] = k;
      sums_[fused_.num_sources] = 0;
      LogitSource<Acc>& source = sources_[fused_.num_sources++] = sources.source(row, k);
      fused_.weight_sum += source.weight;
      if (k == anchor) fused_.anchor = &source;
      if (mixture)
        prepare_mixture(source, stats[k]);
      else
        source.floor = stats[k].floor_or_top;
    }
  }

  // grad_sources: one row for each of the K sources, zero where a source is not read. grad_weights: [K]
  void run(const Acc* grad, const Acc* fused, void* const* grad_sources, Acc* grad_weights, int64_t num_sources,
           Acc* grad_temperature) {
    GradSums total{0, 0};
    if (out_ != LogitOut::logits)
      for_blocks([&](int64_t begin, int64_t n) {
        const GradSums part = logit_kernels<Acc>().grad_sums(out_, grad + begin, fused + begin, n);
        total = {total.grad + part.grad, total.mass + part.mass};
      });
    const auto score_grad = [&](int64_t begin, int64_t n, Acc* dz) {
      logit_kernels<Acc>().score_grad(out_, grad + begin, fused + begin, total, n, dz);
    };
    const double inverse = 1 / static_cast<double>(fused_.temperature);
    if (fused_.mixture)
      mixture(score_grad, grad_sources);
    else
      linear(score_grad, grad_sources);
    *grad_temperature = static_cast<Acc>(-score_sum_ * inverse * inverse);
    for (int64_t k = 0; k < num_sources; ++k) grad_weights[k] = static_cast<Acc>(anchored_sum_ * inverse);
    for (int64_t i = 0; i < fused_.num_sources; ++i) {
      const double logit_sum =
          fused_.mixture ? sums_[i] / static_cast<double>(sources_[i].weight) : sums_[i] + anchored_sum_;
      grad_weights[numbers_[i]] = static_cast<Acc>(logit_sum * inverse);
    }
  }

 private:
  template <class F>
  void for_blocks(const F& f) {
    for (int64_t begin = 0; begin < vocab_size_; begin += kLogitBlock)
      f(begin, std::min(kLogitBlock, vocab_size_ - begin));
  }

  template <class F>
  void linear(const F& score_grad, void* const* grad_sources) {
    Acc dz[kLogitBlock], flags[kLogitBlock];
    for_blocks([&](int64_t begin, int64_t n) {
      score_grad(begin, n, dz);
      if (fused_.anchored)
        anchored_sum_ += logit_kernels<Acc>().anchored(fused_, begin, n, dz, flags);
      for (int64_t i = 0; i < fused_.num_sources; ++i)
        sums_[i] += logit_kernels<Acc>().linear_grad(fused_, sources_[i], begin, n, dz,
                                                     fused_.anchored ? flags : nullptr, grad_sources[numbers_[i]]);
    });
    score_sum_ = anchored_sum_ * static_cast<double>(fused_.weight_sum);
    for (int64_t i = 0; i < fused_.num_sources; ++i) score_sum_ += sums_[i] * static_cast<double>(sources_[i].weight);
  }

  template <class F>
  void mixture(const F& score_grad, void* const* grad_sources) {
    Acc dz[kLogitBlock], z[kLogitBlock];
    FusedRow<Acc> untempered = fused_;
    untempered.temperature = 1;
    // a source's gradient needs the whole row's sum of r dz
    for (const bool write : {false, true}) {
      for_blocks([&](int64_t begin, int64_t n) {
        score_grad(begin, n, dz);
        logit_kernels<Acc>().combine(untempered, nullptr, begin, n, z);
        if (!write) score_sum_ += logit_kernels<Acc>().inner_of_nonzero(dz, z, n);
        for (int64_t i = 0; i < fused_.num_sources; ++i) {
          const double part =
              logit_kernels<Acc>().mixture_grad(fused_, sources_[i], begin, n, dz, z, static_cast<Acc>(sums_[i]),
                                                write ? grad_sources[numbers_[i]] : nullptr);
          if (!write) sums_[i] += part;
        }
      });
    }
  }

  LogitOut out_;
  int64_t vocab_size_;
  Scratch scratch_;
  LogitSource<Acc>* sources_;
  int64_t* numbers_;  // of the sources that are read
  double* sums_;      // of dz times the logits, or of r dz
  double anchored_sum_ = 0;  // of dz times the anchor's logit where it stands alone
  double score_sum_ = 0;     // of dz times the fused logits without temperature
  FusedRow<Acc> fused_;
};

std::tuple<std::vector<Tensor>, Tensor, Tensor> fuse_logits_backward_cpu(
    Tensor grad_in, Tensor fused_in, std::vector<Tensor> sources_in, Tensor weights, Tensor temperature,
    Tensor source_stats_in, bool mixture, int64_t anchor, int64_t neg_inf, int64_t out) {
  MOE_CHECK(weights.dim() == 2 && fused_in.dim() == 2 && fused_in.size(0) == weights.size(0) &&
                grad_in.numel() == fused_in.numel() && grad_in.scalar_type() == fused_in.scalar_type() &&
                temperature.numel() == weights.size(0) && source_stats_in.numel() == 2 * weights.numel() &&
                source_stats_in.scalar_type() == fused_in.scalar_type(),
            "fuse_logits: the gradient must have the shape and dtype of the result");
  const Tensor grad = torch::stable::contiguous(grad_in), fused = torch::stable::contiguous(fused_in);
  const Tensor source_stats = torch::stable::contiguous(source_stats_in);
  const int64_t num_rows = weights.size(0), num_sources = weights.size(1), vocab_size = fused.size(1);
  std::vector<Tensor> grad_sources;
  for (const Tensor& source : sources_in)
    grad_sources.push_back(torch::stable::new_empty(source, {source.size(0), source.size(1)}));
  Tensor grad_weights = torch::stable::new_empty(weights, {num_rows, num_sources});
  Tensor grad_temperature = torch::stable::new_empty(temperature, {num_rows});
  const auto run = [&]<class Acc>() {
    Scratch scratch;
    const Sources<Acc> sources(sources_in, std::nullopt, weights, vocab_size, scratch);
    Acc* temperatures = scratch.take<Acc>(num_rows);
    read_floats(temperature, temperatures);
    Acc* weight_grads = scratch.take<Acc>(num_rows * num_sources);
    Acc* temperature_grads = scratch.take<Acc>(num_rows);
    parallel_tasks(num_rows, [&](int64_t row) {
      Scratch task_scratch;
      const Acc* row_fused = data<Acc>(fused) + row * vocab_size;
      const bool broken = row_fused[0] != row_fused[0];
      void** rows = task_scratch.take<void*>(num_sources);
      for (int64_t k = 0; k < num_sources; ++k) {
        const Tensor& tensor = grad_sources[static_cast<size_t>(k)];
        const int64_t bytes = tensor.size(1) * static_cast<int64_t>(tensor.element_size());
        char* start = static_cast<char*>(tensor.mutable_data_ptr()) + row * bytes;
        rows[k] = start;
        const int64_t read = broken || sources.weight(row, k) == 0 ? 0 : vocab_size * static_cast<int64_t>(tensor.element_size());
        fill_zero(start + read, bytes - read);
      }
      if (broken) {
        fill_zero(weight_grads + row * num_sources, num_sources);
        temperature_grads[row] = 0;
        return;
      }
      RowGradient<Acc> gradient(sources, row, temperatures[row], data<SourceStats<Acc>>(source_stats) + row * num_sources, mixture,
                                anchor, static_cast<NegInf>(neg_inf), static_cast<LogitOut>(out));
      gradient.run(data<Acc>(grad) + row * vocab_size, row_fused, rows, weight_grads + row * num_sources, num_sources,
                   temperature_grads + row);
    });
    write_floats(weight_grads, grad_weights);
    write_floats(temperature_grads, grad_temperature);
  };
  if (fused.scalar_type() == ScalarType::Double)
    run.template operator()<double>();
  else
    run.template operator()<float>();
  return {grad_sources, grad_weights, grad_temperature};
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("fuse_logits_backward", TORCH_BOX(&moe::fuse_logits_backward_cpu));
}
