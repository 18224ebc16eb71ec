#include "common/kept_memory.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#include "common/workspace.h"

namespace moe {
namespace {

constexpr int64_t kLarge = int64_t{8} << 20;
constexpr int64_t kHugePage = int64_t{2} << 20;

class KeptMemory {
 public:
  // Kept memory of up to a quarter more than asked, or fresh.
  void* take(int64_t bytes) {
    const int64_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    std::unique_lock lock(mutex_);
    const auto fit = free_.lower_bound(size);
    if (fit != free_.end() && fit->first <= size + size / 4) {
      void* data = fit->second;
      used_.emplace(data, fit->first);
      in_use_ += fit->first;
      kept_ -= fit->first;
      free_.erase(fit);
      return data;
    }
    in_use_ += size;
    most_in_use_ = std::max(most_in_use_, in_use_);
    // blocks that did not fit make room: together with what is in use they never exceed the most that was
    while (kept_ > 0 && in_use_ + kept_ > most_in_use_) drop_smallest();
    lock.unlock();
    void* data = std::aligned_alloc(static_cast<size_t>(kHugePage), static_cast<size_t>(size));
    lock.lock();
    if (data == nullptr) {
      in_use_ -= size;
      throw std::bad_alloc();
    }
    used_.emplace(data, size);
    advise_huge_pages(data, size);
    return data;
  }

  void give_back(void* data) {
    const std::lock_guard lock(mutex_);
    const auto block = used_.find(data);
    in_use_ -= block->second;
    kept_ += block->second;
    free_.emplace(block->second, data);
    used_.erase(block);
  }

  int64_t release() {
    const std::lock_guard lock(mutex_);
    const int64_t released = kept_;
    while (kept_ > 0) drop_smallest();
    most_in_use_ = in_use_;
    return released;
  }

 private:
  void drop_smallest() {
    kept_ -= free_.begin()->first;
    std::free(free_.begin()->second);
    free_.erase(free_.begin());
  }

  std::mutex mutex_;
  std::multimap<int64_t, void*> free_;  // size -> block
  std::map<void*, int64_t> used_;
  int64_t in_use_ = 0, kept_ = 0, most_in_use_ = 0;
};

// never destroyed: tensors may outlive every static object
KeptMemory& kept_memory() {
  static KeptMemory* const memory = new KeptMemory;
  return *memory;
}

}  // namespace

torch::stable::Tensor new_result(const torch::stable::Tensor& like, std::initializer_list<int64_t> shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t numel = 1;
  for (size_t i = shape.size(); i-- > 0; numel *= shape.begin()[i]) strides[i] = numel;
  const int64_t bytes = numel * static_cast<int64_t>(like.element_size());
  if (bytes < kLarge) return torch::stable::new_empty(like, shape);
  return torch::stable::from_blob(kept_memory().take(bytes), shape, strides, like.device(), like.scalar_type(),
                                  [](void* data) { kept_memory().give_back(data); });
}

int64_t empty_cache() { return kept_memory().release(); }

}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CompositeExplicitAutograd, m) {
  m.impl("empty_cache", TORCH_BOX(&moe::empty_cache));
}
