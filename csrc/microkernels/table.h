// The functions that are compiled once for each instruction set, and the table through which ops call them.
//
// Each call does at least a row's or a tile's work, so going through a pointer costs nothing. T is the element type of
// tensors, acc_t<T> (float, or double for double) that of sums.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"
#include "microkernels/quantized.h"

namespace moe {

// One expert's matrix [out, in] whose rows are contiguous, or packed: panels of `panel_rows` rows interleaved by steps.
template <class T>
struct DotWeights {
  const T* data;
  int64_t row_stride;    // between rows (of one panel)
  int64_t step_stride;   // between steps of one row
  int64_t panel_rows;    // rows that follow each other at row_stride; all of them in a plain matrix
  int64_t panel_stride;  // between panels

  // always_inline: table.h is read by code of every instruction set
  // n may lie past the end: the address is then one to prefetch
  __attribute__((always_inline)) const T* row(int64_t n) const {
    const int64_t offset = n / panel_rows * panel_stride + n % panel_rows * row_stride;
    return reinterpret_cast<const T*>(reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(offset) * sizeof(T));
  }
  __attribute__((always_inline)) int64_t rows_together(int64_t n) const { return panel_rows - n % panel_rows; }
};

constexpr int kMaxDotBlocks = 4;

// dot.h: bytes of a row that are multiplied before all rows and columns of a block have caught up. Six rows of them and the
// weights that pass by stay in L1, a block of them in L2. (Zen 5, two threads, shape 2048 x 5632 x 8 experts, 2048 tokens,
// time of torch.mm over ours: rows in one piece bf16 0.93, fp32 1.53; in chunks 0.94 to 0.95, 2.00.)
constexpr int64_t kDotChunkBytes = 4096;

// n columns of the result: c[m, j] = sum_k a[m][k] * weights.row(column + j)[k]
template <class T>
struct DotBlock {
  DotWeights<T> weights;
  int64_t column, n;
  acc_t<T>* c;
};

// What one call multiplies; they share k.
template <class T>
struct DotBlocks {
  DotBlock<T> blocks[kMaxDotBlocks];
  int64_t num_blocks = 0;

  __attribute__((always_inline)) int64_t columns() const {
    int64_t sum = 0;
    for (int64_t i = 0; i < num_blocks; ++i) sum += blocks[i].n;
    return sum;
  }
};

template <class T>
struct Microkernels {
  using Acc = acc_t<T>;

  // All blocks for m rows; the blocks share ldc. Together, so that each tile of rows is brought to L1 once.
  // next: what the caller will multiply after them, to be fetched into L2 meanwhile; none: these again. A hint.
  void (*dot)(const T* const* a, int64_t m, const DotBlocks<T>& blocks, int64_t k, int64_t ldc, const DotBlocks<T>& next,
              void* scratch);

  // All blocks of quantised weights for m <= 96 rows; the blocks share ldc, `in` and the format. Null for double.
  void (*dot_quantized)(const T* const* a, int64_t m, const QuantizedBlock* blocks, int64_t num_blocks, int64_t ldc,
                        void* scratch);

  // c[m, j] = sum_k a[m][k] * b[k * b_step_stride + j] for m <= max_block rows, j in [0, n), n <= max_block.
  // Columns of c up to the next multiple of `panel` are scratch.
  void (*outer)(const T* const* a, int64_t m, const T* b, int64_t b_step_stride, int64_t n, int64_t k, Acc* c,
                int64_t ldc, void* scratch);

  // out[i, j] = sum_r a[r][a_column + i] * b[r][b_column + j] over m rows, i in [0, an), j in [0, bn); an, bn <= max_block
  // stream: out is larger than the caches, so whole lines may be stored past them
  void (*weight_grad)(const T* const* a, int64_t a_column, int64_t an, const T* const* b, int64_t b_column, int64_t bn,
                      int64_t m, T* out, int64_t out_row_stride, bool stream, void* scratch);

  // The activation of one row: act[i] = activation(gate + bias, up + bias) for i in [0, n).
  // Element i of gate and up is at [i * sum_stride], that of the biases and of what is saved at [i * stride].
  // saved_gate and saved_up (may be null) get the sums with the biases.
  void (*activation_forward)(const Activation& activation, const Acc* gate, const Acc* up, int64_t sum_stride,
                             const T* gate_bias, const T* up_bias, int64_t stride, int64_t n, T* act, T* saved_gate,
                             T* saved_up);

