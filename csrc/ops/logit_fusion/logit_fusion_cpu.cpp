// Logit fusion on the CPU: one row at a time, in blocks of kLogitBlock tokens. A row whose result is a token is not
// written anywhere unless a filter has to look at it twice.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/parallel.h"
#include "ops/logit_fusion/draw.h"
#include "ops/logit_fusion/logit_fusion.h"

namespace moe {
namespace {

struct Settings {
  bool mixture;
  int64_t anchor;
  NegInf neg_inf;
  TokenFilter mask, floor, keep;
  LogitOut out;
};

template <class Acc>
class RowFusion {
  static constexpr Acc kNone = -std::numeric_limits<Acc>::infinity();

 public:
  // out_row: [vocab_size] for logits, log_probs and probs, else null. stats: [num_sources], what backward needs.
  RowFusion(const Settings& settings, const Sources<Acc>& sources, int64_t row, Acc temperature, Acc* out_row,
            SourceStats<Acc>* stats)
      : settings_(settings), vocab_size_(sources.vocab_size()), sources_(scratch_.take<LogitSource<Acc>>(sources.num_sources())) {
    fused_ = {.sources = sources_, .num_sources = 0, .anchor = nullptr, .mixture = settings.mixture,
              .anchored = !settings.mixture && settings.neg_inf == NegInf::zero, .weight_sum = 0,
              .temperature = temperature == 0 ? Acc{1} : temperature, .shift = 0};
    usable_ = (temperature > 0 || (temperature == 0 && out_row == nullptr)) &&
              temperature < std::numeric_limits<Acc>::infinity();
    num_tokens_ = vocab_size_;
    for (int64_t k = 0; k < sources.num_sources(); ++k) usable_ &= std::isfinite(sources.weight(row, k));
    for (int64_t k = 0; k < sources.num_sources() && usable_; ++k) {
      stats[k] = {kNone, 0};
      if (sources.weight(row, k) == 0) continue;
      LogitSource<Acc>& source = sources_[fused_.num_sources++] = sources.source(row, k);
      fused_.weight_sum += source.weight;
      if (k == settings.anchor) fused_.anchor = &source;
      if (settings.mixture) {
        RowSum<Acc> sum;
        usable_ &= source.weight > 0 && sum_row(source, vocab_size_, sum);
        stats[k] = {sum.top, sum.empty() ? Acc{0} : static_cast<Acc>(std::log(sum.sum))};
        prepare_mixture(source, stats[k]);
      } else if (source.weight < 0 && k != settings.anchor) {
        source.floor = stats[k].floor_or_top = floor_of(source);
      }
    }
    if (usable_ && fused_.anchor != nullptr && !settings.mask.keeps_all) choose_candidates();
    const bool filters = !settings.keep.keeps_all;
    if (out_row != nullptr && tokens_ == nullptr && !filters)
      z_ = out_row;
    else if (out_row != nullptr || filters)
      z_ = scratch_.take<Acc>(num_tokens_);
    if (usable_) fuse();
    if (usable_ && filters) filter();
    if (usable_ && tokens_ != nullptr && !total_.empty() && settings.out != LogitOut::logits) {
      // of a few tokens the logits are made again beside the largest: they are rounded once it is taken off
      fused_.shift = total_.top;
      fuse();
    }
    broken_ = !usable_;
    usable_ = usable_ && !total_.empty();
  }

  void write(Acc* out_row) {
    if (broken_) return fill(out_row, vocab_size_, std::numeric_limits<Acc>::quiet_NaN());
    const Acc absent = settings_.out == LogitOut::probs ? Acc{0} : kNone;
    if (!usable_) return fill(out_row, vocab_size_, absent);
    for (int64_t begin = 0; begin < num_tokens_; begin += kLogitBlock) {
      const int64_t size = std::min(kLogitBlock, num_tokens_ - begin);
      if (settings_.out == LogitOut::log_probs) {
        // in two steps: the largest logit may be far larger than the logarithm of the sum
        logit_kernels<Acc>().subtract(z_ + begin, size, total_.top, static_cast<Acc>(std::log(total_.sum)));
      } else if (settings_.out == LogitOut::probs) {
        logit_kernels<Acc>().exponentials(z_ + begin, size, total_.top, z_ + begin);
        microkernels<Acc>().scale(z_ + begin, static_cast<Acc>(1 / total_.sum), z_ + begin, size);
      }
    }
    if (tokens_ == nullptr) return;
    fill(out_row, vocab_size_, absent);
    for (int64_t i = 0; i < num_tokens_; ++i) out_row[tokens_[i]] = z_[i];
  }

  // -1 where there is no token
  int64_t argmax() {
    if (!usable_) return -1;
    for (int64_t block = 0; block * kLogitBlock < num_tokens_; ++block) {
      if (tops_[block] != total_.top) continue;
      const Acc* z = block_of(block);
      for (int64_t i = 0; i < block_size(block); ++i)
        if (z[i] == total_.top) return token(block * kLogitBlock + i);
    }
    return -1;
  }

