// The expert FFN on the CPU, forward and backward.
//
// Forward, two parallel regions:
//   1 over (expert, rows, columns of gate/up): rows of x times a block of W1, activation, -> act [pairs, intermediate]
//   2 over columns of the output: for all experts, act times a block of W2, added into float sums by token
// Tokens are read in place through pointers and outputs are added in place: nothing of size [pairs, hidden_size] exists.
// Region 2 gives each task whole columns, so a token's sum runs in rising expert id, alone on one thread: no atomics, no
// dependence on the number of threads or on other tokens.
//
// Backward keeps the same two shapes of region (1 for dH, 2 for dX) and adds one over blocks of the weight gradients.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "microkernels/convert.h"
#include "ops/grouped_gemm/grouped_gemm.h"
#include "ops/permute/permute.h"

namespace moe {
namespace {

constexpr const char* kOp = "expert_ffn";

// The pairs in expert order.
struct Pairs {
  int64_t top_k, num_pairs, num_experts;
  const int32_t* expert_offsets;  // [num_experts + 1]
  const int32_t* source_pairs;    // permuted row -> pair

  Pairs(Scratch& scratch, const Tensor& topk_ids, int64_t num_tokens, int64_t experts) : num_experts(experts) {
    MOE_CHECK(topk_ids.dim() == 2 && topk_ids.size(0) == num_tokens, kOp,
              ": topk_ids must be of shape [num_tokens=", num_tokens, ", top_k]");
    top_k = topk_ids.size(1);
    num_pairs = num_tokens * top_k;
    MOE_CHECK(num_pairs < (int64_t{1} << 31), kOp, ": num_tokens * top_k must be below 2**31, got ", num_pairs);
    int32_t* offsets = scratch.take<int32_t>(num_experts + 1);
    int32_t* source = scratch.take<int32_t>(num_pairs);
    dispatch_id(kOp, topk_ids.scalar_type(), [&]<class Id>() {
      sort_pairs<Id>(data<Id>(topk_ids), topk_ids.stride(0), topk_ids.stride(1), num_tokens, top_k, num_experts, offsets,
                     source, nullptr);
    });
    expert_offsets = offsets;
    source_pairs = source;
  }

  int64_t num_permuted() const { return expert_offsets[num_experts]; }
  // the first expert behind `expert` that has rows; num_experts where there is none
  int64_t next_expert(int64_t expert) const {
    do ++expert;
    while (expert < num_experts && expert_offsets[expert] == expert_offsets[expert + 1]);
    return expert;
  }
  int64_t token(int64_t row) const { return source_pairs[row] / top_k; }

  // For each permuted row, its token's row of `tokens` [num_tokens, n] with contiguous rows.
  template <class T>
  const T** token_rows(Scratch& scratch, const Tensor& tokens) const {
    const T** rows = scratch.take<const T*>(num_permuted());
    const T* first = data<T>(tokens);
    for (int64_t row = 0; row < num_permuted(); ++row) rows[row] = first + token(row) * tokens.stride(0);
    return rows;
  }
};

template <class T>
const T** contiguous_rows(Scratch& scratch, const T* first, int64_t num_rows, int64_t size) {
  const T** rows = scratch.take<const T*>(num_rows);
  for (int64_t row = 0; row < num_rows; ++row) rows[row] = first + row * size;
  return rows;
}

// Where gate and up stand in a row of 2 * intermediate_size values.
struct GateUp {
  int64_t intermediate_size;
  bool gated, interleaved;

