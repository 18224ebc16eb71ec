// Linear layers with ternary task vectors on the CPU: W + aT is never made.
//
//   out[t] = W x[t] + sum over deltas e, in order, of a[t, e] * (T_e x[t]) + bias, rounded once
//
// A task is a block of rows of W: the product with W, then, for each delta, the rows of its planes for the tokens that use
// it, then the bias. A token's result is made of its own row alone: other tokens' values are never multiplied by zero.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "microkernels/ternary_linear_table.h"
#include "ops/grouped_gemm/grouped_gemm.h"

namespace moe {
namespace {

constexpr int64_t kGradRows = 64;      // rows of W that a gradient's task takes
constexpr int64_t kVectorPadding = 16;  // rank_sums reads and writes whole vectors

// A token's use of a delta; `pair` is its place in delta_ids.
template <class Acc>
struct Use {
  int64_t token, pair;
  Acc weight;  // times the delta's value
};

// Who uses which delta: for each delta its uses in the order of pairs.
template <class T>
struct TernaryUses {
  using Acc = acc_t<T>;
  std::vector<const uint64_t*> planes;
  std::vector<Acc> values;
  std::vector<std::vector<Use<Acc>>> uses;
  std::vector<Tensor> keep_alive;

  TernaryUses(const char* op, const std::vector<Tensor>& deltas, const std::vector<double>& scales,
              const std::optional<Tensor>& ids, const std::optional<Tensor>& weights, int64_t num_tokens, int64_t numel) {
    const int64_t count = static_cast<int64_t>(deltas.size()), groups = (numel + 63) / 64;
    MOE_CHECK(deltas.size() == scales.size(), op, ": there must be as many coefficients as deltas");
    for (const Tensor& delta : deltas) {
      MOE_CHECK(delta.scalar_type() == ScalarType::Long && delta.is_contiguous() && delta.dim() == 2 &&
                    delta.size(0) == groups && delta.size(1) == 2,
                op, ": the planes of ", numel, " elements must be int64 of shape [", groups, ", 2]");
      planes.push_back(reinterpret_cast<const uint64_t*>(data<int64_t>(delta)));
    }
    for (double scale : scales) values.push_back(static_cast<Acc>(scale));
    uses.resize(deltas.size());
    MOE_CHECK(!ids || (ids->dim() == 2 && ids->size(0) == num_tokens), op, ": delta_ids must be of shape [num_tokens, K]");
    const int64_t top_k = ids ? ids->size(1) : count;
    MOE_CHECK(!weights || (weights->dim() == 2 && weights->size(0) == num_tokens && weights->size(1) == top_k), op,
              ": delta_weights must be of shape [num_tokens, ", top_k, "]");
    std::vector<Acc> given(static_cast<size_t>(num_tokens * top_k), Acc{1});
    if (weights) {
      const Tensor w = torch::stable::contiguous(*weights);
      dispatch_float(op, w.scalar_type(), [&]<class W>() {
        if constexpr (sizeof(W) >= sizeof(Acc) || sizeof(W) == 4) {
          for (int64_t i = 0; i < num_tokens * top_k; ++i) given[i] = static_cast<Acc>(data<W>(w)[i]);
        } else {
          std::vector<float> row(given.size());
          microkernels<W>().load_row(data<W>(w), row.data(), num_tokens * top_k);
          for (size_t i = 0; i < given.size(); ++i) given[i] = row[i];
        }
      });
    }
    const auto add = [&](int64_t pair, int64_t id) {
      if (id >= 0 && id < count) uses[id].push_back({pair / top_k, pair, given[pair] * values[id]});
    };
    if (!ids) {
      for (int64_t pair = 0; pair < num_tokens * top_k; ++pair) add(pair, pair % top_k);
      return;
    }
    const Tensor all = torch::stable::contiguous(*ids);
    dispatch_id(op, all.scalar_type(), [&]<class I>() {
      for (int64_t pair = 0; pair < num_tokens * top_k; ++pair) add(pair, static_cast<int64_t>(data<I>(all)[pair]));
    });
  }