  // The first token whose cumulative probability exceeds u.
  int64_t sample(double u) {
    if (!usable_) return -1;
    double target = u * total_.sum;
    int64_t last_block = -1;
    for (int64_t block = 0; block * kLogitBlock < num_tokens_; ++block) {
      const double mass = mass_of(block);
      if (mass == 0) continue;
      last_block = block;
      if (mass > target) break;
      target -= mass;
    }
    const double scale = std::exp(static_cast<double>(tops_[last_block]) - static_cast<double>(total_.top));
    const Acc* z = block_of(last_block);
    Acc exps[kLogitBlock];
    logit_kernels<Acc>().exponentials(z, block_size(last_block), tops_[last_block], exps);
    // rounding must not run past the last token that can be drawn
    int64_t last = -1;
    for (int64_t i = 0; i < block_size(last_block); ++i) {
      if (exps[i] == 0) continue;
      last = i;
      target -= static_cast<double>(exps[i]) * scale;
      if (target < 0) break;
    }
    return token(last_block * kLogitBlock + last);
  }

 private:
  static void fill(Acc* out, int64_t n, Acc value) {
    for (int64_t i = 0; i < n; ++i) out[i] = value;
  }

  int64_t token(int64_t i) const { return tokens_ == nullptr ? i : tokens_[i]; }
  int64_t block_size(int64_t block) const { return std::min(kLogitBlock, num_tokens_ - block * kLogitBlock); }
  double mass_of(int64_t block) const {
    return sums_[block] == 0 ? 0
                             : sums_[block] * std::exp(static_cast<double>(tops_[block]) - static_cast<double>(total_.top));
  }

  // The block's fused logits: kept, or made again.
  const Acc* block_of(int64_t block) {
    if (z_ != nullptr) return z_ + block * kLogitBlock;
    logit_kernels<Acc>().combine(fused_, tokens_, block * kLogitBlock, block_size(block), block_);
    return block_;
  }

  // The logit below which a source of negative weight is raised.
  Acc floor_of(const LogitSource<Acc>& source) {
    if (settings_.floor.keeps_all && settings_.neg_inf != NegInf::floor) return kNone;
    Scratch scratch;
    Acc* values = scratch.take<Acc>(vocab_size_);
    usable_ &= logit_kernels<Acc>().load(source, 0, vocab_size_, values);
    if (!usable_) return kNone;
    Acc floor = Threshold<Acc>(values, vocab_size_, logit_kernels<Acc>().largest(values, vocab_size_), scratch)(settings_.floor);
    if (settings_.neg_inf == NegInf::floor) {
      const Acc smallest = logit_kernels<Acc>().smallest_finite(values, vocab_size_);
      if (std::isfinite(smallest)) floor = std::max(floor, smallest);
    }
    return floor;
  }

  // The tokens inside the anchor's mask, in rising order.
  void choose_candidates() {
    tokens_ = scratch_.take<int32_t>(vocab_size_);
    num_tokens_ = 0;
    Scratch scratch;
    Acc* values = scratch.take<Acc>(vocab_size_);
    usable_ = logit_kernels<Acc>().load(*fused_.anchor, 0, vocab_size_, values);
    if (!usable_) return;
    const int64_t num_blocks = (vocab_size_ + kLogitBlock - 1) / kLogitBlock;
    Acc* tops = scratch.take<Acc>(num_blocks);
    Acc top = kNone;
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t begin = block * kLogitBlock;
      tops[block] = logit_kernels<Acc>().largest(values + begin, std::min(kLogitBlock, vocab_size_ - begin));
      top = std::max(top, tops[block]);
    }
    const Acc bound = Threshold<Acc>(values, vocab_size_, top, scratch)(settings_.mask);
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t begin = block * kLogitBlock;
      if (tops[block] >= bound)
        num_tokens_ += logit_kernels<Acc>().at_least(values + begin, std::min(kLogitBlock, vocab_size_ - begin), bound,
                                                     static_cast<int32_t>(begin), tokens_ + num_tokens_);
    }
  }

  // The logits of tokens_, or of all, in z_ if there is one; of their blocks the largest and the sum of exponentials.
  void fuse() {
    const int64_t num_blocks = (num_tokens_ + kLogitBlock - 1) / kLogitBlock;
    if (tops_ == nullptr) {
      tops_ = scratch_.take<Acc>(num_blocks);
      sums_ = scratch_.take<double>(num_blocks);
    }
    // a token's value alone asks for no exponentials
    const bool needs_sum = settings_.out != LogitOut::argmax && settings_.out != LogitOut::logits;
    total_ = {};
    for (int64_t block = 0; block < num_blocks && usable_; ++block) {
      Acc* z = z_ == nullptr ? block_ : z_ + block * kLogitBlock;
      usable_ = logit_kernels<Acc>().combine(fused_, tokens_, block * kLogitBlock, block_size(block), z);
      const Acc top = tops_[block] = logit_kernels<Acc>().largest(z, block_size(block));
      usable_ &= top < std::numeric_limits<Acc>::infinity();  // a sum that overflows has no distribution
      sums_[block] = needs_sum && top > kNone
                         ? static_cast<double>(logit_kernels<Acc>().exp_sum(z, block_size(block), top))
                         : 0.0;
      if (top > kNone) total_.add(top, sums_[block]);
    }
  }

