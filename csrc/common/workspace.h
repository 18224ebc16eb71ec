// Scratch memory that is kept between calls.
//
// A fresh 64 MB buffer costs 10 times its use in page faults (cpu.md measured 45 ms against 5), so each thread keeps its
// blocks until it ends. Blocks above 2 MiB ask for huge pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace moe {

// Takes buffers from the calling thread's scratch memory; all of them are returned when it goes out of scope.
// Scopes of one thread nest.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Uninitialised, 64-byte aligned.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  void* take_bytes(size_t bytes);
  size_t block_, offset_;  // where the enclosing scope stood
};

// Asks for huge pages under memory that was just allocated and is about to be written for the first time. A fresh 1.2 GB
// gradient in 4 KiB pages spends more time in page faults than in its computation; a hint only, small memory is left alone.
void advise_huge_pages(void* data, int64_t bytes);

// out[0, count) = 0. Empty tensors have null pointers, which memset may not be given even for nothing.
template <class T>
void fill_zero(T* out, int64_t count) {
  if (count > 0) std::memset(static_cast<void*>(out), 0, static_cast<size_t>(count) * sizeof(T));
}

}  // namespace moe