  // From the saved gate and up and from grad_act (unweighted): grad_gate, grad_up of weight * grad_act, and
  // weighted_act = weight * activation (may be null). Returns sum_i grad_act[i] * activation[i].
  Acc (*activation_backward)(const Activation& activation, const T* gate, const T* up, int64_t stride,
                             const Acc* grad_act, Acc weight, int64_t n, T* grad_gate, T* grad_up, T* weighted_act);

  // sum[i] += weight * (row[i] + bias[i]); bias may be null
  void (*accumulate)(Acc* sum, const Acc* row, const T* bias, Acc weight, int64_t n);
  // out[i] = row[i]
  void (*load_row)(const T* row, Acc* out, int64_t n);
  // out[i] = row[i] + bias[i], rounded; bias may be null
  void (*store_row)(const Acc* row, const T* bias, T* out, int64_t n);
  // out[i] = sum_j weights[j] * rows[j][i] over num_rows rows in order, rounded once
  void (*weighted_sum)(const T* const* rows, const Acc* weights, int64_t num_rows, T* out, int64_t n);
  // out[i] = weight * row[i]
  void (*scale)(const T* row, Acc weight, T* out, int64_t n);
  // out[i] = row[i], or zero where word i % 4 of Philox at (i / 4, number), 64 bits each, under the key is less than `below`
  void (*dropout)(const T* row, uint64_t key, uint64_t number, uint32_t below, T* out, int64_t n);
  // sum_i a[i] * b[i]
  Acc (*inner_product)(const T* a, const T* b, int64_t n);
  // The scores of one row of logits, softmax or sigmoid, and choice = scores + bias (may be null), -inf where the logit is
  // -inf or the bias NaN. False, with nothing in them, for a row that cannot be routed: it holds NaN or +inf, or is all -inf.
  bool (*scores)(const T* logits, int64_t n, bool sigmoid, const Acc* bias, Acc* scores, Acc* choice);
  // Indices of the `count` largest values (no NaN), largest first, the lowest index first among equals; values at -inf are
  // left out. Returns how many there were. best: scratch for `count`.
  int64_t (*largest)(const Acc* values, int64_t n, int64_t count, int32_t* indices, Acc* best);
  // A threshold that the `count` largest of n >= count > 0 values reach, each at least 0 or -inf; 0 where fewer are at least
  // 0. Where others reach it too, they equal it: the first num_equal that do are among the `count` largest (n: all of them).
  Acc (*threshold)(const Acc* values, int64_t n, int64_t count, int64_t* num_equal);
  // Indices and values, times factor, of the values that reach their threshold, in order; returns how many. `out` may be
  // `values`.
  int64_t (*reaching)(const Acc* values, const Acc* thresholds, int64_t n, Acc factor, int32_t* indices, Acc* out);
  // out[j][i] = rows[i][j] for j < n; rows and the vectors of out are `row_stride` and `out_stride` elements apart
  void (*transpose_rows)(const Acc* rows, int64_t row_stride, int64_t num_rows, int64_t n, Acc* out, int64_t out_stride);

  // products[m][j] = sum_i x[m][i] * rows[j][i] over i in [0, n), for few rows j: neither operand is packed
  void (*rank_products)(const T* const* x, int64_t m, const T* const* rows, int64_t num_rows, int64_t n,
                        Acc* const* products);
  // out[m][i] = base[m][i] + sum_j weights[m][j] * rows[j][i] in the order of j, rounded once; num_rows is at least 1.
  // base may be null (zero), and so may out: the sums then stay at sums[m * sums_stride + i]. sums is scratch memory,
  // each row of it padded to whole vectors.
  void (*rank_sums)(const T* const* rows, int64_t num_rows, const Acc* const* weights, int64_t m, const T* const* base,
                    T* const* out, Acc* sums, int64_t sums_stride, int64_t n);

  int64_t dot_step;         // elements of one step of dot
  int64_t dot_panel_rows;   // rows of one packed panel
  int64_t outer_panel;      // columns that outer computes together
  int64_t outer_max_block;  // the most rows of one call of outer, rows and columns of weight_grad
  bool dot_packs;           // dot turns its weights into panels: a block of columns need not fit L2, wide ones save work
  int64_t scratch_bytes;    // of dot, outer and weight_grad
};

struct MicrokernelTable {
  Microkernels<float> f32;
  Microkernels<double> f64;
  Microkernels<bf16> b16;
  Microkernels<fp16> f16;
};

// The table of the instruction set that common/cpu_isa.h chose, once a process.
const MicrokernelTable& microkernel_table();

template <class T>
const Microkernels<T>& microkernels() {
  return of_dtype<T>(microkernel_table());
}

}  // namespace moe