  // Leaves what `keep` keeps in tokens_.
  void filter() {
    int32_t* kept = scratch_.take<int32_t>(num_tokens_);
    int64_t count = 0;
    Scratch scratch;
    const Acc bound = Threshold<Acc>(z_, num_tokens_, total_.top, scratch)(settings_.keep);
    for (int64_t block = 0; block * kLogitBlock < num_tokens_; ++block) {
      const int64_t begin = block * kLogitBlock;
      if (tops_[block] >= bound)
        count += logit_kernels<Acc>().at_least(z_ + begin, block_size(block), bound, static_cast<int32_t>(begin), kept + count);
    }
    for (int64_t i = 0; i < count; ++i) {
      z_[i] = z_[kept[i]];
      kept[i] = token(kept[i]);
    }
    tokens_ = kept;
    num_tokens_ = count;
  }

  const Settings& settings_;
  int64_t vocab_size_;
  Scratch scratch_;
  LogitSource<Acc>* sources_;
  FusedRow<Acc> fused_;
  bool usable_ = true;           // there is a token
  bool broken_ = false;          // NaN or +inf was read
  int32_t* tokens_ = nullptr;    // the candidates; null where all tokens are
  int64_t num_tokens_;
  Acc* z_ = nullptr;             // the fused logits, if kept
  Acc* tops_ = nullptr;          // of each block; room for those of all tokens
  double* sums_ = nullptr;       // of exp(z - top of the block)
  RowSum<Acc> total_;
  Acc block_[kLogitBlock];
};

std::tuple<Tensor, Tensor> fuse_logits_cpu(std::vector<Tensor> sources_in, std::optional<Tensor> rows, Tensor weights,
                                           Tensor temperature, std::optional<Tensor> request_ids_in, int64_t seed,
                                           int64_t step, int64_t vocab_size, bool mixture, int64_t anchor,
                                           int64_t neg_inf, std::vector<double> mask, std::vector<double> floor,
                                           std::vector<double> keep, int64_t out_kind) {
  MOE_CHECK(weights.dim() == 2 && !sources_in.empty() && temperature.numel() == weights.size(0),
            "fuse_logits: weights must be of shape [num_rows, num_sources] and temperature of shape [num_rows]");
  const int64_t num_rows = weights.size(0), num_sources = weights.size(1);
  MOE_CHECK(anchor >= 0 && anchor < num_sources, "fuse_logits: anchor must be in [0, ", num_sources, "), got ", anchor);
  const Settings settings{mixture, anchor, static_cast<NegInf>(neg_inf), TokenFilter(mask), TokenFilter(floor),
                          TokenFilter(keep), static_cast<LogitOut>(out_kind)};
  const bool is_double = sources_in[0].scalar_type() == ScalarType::Double;
  const ScalarType acc_dtype = is_double ? ScalarType::Double : ScalarType::Float;
  const bool is_token = settings.out == LogitOut::argmax || settings.out == LogitOut::sample;
  Tensor out = is_token ? torch::stable::new_empty(weights, {num_rows}, ScalarType::Long)
                        : torch::stable::new_empty(weights, {num_rows, vocab_size}, acc_dtype);
  Tensor stats = torch::stable::new_empty(weights, {num_rows, num_sources, 2}, acc_dtype);
  std::optional<Tensor> request_ids;
  if (settings.out == LogitOut::sample) {
    MOE_CHECK(request_ids_in && request_ids_in->numel() == num_rows && request_ids_in->scalar_type() == ScalarType::Long,
              "fuse_logits: request_ids must be int64 of shape [num_rows=", num_rows, "]");
    request_ids = torch::stable::contiguous(*request_ids_in);
  }
  const auto run = [&]<class Acc>() {
    Scratch scratch;
    const Sources<Acc> sources(sources_in, rows, weights, vocab_size, scratch);
    Acc* temperatures = scratch.take<Acc>(num_rows);
    read_floats(temperature, temperatures);
    SourceStats<Acc>* all_stats = mutable_data<SourceStats<Acc>>(stats);
    parallel_tasks(num_rows, [&](int64_t row) {
      Acc* out_row = is_token ? nullptr : mutable_data<Acc>(out) + row * vocab_size;
      RowFusion<Acc> fusion(settings, sources, row, temperatures[row], out_row, all_stats + row * num_sources);
      if (!is_token)
        fusion.write(out_row);
      else
        mutable_data<int64_t>(out)[row] =
            settings.out == LogitOut::argmax || temperatures[row] == 0
                ? fusion.argmax()
                : fusion.sample(uniform(data<int64_t>(*request_ids)[row], seed, step));
    });
  };
  if (is_double)
    run.template operator()<double>();
  else
    run.template operator()<float>();
  return {out, stats};
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) { m.impl("fuse_logits", TORCH_BOX(&moe::fuse_logits_cpu)); }