  int64_t stride() const { return interleaved ? 2 : 1; }
  int64_t size() const { return gated ? 2 * intermediate_size : intermediate_size; }
  template <class P>
  P* gate(P* row, int64_t i) const {
    return row == nullptr ? nullptr : row + i * stride();
  }
  template <class P>
  P* up(P* row, int64_t i) const {
    return row == nullptr ? nullptr : row + (interleaved ? 2 * i + 1 : intermediate_size + i);
  }
};

// out[token] = sum over the token's pairs, in rising expert id, of weight * (W[expert] @ a[row] + bias[expert])
template <class T>
void add_to_tokens(const Pairs& pairs, const ExpertMatrices<T>& matrices, const T* const* a, const acc_t<T>* weights,
                   const T* bias, int64_t num_tokens, T* out) {
  using Acc = acc_t<T>;
  const int64_t columns = matrices.out;
  int64_t block = matrices.block(columns, 1);
  // The sums of all tokens stay in cache; wider blocks read act less often (128 experts, 2048 tokens, bf16: 512 KiB of sums
  // 174 GFLOP/s, 1 MiB 185). Outer layouts gain more from wide blocks than they lose by sums in L3.
  const int64_t most_sums = int64_t{matrices.dot_layout ? 1 : 4} << 20;
  while (block > 64 && num_tokens * block * static_cast<int64_t>(sizeof(Acc)) > most_sums)
    block = matrices.half_block(block);
  parallel_ranges(columns, block, [&](int64_t column, int64_t end) {
    const int64_t n = end - column, ldc = matrices.ldc(n), row_block = matrices.row_block();
    Scratch scratch;
    Acc* sums = scratch.take<Acc>(num_tokens * n);
    Acc* c = scratch.take<Acc>(row_block * ldc);
    fill_zero(sums, num_tokens * n);
    const typename ExpertMatrices<T>::Columns range[] = {{column, n, c}};
    for (int64_t e = pairs.next_expert(-1); e < pairs.num_experts;) {
      const int64_t next = pairs.next_expert(e), begin = pairs.expert_offsets[e], end = pairs.expert_offsets[e + 1];
      const DotBlocks<T> next_blocks = next < pairs.num_experts ? matrices.blocks(next, range) : DotBlocks<T>{};
      const T* expert_bias = bias == nullptr ? nullptr : bias + e * columns + column;
      const int64_t num_parts = (end - begin + row_block - 1) / row_block;
      for (int64_t p = 0; p < num_parts; ++p) {
        const int64_t row = begin + p * (end - begin) / num_parts, height = begin + (p + 1) * (end - begin) / num_parts - row;
        matrices.multiply(e, a + row, height, range, ldc, p + 1 == num_parts ? next_blocks : DotBlocks<T>{});
        for (int64_t r = 0; r < height; ++r)
          microkernels<T>().accumulate(sums + pairs.token(row + r) * n, c + r * ldc, expert_bias,
                                       weights == nullptr ? Acc{1} : weights[pairs.source_pairs[row + r]], n);
      }
      e = next;
    }
    for (int64_t t = 0; t < num_tokens; ++t)
      microkernels<T>().store_row(sums + t * n, nullptr, out + t * columns + column, n);
  });
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return torch::stable::contiguous(*tensor);
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

std::tuple<Tensor, Tensor> expert_ffn_cpu(const Tensor& hidden_states_in, const Tensor& topk_ids,
                                          const Tensor& topk_weights, const Tensor& gate_up_proj, const Tensor& down_proj,
                                          const std::optional<Tensor>& gate_up_bias_in,
                                          const std::optional<Tensor>& down_bias_in, int64_t kind, bool gated,
                                          double alpha, double limit, bool clamp_output, double up_offset,
                                          bool interleaved, int64_t gate_up_size, bool save_pre_activation) {
  MOE_CHECK(hidden_states_in.dim() == 2, kOp, ": hidden_states must be of shape [num_tokens, hidden_size]");
  const Tensor hidden_states = with_contiguous_rows(hidden_states_in);
  const auto gate_up_bias = contiguous(gate_up_bias_in), down_bias = contiguous(down_bias_in);
  const int64_t num_tokens = hidden_states.size(0), hidden_size = hidden_states.size(1);
  const int64_t num_experts = gate_up_proj.size(0);
  const bool quantized = is_quantized(gate_up_proj), packed = quantized || gate_up_proj.dim() == 6;  // gate and up apart
  const ScalarType dtype = hidden_states.scalar_type();
  MOE_CHECK((quantized || (gate_up_proj.scalar_type() == dtype && down_proj.scalar_type() == dtype)) &&
                (!gate_up_bias || gate_up_bias->scalar_type() == dtype) &&
                (!down_bias || down_bias->scalar_type() == dtype),
            kOp, ": weights and biases must have the dtype of hidden_states");
  MOE_CHECK(down_proj.size(0) == num_experts && is_quantized(down_proj) == quantized &&
                (down_proj.dim() == 6) == (gate_up_proj.dim() == 6),
            kOp, ": gate_up_proj and down_proj must both be plain, prepacked or quantised, for as many experts");
  const GateUp layout{gated ? gate_up_size / 2 : gate_up_size, gated, interleaved};
  MOE_CHECK(layout.size() == gate_up_size && (quantized || !(packed && save_pre_activation)) &&
                (gated || !interleaved) && kind >= 0 && kind <= 4,
            kOp, ": gate_up_proj must hold gate and up rows, and be plain where a gradient is needed");
  MOE_CHECK((!gate_up_bias || gate_up_bias->numel() == num_experts * gate_up_size) &&
                (!down_bias || down_bias->numel() == num_experts * hidden_size),
            kOp, ": biases must be of shape [num_experts, out]");
  const Activation activation{static_cast<ActivationKind>(kind), gated, alpha, limit, clamp_output, up_offset};

  Scratch scratch;
  const Pairs pairs(scratch, topk_ids, num_tokens, num_experts);
  MOE_CHECK(topk_weights.numel() == pairs.num_pairs, kOp, ": topk_weights must have the shape of topk_ids");
  Tensor out = new_result(hidden_states, {num_tokens, hidden_size});
  Tensor saved =
      save_pre_activation ? new_result(hidden_states, {pairs.num_pairs, gate_up_size}) : new_result(hidden_states, {0});
  dispatch_float(kOp, dtype, [&]<class T>() {
    using Acc = acc_t<T>;
    const auto gate_up = ExpertMatrices<T>::of_any_layout(kOp, gate_up_proj, gate_up_size, hidden_size);
    MOE_CHECK(!packed || gate_up.num_splits == (gated ? 2 : 1), kOp,
              ": gate_up_proj must hold gate and up rows apart, if it is gated");
    const auto down = ExpertMatrices<T>::of_any_layout(kOp, down_proj, hidden_size, layout.intermediate_size);
    MOE_CHECK(gate_up.in == hidden_size && gate_up.out == gate_up_size && down.out == hidden_size &&
                  down.in == layout.intermediate_size && (!quantized || down.num_splits == 1),
              kOp,
              ": down_proj must be of shape [num_experts, hidden_size, intermediate_size] that fits gate_up_proj");
    const T* const* x = pairs.token_rows<T>(scratch, hidden_states);
    T* act = scratch.take<T>(pairs.num_permuted() * layout.intermediate_size);
    T* saved_rows = save_pre_activation ? mutable_data<T>(saved) : nullptr;
    const T* bias = data_or_null<T>(gate_up_bias);

    const int64_t row_tasks = expert_tasks(pairs.expert_offsets, num_experts, 1, 1, nullptr);
    // gate and up of a block are computed together, so a block has half the columns for the same weights
    const int64_t both = gate_up.block(gate_up_size, row_tasks), block = gated ? gate_up.half_block(both) : both;
    // interleaved columns are neighbours in one product; elsewhere gate and up are two products side by side in c
    const bool paired = interleaved && !packed;
    using Columns = typename ExpertMatrices<T>::Columns;
    struct GateAndUp {
      Columns ranges[2];
      int64_t num_ranges, ldc;
      operator std::span<const Columns>() const { return {ranges, static_cast<size_t>(num_ranges)}; }
    };
    const auto gate_and_up = [&](const ExpertTask& task, Acc* c) -> GateAndUp {
      const int64_t column = task.column, n = std::min(block, layout.intermediate_size - column);
      const int64_t part = gate_up.ldc(paired ? 2 * n : n);
      if (paired) return {{{2 * column, 2 * n, c}}, 1, part};
      if (!gated) return {{{column, n, c}}, 1, part};
      return {{{column, n, c}, {layout.intermediate_size + column, n, c == nullptr ? c : c + part}}, 2, 2 * part};
    };
    over_expert_tasks(
        pairs.expert_offsets, num_experts, layout.intermediate_size, block, gate_up.row_block(),
        [&](const ExpertTask& task, const ExpertTask* next) {
          const int64_t height = task.row_end - task.row_begin, column = task.column;
          const int64_t n = std::min(block, layout.intermediate_size - column);
          Scratch task_scratch;
          const int64_t ldc = gate_and_up(task, nullptr).ldc, up = paired ? 1 : gate_up.ldc(n);
          Acc* c = task_scratch.take<Acc>(height * ldc);
          gate_up.multiply(task.expert, x + task.row_begin, height, gate_and_up(task, c), ldc,
                           next == nullptr ? DotBlocks<T>{} : gate_up.blocks(next->expert, gate_and_up(*next, nullptr)));
          const T* expert_bias = bias == nullptr ? nullptr : bias + task.expert * gate_up_size;
          for (int64_t r = task.row_begin; r < task.row_end; ++r, c += ldc) {
            T* saved_row = saved_rows == nullptr ? nullptr : saved_rows + r * gate_up_size;
            microkernels<T>().activation_forward(activation, c, c + up, paired ? 2 : 1, layout.gate(expert_bias, column),
                                                 layout.up(expert_bias, column), layout.stride(), n,
                                                 act + r * layout.intermediate_size + column,
                                                 layout.gate(saved_row, column), layout.up(saved_row, column));
          }
        });
    if (saved_rows != nullptr)
      fill_zero(saved_rows + pairs.num_permuted() * gate_up_size, (pairs.num_pairs - pairs.num_permuted()) * gate_up_size);

    Acc* weights = scratch.take<Acc>(pairs.num_pairs);
    read_floats(topk_weights, weights);
    add_to_tokens<T>(pairs, down,
                     contiguous_rows<T>(scratch, act, pairs.num_permuted(), layout.intermediate_size), weights,
                     data_or_null<T>(down_bias), num_tokens, mutable_data<T>(out));
  });
  return {out, saved};
}

// python/moe_kernels/ops/expert_ffn/autograd.py has the equations.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_ffn_backward_cpu(
    const Tensor& grad_out_in, const std::optional<Tensor>& hidden_states_in, const Tensor& topk_ids,
    const Tensor& topk_weights, const Tensor& gate_up_proj, const Tensor& down_proj,
    const std::optional<Tensor>& down_bias_in, const Tensor& pre_activation_in, int64_t kind, bool gated, double alpha,
    double limit, bool clamp_output, double up_offset, bool interleaved, bool grad_hidden_states, bool grad_topk_weights,
    bool grad_gate_up_proj, bool grad_down_proj, bool grad_gate_up_bias, bool grad_down_bias) {
  const Tensor grad_out = with_contiguous_rows(grad_out_in);
  const Tensor pre_activation = torch::stable::contiguous(pre_activation_in);
  const auto down_bias = contiguous(down_bias_in);
  const int64_t num_tokens = grad_out.size(0), hidden_size = grad_out.size(1);
  const int64_t num_experts = gate_up_proj.size(0), gate_up_size = gate_up_proj.size(1);
  const GateUp layout{gated ? gate_up_size / 2 : gate_up_size, gated, interleaved};
  const Activation activation{static_cast<ActivationKind>(kind), gated, alpha, limit, clamp_output, up_offset};
  Scratch scratch;
  const Pairs pairs(scratch, topk_ids, num_tokens, num_experts);
  MOE_CHECK(grad_out.scalar_type() == gate_up_proj.scalar_type() &&
                pre_activation.numel() == pairs.num_pairs * gate_up_size && topk_weights.numel() == pairs.num_pairs &&
                pre_activation.scalar_type() == grad_out.scalar_type() &&
                down_proj.scalar_type() == grad_out.scalar_type(),
            kOp, ": the gradient must have the shape and dtype of the output");
  MOE_CHECK(layout.size() == gate_up_size && (gated || !interleaved) && kind >= 0 && kind <= 4, kOp,
            ": gate_up_proj must hold gate and up rows");
  MOE_CHECK(!down_bias || (down_bias->numel() == num_experts * hidden_size &&
                           down_bias->scalar_type() == grad_out.scalar_type()),
            kOp, ": down_bias must be of shape [num_experts, hidden_size]");
  MOE_CHECK(!grad_gate_up_proj || (hidden_states_in && hidden_states_in->size(0) == num_tokens &&
                                   hidden_states_in->size(1) == hidden_size &&
                                   hidden_states_in->scalar_type() == grad_out.scalar_type()),
            kOp,
            ": hidden_states must have been saved for the gradient of gate_up_proj");

  const auto make = [&](bool asked, const Tensor& like, std::initializer_list<int64_t> shape) {
    return asked ? new_result(like, shape) : new_result(grad_out, {0});
  };
  const auto make_weight_grad = [&](bool asked, const Tensor& weights) {
    return asked ? new_weight_grad(grad_out, num_experts, weights.size(1), weights.size(2), is_transposed(weights))
                 : new_result(grad_out, {0});
  };
  Tensor grad_hidden = make(grad_hidden_states, grad_out, {num_tokens, hidden_size});
  Tensor grad_weights = make(grad_topk_weights, topk_weights, {num_tokens, pairs.top_k});
  Tensor grad_gate_up = make_weight_grad(grad_gate_up_proj, gate_up_proj);
  Tensor grad_down = make_weight_grad(grad_down_proj, down_proj);
  Tensor grad_gate_up_b = make(grad_gate_up_bias, grad_out, {num_experts, gate_up_size});
  Tensor grad_down_b = make(grad_down_bias, grad_out, {num_experts, hidden_size});

  dispatch_float(kOp, grad_out.scalar_type(), [&]<class T>() {
    using Acc = acc_t<T>;
    // the sums run over the outputs of each matrix: the same memory, out and in exchanged
    const auto gate_up = ExpertMatrices<T>::view(kOp, gate_up_proj, true);
    const auto down = ExpertMatrices<T>::view(kOp, down_proj, true);
    MOE_CHECK(down.out == layout.intermediate_size && down.in == hidden_size && gate_up.out == hidden_size, kOp,
              ": down_proj must be of shape [num_experts, hidden_size, intermediate_size] that fits gate_up_proj");
    const int64_t num_permuted = pairs.num_permuted();
    const T* const* grad_rows = pairs.token_rows<T>(scratch, grad_out);
    Acc* weights = scratch.take<Acc>(pairs.num_pairs);
    read_floats(topk_weights, weights);
    const T* saved_rows = data<T>(pre_activation);
    T* grad_pre = scratch.take<T>(num_permuted * gate_up_size);                                       // dH
    T* weighted_act = grad_down_proj ? scratch.take<T>(num_permuted * layout.intermediate_size) : nullptr;  // s * A
    const int64_t row_tasks = expert_tasks(pairs.expert_offsets, num_experts, 1, 1, nullptr);
    const int64_t block = down.block(layout.intermediate_size, row_tasks);
    // <dA', A> is summed by fixed spans of the intermediate size, so that its bits do not depend on the block
    const int64_t span = down.dot_layout ? down.kBlockUnit : down.ldc(1);
    const int64_t num_spans = (layout.intermediate_size + span - 1) / span;
    Acc* inner = scratch.take<Acc>(num_permuted * num_spans);
    over_expert_tasks(
        pairs.expert_offsets, num_experts, layout.intermediate_size, block, down.row_block(),
        [&](const ExpertTask& task, const ExpertTask*) {
          const int64_t height = task.row_end - task.row_begin, column = task.column;
          const int64_t n = std::min(block, layout.intermediate_size - column), ldc = down.ldc(n);
          Scratch task_scratch;
          Acc* grad_act = task_scratch.take<Acc>(height * ldc);
          const typename ExpertMatrices<T>::Columns range[] = {{column, n, grad_act}};
          down.multiply(task.expert, grad_rows + task.row_begin, height, range, ldc);
          for (int64_t r = task.row_begin; r < task.row_end; ++r, grad_act += ldc) {
            const T* saved_row = saved_rows + r * gate_up_size;
            T* grad_row = grad_pre + r * gate_up_size;
            for (int64_t i = 0; i < n; i += span) {
              const int64_t at = column + i;
              inner[r * num_spans + at / span] = microkernels<T>().activation_backward(
                  activation, layout.gate(saved_row, at), layout.up(saved_row, at), layout.stride(), grad_act + i,
                  weights[pairs.source_pairs[r]], std::min(span, n - i), layout.gate(grad_row, at),
                  layout.up(grad_row, at),
                  weighted_act == nullptr ? nullptr : weighted_act + r * layout.intermediate_size + at);
            }
          }
        });

    if (grad_topk_weights) {
      Acc* result = scratch.take<Acc>(pairs.num_pairs);
      fill_zero(result, pairs.num_pairs);
      const T* bias = data_or_null<T>(down_bias);
      parallel_tasks(num_experts, [&](int64_t expert) {
        for (int64_t row = pairs.expert_offsets[expert]; row < pairs.expert_offsets[expert + 1]; ++row) {
          Acc sum = 0;
          for (int64_t s = 0; s < num_spans; ++s) sum += inner[row * num_spans + s];
          if (bias != nullptr)
            sum += microkernels<T>().inner_product(grad_rows[row], bias + expert * hidden_size, hidden_size);
          result[pairs.source_pairs[row]] = sum;
        }
      });
      write_floats(result, grad_weights);
    }
    const T* const* grad_pre_rows = contiguous_rows<T>(scratch, grad_pre, num_permuted, gate_up_size);
    if (grad_hidden_states)
      add_to_tokens<T>(pairs, gate_up, grad_pre_rows, nullptr, nullptr, num_tokens, mutable_data<T>(grad_hidden));
    if (grad_gate_up_proj) {
      const Tensor hidden_states = with_contiguous_rows(*hidden_states_in);
      weight_grad<T>(pairs.expert_offsets, num_experts, gate_up_size, hidden_size, is_transposed(gate_up_proj),
                     grad_pre_rows, pairs.token_rows<T>(scratch, hidden_states), mutable_data<T>(grad_gate_up));
    }
    if (grad_down_proj)
      weight_grad<T>(pairs.expert_offsets, num_experts, hidden_size, layout.intermediate_size, is_transposed(down_proj),
                     grad_rows, contiguous_rows<T>(scratch, weighted_act, num_permuted, layout.intermediate_size),
                     mutable_data<T>(grad_down));
    if (grad_gate_up_bias)
      bias_grad<T>(pairs.expert_offsets, num_experts, gate_up_size, grad_pre_rows, nullptr,
                   mutable_data<T>(grad_gate_up_b));
    if (grad_down_bias) {
      Acc* row_weights = scratch.take<Acc>(num_permuted);
      for (int64_t row = 0; row < num_permuted; ++row) row_weights[row] = weights[pairs.source_pairs[row]];
      bias_grad<T>(pairs.expert_offsets, num_experts, hidden_size, grad_rows, row_weights, mutable_data<T>(grad_down_b));
    }
  });
  return {grad_hidden, grad_weights, grad_gate_up, grad_down, grad_gate_up_b, grad_down_b};
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("expert_ffn", TORCH_BOX(&moe::expert_ffn_cpu));
  m.impl("expert_ffn_backward", TORCH_BOX(&moe::expert_ffn_backward_cpu));
}