  // The uses of tokens [begin, end): those of one delta are in the order of tokens.
  std::span<const Use<Acc>> of_tokens(int64_t delta, int64_t begin, int64_t end) const {
    const auto& all = uses[delta];
    const auto before = [](const Use<Acc>& use, int64_t token) { return use.token < token; };
    const auto first = std::lower_bound(all.begin(), all.end(), begin, before);
    return {first, std::lower_bound(first, all.end(), end, before)};
  }
};

// The products with rows [row, row + n) of one delta for some of its uses, one row of `products` each.
template <class T>
void ternary_products(const uint64_t* planes, std::span<const Use<acc_t<T>>> uses, const T* x, int64_t x_stride, int64_t row,
                      int64_t n, int64_t in, Scratch& scratch, acc_t<T>** products, const NextWeights<T>& next = {}) {
  const T** inputs = scratch.take<const T*>(uses.size());
  acc_t<T>* all = scratch.take<acc_t<T>>(uses.size() * n);
  for (size_t i = 0; i < uses.size(); ++i) {
    inputs[i] = x + uses[i].token * x_stride;
    products[i] = all + i * n;
  }
  ternary_linear_kernels<T>().products(inputs, uses.size(), {planes, row * in, in}, n, in, products, next);
}


void check_linear(const char* op, const Tensor& rows, const Tensor& weight, int dim) {
  MOE_CHECK(rows.dim() == 2 && weight.dim() == 2 && rows.size(1) == weight.size(dim) &&
                rows.scalar_type() == weight.scalar_type(),
            op, ": x must be 2-dimensional, of the weight's width and dtype");
  MOE_CHECK(rows.size(0) < (int64_t{1} << 31), op, ": there must be fewer than 2^31 tokens");
}

Tensor ternary_linear_cpu(const Tensor& x_in, const Tensor& weight, std::vector<Tensor> deltas, std::vector<double> values,
                          const std::optional<Tensor>& ids, const std::optional<Tensor>& delta_weights,
                          const std::optional<Tensor>& bias_in) {
  const Tensor x = with_contiguous_rows(x_in);
  check_linear("ternary_linear", x, weight, 1);
  const int64_t num_tokens = x.size(0), in = weight.size(1), out_features = weight.size(0);
  std::optional<Tensor> bias;
  if (bias_in) bias = torch::stable::contiguous(*bias_in);
  MOE_CHECK(!bias || (bias->numel() == out_features && bias->scalar_type() == x.scalar_type()),
            "ternary_linear: bias must be of shape [out_features] and the dtype of x");
  Tensor out = new_result(x, {num_tokens, out_features});
  dispatch_float("ternary_linear", x.scalar_type(), [&]<class T>() {
    using Acc = acc_t<T>;
    const TernaryUses<T> uses("ternary_linear", deltas, values, ids, delta_weights, num_tokens, in * out_features);
    const Tensor one = torch::stable::unsqueeze(weight, 0);
    const auto matrices = ExpertMatrices<T>::view("ternary_linear", one);
    Scratch scratch;
    const T** a = scratch.take<const T*>(num_tokens);
    for (int64_t t = 0; t < num_tokens; ++t) a[t] = data<T>(x) + t * x.stride(0);
    const int32_t offsets[2] = {0, static_cast<int32_t>(num_tokens)};
    const int64_t block = matrices.block(out_features, expert_tasks(offsets, 1, 1, 1, nullptr));
    T* result = mutable_data<T>(out);
    over_expert_tasks(
        offsets, 1, out_features, block, matrices.row_block(), [&](const ExpertTask& part, const ExpertTask* next) {
          const int64_t n = std::min(block, out_features - part.column), ldc = matrices.ldc(n);
          const int64_t height = part.row_end - part.row_begin;
          Scratch task_scratch;
          Acc* c = task_scratch.take<Acc>(height * ldc);
          const typename ExpertMatrices<T>::Columns columns[] = {{part.column, n, c}};
          DotBlocks<T> next_blocks;
          if (next != nullptr) {
            const typename ExpertMatrices<T>::Columns after[] = {
                {next->column, std::min(block, out_features - next->column), nullptr}};
            next_blocks = matrices.blocks(0, after);
          }
          matrices.multiply(0, a + part.row_begin, height, columns, ldc, next_blocks);
          NextWeights<T> after;
          if (next != nullptr && weight.stride(1) == 1 && next->column + n <= out_features && next->column != part.column)
            after = {data<T>(weight) + next->column * weight.stride(0), weight.stride(0)};
          for (size_t e = 0; e < uses.planes.size(); ++e) {
            const auto here = uses.of_tokens(e, part.row_begin, part.row_end);
            if (here.empty()) continue;
            Scratch delta_scratch;
            Acc** products = delta_scratch.take<Acc*>(here.size());
            ternary_products<T>(uses.planes[e], here, data<T>(x), x.stride(0), part.column, n, in, delta_scratch, products,
                                after);
            after = {};
            for (size_t i = 0; i < here.size(); ++i)
              microkernels<T>().accumulate(c + (here[i].token - part.row_begin) * ldc, products[i], nullptr, here[i].weight,
                                           n);
          }
          for (int64_t r = 0; r < height; ++r)
            microkernels<T>().store_row(c + r * ldc, bias ? data<T>(*bias) + part.column : nullptr,
                                        result + (part.row_begin + r) * out_features + part.column, n);
        });
  });
  return out;
}

// grad_x[t] = grad_out[t] W + sum over deltas, in order, of a[t, e] * (grad_out[t] T_e)
Tensor ternary_linear_input_grad_cpu(const Tensor& grad_in, const Tensor& weight, std::vector<Tensor> deltas,
                                     std::vector<double> values, const std::optional<Tensor>& ids,
                                     const std::optional<Tensor>& delta_weights) {
  const Tensor grad = with_contiguous_rows(grad_in);
  check_linear("ternary_linear", grad, weight, 0);
  const int64_t num_tokens = grad.size(0), in = weight.size(1), out_features = weight.size(0);
  Tensor result = new_result(grad, {num_tokens, in});
  dispatch_float("ternary_linear", grad.scalar_type(), [&]<class T>() {
    using Acc = acc_t<T>;
    const TernaryUses<T> uses("ternary_linear", deltas, values, ids, delta_weights, num_tokens, in * out_features);
    const Tensor one = torch::stable::unsqueeze(weight, 0);
    const auto matrices = ExpertMatrices<T>::view("ternary_linear", one, true);
    Scratch scratch;
    const T** a = scratch.take<const T*>(num_tokens);
    for (int64_t t = 0; t < num_tokens; ++t) a[t] = data<T>(grad) + t * grad.stride(0);
    const int32_t offsets[2] = {0, static_cast<int32_t>(num_tokens)};
    const int64_t block = std::min<int64_t>(512, matrices.block(in, expert_tasks(offsets, 1, 1, 1, nullptr)));
    T* out = mutable_data<T>(result);
    over_expert_tasks(offsets, 1, in, block, matrices.row_block(), [&](const ExpertTask& part, const ExpertTask*) {
      const int64_t n = std::min(block, in - part.column), ldc = matrices.ldc(n), height = part.row_end - part.row_begin;
      Scratch task_scratch;
      Acc* c = task_scratch.take<Acc>(height * ldc);
      const typename ExpertMatrices<T>::Columns columns[] = {{part.column, n, c}};
      matrices.multiply(0, a + part.row_begin, height, columns, ldc);
      T* decoded = task_scratch.take<T>(kGradRows * (n + kVectorPadding));
      const T* rows[kGradRows];
      for (int64_t r = 0; r < kGradRows; ++r) rows[r] = decoded + r * (n + kVectorPadding);
      Acc* sums = task_scratch.take<Acc>(2 * (n + kVectorPadding));
      Acc* factors = task_scratch.take<Acc>(2 * kGradRows);
      for (size_t e = 0; e < uses.planes.size(); ++e) {
        const auto here = uses.of_tokens(e, part.row_begin, part.row_end);
        // chunks of rows one after the other: a token's sum has one order
        for (int64_t row = 0; row < out_features && !here.empty(); row += kGradRows) {
          const int64_t num_rows = std::min(kGradRows, out_features - row);
          ternary_linear_kernels<T>().decode({uses.planes[e], row * in + part.column, in}, num_rows, n, decoded,
                                             n + kVectorPadding);
          for (size_t i = 0; i < here.size(); i += 2) {
            const int64_t m = std::min<int64_t>(2, static_cast<int64_t>(here.size() - i));
            const Acc* row_factors[2] = {factors, factors + kGradRows};
            for (int64_t r = 0; r < m; ++r)
              microkernels<T>().load_row(a[here[i + r].token] + row, factors + r * kGradRows, num_rows);
            microkernels<T>().rank_sums(rows, num_rows, row_factors, m, nullptr, nullptr, sums, n + kVectorPadding, n);
            for (int64_t r = 0; r < m; ++r)
              microkernels<T>().accumulate(c + (here[i + r].token - part.row_begin) * ldc, sums + r * (n + kVectorPadding),
                                           nullptr, here[i + r].weight, n);
          }
        }
      }
      for (int64_t r = 0; r < height; ++r)
        microkernels<T>().store_row(c + r * ldc, nullptr, out + (part.row_begin + r) * in + part.column, n);
    });
  });
  return result;
}

// grad[t, k] = value_e * <grad_out[t], T_e x[t]> for e = delta_ids[t, k], in the accumulator's dtype
Tensor ternary_linear_weights_grad_cpu(const Tensor& grad_in, const Tensor& x_in, std::vector<Tensor> deltas,
                                       std::vector<double> values, const std::optional<Tensor>& ids) {
  const Tensor grad = with_contiguous_rows(grad_in), x = with_contiguous_rows(x_in);
  MOE_CHECK(grad.dim() == 2 && x.dim() == 2 && grad.size(0) == x.size(0) && grad.scalar_type() == x.scalar_type(),
            "ternary_linear: the gradient must have the shape and dtype of the output");
  const int64_t num_tokens = x.size(0), in = x.size(1), out_features = grad.size(1);
  const int64_t top_k = ids ? ids->size(1) : static_cast<int64_t>(deltas.size());
  Tensor result;
  dispatch_float("ternary_linear", x.scalar_type(), [&]<class T>() {
    using Acc = acc_t<T>;
    const TernaryUses<T> uses("ternary_linear", deltas, values, ids, std::nullopt, num_tokens, in * out_features);
    result = torch::stable::new_empty(x, {num_tokens, top_k}, sizeof(Acc) == 4 ? ScalarType::Float : ScalarType::Double);
    Acc* out = mutable_data<Acc>(result);
    fill_zero(out, num_tokens * top_k);
    const int64_t num_blocks = (out_features + kGradRows - 1) / kGradRows;
    // in double: a weight's gradient is a small difference of large sums
    std::vector<double> partial(static_cast<size_t>(num_blocks * num_tokens * top_k));
    constexpr int64_t kTokens = 64;
    const int64_t token_blocks = (num_tokens + kTokens - 1) / kTokens;
    parallel_tasks(num_blocks * token_blocks, [&](int64_t task) {
      const int64_t block = task % num_blocks, row = block * kGradRows, n = std::min(kGradRows, out_features - row);
      const int64_t first = task / num_blocks * kTokens;
      for (size_t e = 0; e < uses.planes.size(); ++e) {
        const auto here = uses.of_tokens(e, first, std::min(num_tokens, first + kTokens));
        if (here.empty()) continue;
        Scratch scratch;
        Acc** products = scratch.take<Acc*>(here.size());
        ternary_products<T>(uses.planes[e], here, data<T>(x), x.stride(0), row, n, in, scratch, products);
        Acc g[kGradRows];
        for (size_t i = 0; i < here.size(); ++i) {
          microkernels<T>().load_row(data<T>(grad) + here[i].token * grad.stride(0) + row, g, n);
          double sum = 0;
          for (int64_t j = 0; j < n; ++j) sum += static_cast<double>(g[j]) * static_cast<double>(products[i][j]);
          partial[block * num_tokens * top_k + here[i].pair] = sum;
        }
      }
    });
    for (size_t e = 0; e < uses.planes.size(); ++e)
      for (const Use<Acc>& use : uses.uses[e]) {
        double sum = 0;
        for (int64_t block = 0; block < num_blocks; ++block) sum += partial[block * num_tokens * top_k + use.pair];
        out[use.pair] = static_cast<Acc>(sum * static_cast<double>(use.weight));  // the delta's value: no weights were given
      }
  });
  return result;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("ternary_linear", TORCH_BOX(&moe::ternary_linear_cpu));
  m.impl("ternary_linear_input_grad", TORCH_BOX(&moe::ternary_linear_input_grad_cpu));
  m.impl("ternary_linear_weights_grad", TORCH_BOX(&moe::ternary_linear_weights_grad_cpu));
}
