// Low-rank factors of many adapters, and who uses which.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "common/dispatch.h"
#include "common/workspace.h"
#include "ops/permute/permute.h"

namespace moe {

// Row j of adapter e's factor is a direction of the input (lora_a) or of the output (lora_b), `length` elements long.
// Stacked: [num_adapters, max_rank, length]. Packed: [num_rows, length], adapter e holds rows [starts[e], starts[e] +
// ranks[e]). Rows are read in place when they are contiguous; else the factor is copied once a call.
template <class T>
struct AdapterRows {
  Tensor keep_alive;
  const T* data = nullptr;
  int64_t num_adapters = 0, length = 0, adapter_stride = 0, row_stride = 0, max_rank = 0;
  const int32_t* starts = nullptr;  // packed only
  const int32_t* ranks = nullptr;   // null: all of them are max_rank

  AdapterRows(const char* op, const Tensor& factor, const std::optional<Tensor>& rank_starts,
              const std::optional<Tensor>& adapter_ranks, int64_t most_ranks) {
    const int64_t dim = factor.dim();
    MOE_CHECK(dim == 3 || (dim == 2 && rank_starts && adapter_ranks), op,
              ": a factor must be [num_adapters, rank, length], or [num_rows, length] with rank_starts and ranks");
    keep_alive = factor.size(dim - 1) <= 1 || factor.stride(dim - 1) == 1 ? factor : torch::stable::contiguous(factor);
    data = moe::data<T>(keep_alive);
    length = factor.size(dim - 1);
    row_stride = keep_alive.stride(dim - 2);
    max_rank = most_ranks;
    num_adapters = dim == 3 ? factor.size(0) : rank_starts->numel();
    adapter_stride = dim == 3 ? keep_alive.stride(0) : 0;
    const auto table = [&](const std::optional<Tensor>& values) -> const int32_t* {
      if (!values) return nullptr;
      MOE_CHECK(values->scalar_type() == ScalarType::Int && values->numel() == num_adapters &&
                    (num_adapters <= 1 || values->stride(0) == 1),
                op, ": rank_starts and ranks must be contiguous int32 of shape [num_adapters]");
      return moe::data<int32_t>(*values);
    };
    starts = dim == 2 ? table(rank_starts) : nullptr;
    ranks = table(adapter_ranks);
    for (int64_t e = 0; e < num_adapters; ++e) {
      MOE_CHECK(rank(e) <= max_rank && (dim == 2 || rank(e) <= factor.size(1)), op, ": adapter ", e, " has rank ", rank(e),
                ", more than max_rank=", max_rank, " or its factor's rows");
      MOE_CHECK(dim == 3 || rank(e) <= 0 || (starts[e] >= 0 && starts[e] + rank(e) <= factor.size(0)), op, ": adapter ", e,
                " must lie within the packed rows [0, ", factor.size(0), ")");
    }
  }

  // -1: the slot is empty
  int64_t rank(int64_t adapter) const { return ranks == nullptr ? max_rank : ranks[adapter]; }
  int64_t first_row(int64_t adapter) const { return starts == nullptr ? 0 : starts[adapter]; }
  const T* row(int64_t adapter, int64_t j) const {
    return data + adapter * adapter_stride + (first_row(adapter) + j) * row_stride;
  }
};

// Token-adapter pairs sorted by adapter: pairs[offsets[e]] … pairs[offsets[e + 1] - 1] are adapter e's, in token order.
struct AdapterPairs {
  int64_t num_tokens = 0, top_k = 0, num_adapters = 0;
  const int32_t* ids = nullptr;  // [num_tokens, top_k], -1: none
  int32_t *offsets = nullptr, *pairs = nullptr;

  template <class T>
  AdapterPairs(const char* op, const Tensor& adapter_ids, const AdapterRows<T>& rows, Scratch& scratch)
      : num_tokens(adapter_ids.size(0)), top_k(adapter_ids.size(1)), num_adapters(rows.num_adapters) {
    MOE_CHECK(num_tokens * top_k < (int64_t{1} << 31), op, ": num_tokens * top_k must be below 2**31");
    int32_t* narrow = scratch.take<int32_t>(num_tokens * top_k);
    dispatch_id(op, adapter_ids.scalar_type(), [&]<class Id>() {
      const Id* id = data<Id>(adapter_ids);
      for (int64_t pair = 0; pair < num_tokens * top_k; ++pair) {
        const Id adapter = id[pair / top_k * adapter_ids.stride(0) + pair % top_k * adapter_ids.stride(1)];
        MOE_CHECK(adapter >= -1 && adapter < num_adapters, op, ": adapter_ids must be -1 or in [0, num_adapters=",
                  num_adapters, "), got ", static_cast<int64_t>(adapter), " for token ", pair / top_k);
        MOE_CHECK(adapter < 0 || rows.rank(adapter) >= 0, op, ": adapter_ids must name loaded adapters, got ",
                  static_cast<int64_t>(adapter), " for token ", pair / top_k, ", whose slot is empty");
        narrow[pair] = static_cast<int32_t>(adapter);
      }
    });
    ids = narrow;
    offsets = scratch.take<int32_t>(num_adapters + 1);
    pairs = scratch.take<int32_t>(num_tokens * top_k);
    sort_pairs(ids, top_k, 1, num_tokens, top_k, num_adapters, offsets, pairs, static_cast<int32_t*>(nullptr));
  }

  const int32_t* ids_of(int64_t token) const { return ids + token * top_k; }
  bool same_adapters(int64_t token, int64_t other) const {
    return std::equal(ids_of(token), ids_of(token) + top_k, ids_of(other));
  }
};

}  // namespace moe
