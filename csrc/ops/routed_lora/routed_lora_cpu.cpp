// lora_shrink, lora_expand and the gradient of a factor on the CPU.
//
// Tokens meet their adapters in three ways, and the order of work makes them one: pairs are sorted by adapter, so each
// factor is read once a call (segments); tokens that name the same adapters in the same order (every token, where all
// adapters are mixed: the concatenated product) share what they read in lora_expand; a token that is alone with its
// adapters gathers its rows. A sum's order is that of its own token alone in all three, so there is nothing to choose.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "common/kept_memory.h"
#include "common/parallel.h"
#include "microkernels/convert.h"
#include "microkernels/table.h"
#include "ops/routed_lora/routed_lora.h"

namespace moe {
namespace {

constexpr int64_t kTokensPerTask = 32;
// columns of a task: 16 rows of a factor (32 KiB) and two rows of sums stay in L2, mostly in L1
constexpr int64_t kColumnBlock = 512;
// tokens whose products a gradient adds before they join the total, so that rounding errors grow with the chunks
constexpr int64_t kTokenChunk = 128;
constexpr int64_t kVectorPadding = 16;  // rank_sums reads and writes whole vectors

struct Range {
  int64_t adapter, begin, end;
};

// Runs f(adapter, begin, end) over parts of the sorted pairs, each of one adapter.
template <class F>
void over_segments(const AdapterPairs& pairs, const F& f) {
  Scratch scratch;
  int64_t num_ranges = 0;
  Range* ranges = scratch.take<Range>(pairs.num_tokens * pairs.top_k);
  for (int64_t e = 0; e < pairs.num_adapters; ++e)
    for (int64_t begin = pairs.offsets[e]; begin < pairs.offsets[e + 1]; begin += kTokensPerTask)
      ranges[num_ranges++] = {e, begin, std::min<int64_t>(begin + kTokensPerTask, pairs.offsets[e + 1])};
  parallel_tasks(num_ranges, [&](int64_t i) { f(ranges[i].adapter, ranges[i].begin, ranges[i].end); });
}

template <class T>
ScalarType accumulator_dtype() {
  return sizeof(acc_t<T>) == 4 ? ScalarType::Float : ScalarType::Double;
}

void check_ids(const char* op, const Tensor& adapter_ids, int64_t num_tokens) {
  MOE_CHECK(adapter_ids.dim() == 2 && adapter_ids.size(0) == num_tokens, op,
            ": adapter_ids must be of shape [num_tokens, top_k]");
}

// products[t, k, j] = <x[t], row j of adapter_ids[t, k]>, zero past the adapter's rank and for -1
Tensor lora_shrink_cpu(const Tensor& x_in, const Tensor& factor, const std::optional<Tensor>& rank_starts,
                       const std::optional<Tensor>& ranks, const Tensor& adapter_ids, int64_t max_rank) {
  const Tensor x = with_contiguous_rows(x_in);
  MOE_CHECK(x.dim() == 2 && factor.scalar_type() == x.scalar_type(),
            "lora_shrink: x must be 2-dimensional and of the factor's dtype");
  check_ids("lora_shrink", adapter_ids, x.size(0));
  const int64_t num_tokens = x.size(0), top_k = adapter_ids.size(1);
  Tensor products;
  dispatch_float("lora_shrink", x.scalar_type(), [&]<class T>() {
    using Acc = acc_t<T>;
    const AdapterRows<T> rows("lora_shrink", factor, rank_starts, ranks, max_rank);
    MOE_CHECK(rows.length == x.size(1), "lora_shrink: x must be of shape [num_tokens, in=", rows.length, "]");
    products = torch::stable::new_empty(x, {num_tokens, top_k, max_rank}, accumulator_dtype<T>());
    Acc* out = mutable_data<Acc>(products);
    Scratch scratch;
    const AdapterPairs pairs("lora_shrink", adapter_ids, rows, scratch);
    for (int64_t pair = 0; pair < num_tokens * top_k; ++pair) {
      const int64_t rank = pairs.ids[pair] < 0 ? 0 : rows.rank(pairs.ids[pair]);
      fill_zero(out + pair * max_rank + rank, max_rank - rank);
    }
    over_segments(pairs, [&](int64_t adapter, int64_t begin, int64_t end) {
      const T* inputs[kTokensPerTask];
      Acc* outputs[kTokensPerTask];
      for (int64_t i = begin; i < end; ++i) {
        inputs[i - begin] = data<T>(x) + pairs.pairs[i] / top_k * x.stride(0);
        outputs[i - begin] = out + pairs.pairs[i] * max_rank;
      }
      Scratch task_scratch;
      const int64_t rank = rows.rank(adapter);
      const T** factor_rows = task_scratch.take<const T*>(rank);
      for (int64_t j = 0; j < rank; ++j) factor_rows[j] = rows.row(adapter, j);
      microkernels<T>().rank_products(inputs, end - begin, factor_rows, rank, rows.length, outputs);
    });
  });
  return products;
}

// Tokens in an order that brings those with the same adapters together.
void order_tokens(const AdapterPairs& pairs, int32_t* tokens) {
  if (pairs.top_k != 1) {
    for (int64_t t = 0; t < pairs.num_tokens; ++t) tokens[t] = static_cast<int32_t>(t);
    return;
  }
  int64_t count = pairs.offsets[pairs.num_adapters];
  std::copy_n(pairs.pairs, count, tokens);
  for (int64_t t = 0; t < pairs.num_tokens; ++t)
    if (pairs.ids[t] < 0) tokens[count++] = static_cast<int32_t>(t);
}

// out[t] = base[t] + sum_k adapter_weights[t, k] * scaling[e] * sum_j v[t, k, j] * (row j of e = adapter_ids[t, k])
Tensor lora_expand_cpu(const Tensor& v_in, const Tensor& factor, const std::optional<Tensor>& rank_starts,
                       const std::optional<Tensor>& ranks, const Tensor& adapter_ids,
                       const std::optional<Tensor>& adapter_weights, const std::optional<Tensor>& scaling,
                       const std::optional<Tensor>& base_in) {
  const Tensor v = torch::stable::contiguous(v_in);
  MOE_CHECK(v.dim() == 3, "lora_expand: v must be of shape [num_tokens, top_k, max_rank]");
  check_ids("lora_expand", adapter_ids, v.size(0));
  const int64_t num_tokens = v.size(0), top_k = v.size(1), max_rank = v.size(2);
  MOE_CHECK(adapter_ids.size(1) == top_k && (!adapter_weights || adapter_weights->numel() == num_tokens * top_k),
            "lora_expand: adapter_ids and adapter_weights must be of shape [num_tokens, top_k]");
  Tensor result;
  dispatch_float("lora_expand", factor.scalar_type(), [&]<class T>() {
    using Acc = acc_t<T>;
    const AdapterRows<T> rows("lora_expand", factor, rank_starts, ranks, max_rank);
    MOE_CHECK(v.scalar_type() == accumulator_dtype<T>(), "lora_expand: v must be float32 (float64 for a float64 factor)");
    MOE_CHECK(!scaling || scaling->numel() == rows.num_adapters, "lora_expand: scaling must be of shape [num_adapters]");
    std::optional<Tensor> base;
    if (base_in) {
      base = with_contiguous_rows(*base_in);
      MOE_CHECK(base->dim() == 2 && base->size(0) == num_tokens && base->size(1) == rows.length &&
                    base->scalar_type() == factor.scalar_type(),
                "lora_expand: base must be of shape [num_tokens, out=", rows.length, "] and the factor's dtype");
    }
    result = new_result(factor, {num_tokens, rows.length});
    T* out = mutable_data<T>(result);
    Scratch scratch;
    const AdapterPairs pairs("lora_expand", adapter_ids, rows, scratch);
    Acc *weights = nullptr, *scales = nullptr;
    if (adapter_weights) read_floats(*adapter_weights, weights = scratch.take<Acc>(num_tokens * top_k));
    if (scaling) read_floats(*scaling, scales = scratch.take<Acc>(rows.num_adapters));
    int32_t* tokens = scratch.take<int32_t>(num_tokens);
    order_tokens(pairs, tokens);
    Range* groups = scratch.take<Range>(num_tokens);
    int64_t num_groups = 0;
    for (int64_t begin = 0, end = 0; begin < num_tokens; begin = end) {
      while (end < num_tokens && end < begin + kTokensPerTask && pairs.same_adapters(tokens[begin], tokens[end])) ++end;
      groups[num_groups++] = {0, begin, end};
    }
    const int64_t blocks = (rows.length + kColumnBlock - 1) / kColumnBlock;
    parallel_tasks(num_groups * blocks, [&](int64_t task) {
      const Range& group = groups[task / blocks];
      const int64_t column = task % blocks * kColumnBlock, n = std::min(kColumnBlock, rows.length - column);
      const int32_t* ids = pairs.ids_of(tokens[group.begin]);
      Scratch task_scratch;
      const T** factor_rows = task_scratch.take<const T*>(top_k * max_rank);
      int64_t num_rows = 0;
      for (int64_t k = 0; k < top_k; ++k)
        for (int64_t j = 0; ids[k] >= 0 && j < rows.rank(ids[k]); ++j)
          factor_rows[num_rows++] = rows.row(ids[k], j) + column;
      Acc* row_weights[2];
      for (auto& row : row_weights) row = task_scratch.take<Acc>(num_rows);
      Acc* sums = task_scratch.take<Acc>(2 * (kColumnBlock + kVectorPadding));
      for (int64_t i = group.begin; i < group.end; i += 2) {
        const int64_t here = std::min<int64_t>(2, group.end - i);
        const T* base_rows[2] = {};
        T* out_rows[2] = {};
        for (int64_t m = 0; m < here; ++m) {
          const int64_t t = tokens[i + m];
          out_rows[m] = out + t * rows.length + column;
          if (base) base_rows[m] = data<T>(*base) + t * base->stride(0) + column;
          if (num_rows == 0) {  // not through sums: -0 and NaN keep their bits
            if (base)
              std::memcpy(static_cast<void*>(out_rows[m]), base_rows[m], static_cast<size_t>(n) * sizeof(T));
            else
              fill_zero(out_rows[m], n);
          }
          int64_t at = 0;
          for (int64_t k = 0; k < top_k; ++k) {
            if (ids[k] < 0) continue;
            const Acc weight = (weights == nullptr ? Acc{1} : weights[t * top_k + k]) *
                               (scales == nullptr ? Acc{1} : scales[ids[k]]);
            const Acc* values = data<Acc>(v) + (t * top_k + k) * max_rank;
            for (int64_t j = 0; j < rows.rank(ids[k]); ++j) row_weights[m][at++] = weight * values[j];
          }
        }
        if (num_rows > 0)
          microkernels<T>().rank_sums(factor_rows, num_rows, row_weights, here, base ? base_rows : nullptr, out_rows, sums,
                                      kColumnBlock + kVectorPadding, n);
      }
    });
  });
  return result;
}

// grad[row j of e] = sum over e's pairs (t, k), in order, of v[t, k, j] * x[t]; [num_adapters, max_rank, length], or packed
// [num_rows, length] where rows of no adapter are zero
Tensor lora_factor_grad_cpu(const Tensor& v_in, const Tensor& x_in, const std::optional<Tensor>& rank_starts,
                            const std::optional<Tensor>& ranks, const Tensor& adapter_ids, int64_t num_adapters,
                            const std::optional<int64_t>& num_rows) {
  const Tensor v = torch::stable::contiguous(v_in), x = with_contiguous_rows(x_in);
  MOE_CHECK(v.dim() == 3 && x.dim() == 2 && x.size(0) == v.size(0),
            "lora_factor_grad: v must be [num_tokens, top_k, max_rank] and x [num_tokens, length]");
  check_ids("lora_factor_grad", adapter_ids, v.size(0));
  const int64_t top_k = v.size(1), max_rank = v.size(2), length = x.size(1);
  MOE_CHECK(adapter_ids.size(1) == top_k, "lora_factor_grad: adapter_ids must be of shape [num_tokens, top_k]");
  Tensor grad = num_rows ? new_result(x, {*num_rows, length}) : new_result(x, {num_adapters, max_rank, length});
  dispatch_float("lora_factor_grad", x.scalar_type(), [&]<class T>() {
    using Acc = acc_t<T>;
    MOE_CHECK(v.scalar_type() == accumulator_dtype<T>(), "lora_factor_grad: v must be float32 (float64 for float64 x)");
    const AdapterRows<T> rows("lora_factor_grad", grad, rank_starts, ranks, max_rank);
    MOE_CHECK(rows.num_adapters == num_adapters, "lora_factor_grad: rank_starts must be of shape [num_adapters]");
    T* out = mutable_data<T>(grad);
    fill_zero(out, grad.numel());
    Scratch scratch;
    const AdapterPairs pairs("lora_factor_grad", adapter_ids, rows, scratch);
    constexpr int64_t kBlock = kColumnBlock / 2;  // twice as many rows are read again as in lora_expand
    const int64_t blocks = (length + kBlock - 1) / kBlock;
    parallel_tasks(num_adapters * blocks, [&](int64_t task) {
      const int64_t adapter = task / blocks, column = task % blocks * kBlock, n = std::min(kBlock, length - column);
      const int64_t begin = pairs.offsets[adapter], count = pairs.offsets[adapter + 1] - begin;
      if (count == 0) return;
      Scratch task_scratch;
      const T** inputs = task_scratch.take<const T*>(count);
      const Acc** values = task_scratch.take<const Acc*>(count);
      for (int64_t i = 0; i < count; ++i) {
        inputs[i] = data<T>(x) + pairs.pairs[begin + i] / top_k * x.stride(0) + column;
        values[i] = data<Acc>(v) + pairs.pairs[begin + i] * max_rank;
      }
      Acc* weights[2];
      for (auto& row : weights) row = task_scratch.take<Acc>(kTokenChunk);
      constexpr int64_t kStride = kBlock + kVectorPadding;
      Acc* sums = task_scratch.take<Acc>(2 * kStride);
      Acc* total = task_scratch.take<Acc>(2 * kStride);
      const int64_t rank = rows.rank(adapter);
      for (int64_t j = 0; j < rank; j += 2) {
        const int64_t here = std::min<int64_t>(2, rank - j);
        fill_zero(total, 2 * kStride);
        for (int64_t chunk = 0; chunk < count; chunk += kTokenChunk) {
          const int64_t size = std::min(kTokenChunk, count - chunk);
          for (int64_t m = 0; m < here; ++m)
            for (int64_t i = 0; i < size; ++i) weights[m][i] = values[chunk + i][j + m];
          microkernels<T>().rank_sums(inputs + chunk, size, weights, here, nullptr, nullptr, sums, kStride, n);
          for (int64_t m = 0; m < here; ++m)
            microkernels<T>().accumulate(total + m * kStride, sums + m * kStride, nullptr, Acc{1}, n);
        }
        for (int64_t m = 0; m < here; ++m)
          microkernels<T>().store_row(total + m * kStride, nullptr,
                                      out + (rows.row(adapter, j + m) - rows.data) + column, n);
      }
    });
  });
  return grad;
}

// out[t, i] = x[t, i], or zero with probability p: a function of the seed and of the place (t, i)
Tensor lora_dropout_cpu(const Tensor& x_in, double p, const Tensor& seed) {
  MOE_CHECK(x_in.dim() == 2, "lora_dropout: x must be of shape [num_tokens, in]");
  MOE_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "lora_dropout: seed must be one int64");
  MOE_CHECK(p >= 0 && p < 1, "lora_dropout: p must be in [0, 1), got ", p);
  const Tensor x = with_contiguous_rows(x_in);
  const int64_t num_tokens = x.size(0), length = x.size(1);
  Tensor result = new_result(x, {num_tokens, length});
  const uint64_t key = static_cast<uint64_t>(*data<int64_t>(seed));
  const uint32_t below = static_cast<uint32_t>(p * 0x1p32);
  dispatch_float("lora_dropout", x.scalar_type(), [&]<class T>() {
    T* out = mutable_data<T>(result);
    parallel_ranges(num_tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        microkernels<T>().dropout(data<T>(x) + t * x.stride(0), key, static_cast<uint64_t>(t), below, out + t * length, length);
    });
  });
  return result;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("lora_dropout", TORCH_BOX(&moe::lora_dropout_cpu));
  m.impl("lora_shrink", TORCH_BOX(&moe::lora_shrink_cpu));
  m.impl("lora_expand", TORCH_BOX(&moe::lora_expand_cpu));
  m.impl("lora_factor_grad", TORCH_BOX(&moe::lora_factor_grad_cpu));
}
