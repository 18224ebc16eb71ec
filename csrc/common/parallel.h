// One parallel region over independent tasks, on PyTorch's threads (torch.set_num_threads).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

namespace moe {

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

// Runs task(0) … task(num_tasks - 1), each once, on any thread. Tasks are handed out one by one, so threads that other
// work slows down take fewer; a task must not depend on which thread runs it, nor on which task ran before.
template <class F>
void parallel_tasks(int64_t num_tasks, const F& task) {
  const int64_t threads = std::min<int64_t>(num_threads(), num_tasks);
  if (threads <= 1) {
    for (int64_t i = 0; i < num_tasks; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) task(i);
  });
}

// parallel_tasks over ranges [begin, end) of at most `grain` items.
template <class F>
void parallel_ranges(int64_t num_items, int64_t grain, const F& range) {
  parallel_tasks((num_items + grain - 1) / grain,
                 [&](int64_t i) { range(i * grain, std::min(num_items, (i + 1) * grain)); });
}

}  // namespace moe
