#include "common/workspace.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

namespace moe {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t{2} << 20;

struct Block {
  char* data;
  size_t size;
};

Block new_block(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : kAlignment;
  const size_t size = (bytes + alignment - 1) / alignment * alignment;
  char* data = static_cast<char*>(std::aligned_alloc(alignment, size));
  if (data == nullptr) throw std::bad_alloc();
  advise_huge_pages(data, static_cast<int64_t>(size));
  return {data, size};
}

struct Arena {
  std::vector<Block> blocks;
  size_t block = 0, offset = 0;  // next free byte
  size_t reserve = 0;            // size of the first block to come
  ~Arena() {
    for (const Block& b : blocks) std::free(b.data);
  }
};

thread_local Arena arena;

}  // namespace

void advise_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (bytes > 0 && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

Scratch::Scratch() : block_(arena.block), offset_(arena.offset) {}

Scratch::~Scratch() {
  arena.block = block_;
  arena.offset = offset_;
  // several blocks left over from a call that grew: let one take their place, so that the next call finds all it needs
  if (block_ == 0 && offset_ == 0 && arena.blocks.size() > 1) {
    arena.reserve = 0;
    for (const Block& b : arena.blocks) {
      arena.reserve += b.size;
      std::free(b.data);
    }
    arena.blocks.clear();
  }
}

void* Scratch::take_bytes(size_t bytes) {
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  while (arena.block < arena.blocks.size() && arena.offset + bytes > arena.blocks[arena.block].size) {
    ++arena.block;
    arena.offset = 0;
  }
  if (arena.block == arena.blocks.size()) arena.blocks.push_back(new_block(std::max(bytes, std::exchange(arena.reserve, 0))));
  void* result = arena.blocks[arena.block].data + arena.offset;
  arena.offset += bytes;
  return result;
}

}  // namespace moe
