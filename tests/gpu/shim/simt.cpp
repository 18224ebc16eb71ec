// The scheduler: fibers, waits, shared memory and reports.
//
// Compiled without -fsanitize=thread, with SIMT_TSAN instead: ThreadSanitizer is to see the kernels and not this file.
#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#endif
#if !defined(__x86_64__) || defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace simt {

Thread* current = nullptr;

namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(SIMT_TSAN)
constexpr size_t kStackBytes = size_t{256} << 10;
#else
constexpr size_t kStackBytes = size_t{64} << 10;
#endif
constexpr size_t kPage = 4096;
constexpr size_t kGuardBytes = 128;  // also the alignment of shared arrays
constexpr unsigned char kPoison = 0xff, kGuard = 0xa5;

// ---------------------------------------------------------------- what the sanitizers must be told

// The scheduler's own bookkeeping, which happens on whatever fiber runs, is no access of the kernel.
struct Unobserved {
#if defined(SIMT_TSAN)
  Unobserved() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unobserved() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unobserved() {}
#endif
};

void release([[maybe_unused]] void* sync) {
#if defined(SIMT_TSAN)
  __tsan_release(sync);
#endif
}

void acquire([[maybe_unused]] void* sync) {
#if defined(SIMT_TSAN)
  __tsan_acquire(sync);
#endif
}

// ---------------------------------------------------------------- fibers

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
extern "C" void simt_switch(void** save, void* load);
// saves what a call must preserve, exchanges the stacks and returns on the other one
asm(R"(
.text
.hidden simt_switch
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

struct Context {
  void* sp = nullptr;

  void prepare(char* stack, void (*entry)()) {
    // the return address of the first switch, above it a null return address that ends back traces; 16 n + 8 at entry
    auto* top = reinterpret_cast<void**>(stack + kStackBytes);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    top -= 6;
    std::fill(top, top + 6, nullptr);
    sp = top;
  }
  static void exchange(Context& from, Context& to) { simt_switch(&from.sp, to.sp); }
};
#else
struct Context {
  ucontext_t state;

  void prepare(char* stack, void (*entry)()) {
    getcontext(&state);
    state.uc_stack = {.ss_sp = stack, .ss_flags = 0, .ss_size = kStackBytes};
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
  }
  static void exchange(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
};
#endif

struct Fiber {
  Context context;
  char* stack = nullptr;  // null: the host's own
  size_t stack_bytes = kStackBytes;
  Thread thread;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
#if defined(SIMT_TSAN)
  void* tsan = nullptr;
#endif
};

Fiber host;
std::vector<std::unique_ptr<Fiber>> pool;  // kept between launches
Fiber* running = &host;

void switch_to(Fiber& to, [[maybe_unused]] bool from_ends = false) {
  Fiber& from = *running;
  running = &to;
  current = &to == &host ? nullptr : &to.thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  Context::exchange(from.context, to.context);
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(from.fake_stack, &bottom, &bytes);
#endif
}

void make_fibers(size_t count) {
  while (pool.size() < count) {
    auto fiber = std::make_unique<Fiber>();
    char* memory = static_cast<char*>(
        mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for stacks");
    mprotect(memory, kPage, PROT_NONE);  // a stack that runs over faults instead of writing into its neighbour
    fiber->stack = memory + kPage;
#if defined(SIMT_TSAN)
    fiber->tsan = __tsan_create_fiber(0);
#endif
    pool.push_back(std::move(fiber));
  }
}

// ---------------------------------------------------------------- the block that runs

struct SharedArray {
  const void* key;
  std::string name;
  size_t bytes;
  unsigned char* memory;  // guard, array, guard; under AddressSanitizer the array alone, whose own guards know the line
  unsigned char* array() const {
#if defined(__SANITIZE_ADDRESS__)
    return memory;
#else
    return memory + kGuardBytes;
#endif
  }
};

struct Block {
  std::vector<Fiber*> fibers;  // by linear thread index
  std::vector<Fiber*> ready;
  std::vector<SharedArray> shared;
  size_t dynamic_bytes = 0;
  int num_exited = 0, num_at_barrier = 0;
  // what ThreadSanitizer orders memory by: alternating, so that a thread late to leave one barrier does not see what
  // others did before the next
  char barrier_sync[2] = {};
  int barrier_phase = 0;
  char warp_sync[kMaxThreads / 32] = {};
};

std::unique_ptr<Block> block;
const std::function<void()>* kernel;
std::string failure;
char launch_sync, end_sync;
uint64_t seed;
Launcher launcher;
std::mt19937_64 random_bits;
std::mutex one_launch;  // current and block are global

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::none: return "nothing";
    case Collective::block_barrier: return "__syncthreads";
    case Collective::warp_sync: return "__syncwarp";
    case Collective::shuffle: return "__shfl_sync";
    case Collective::ballot: return "__ballot_sync";
    case Collective::match_any: return "__match_any_sync";
  }
  return "";
}

std::string place(const Site& at) {
  return std::string(at.file_name()) + ":" + std::to_string(at.line());
}

std::string threads_text(const std::vector<int>& threads) {
  std::string text;
  for (size_t i = 0; i < threads.size();) {
    size_t j = i;
    while (j + 1 < threads.size() && threads[j + 1] == threads[j] + 1) ++j;
    text += (text.empty() ? "" : ", ") + std::to_string(threads[i]);
    if (j > i) text += "-" + std::to_string(threads[j]);
    i = j + 1;
  }
  return text;
}

// One line for each thing that threads of the block wait for.
std::string waits_text() {
  std::vector<std::pair<std::string, std::vector<int>>> groups;
  for (const Fiber* fiber : block->fibers) {
    const Thread& thread = fiber->thread;
    std::string what = "have not arrived";
    if (thread.exited) {
      what = "have exited";
    } else if (thread.waits_for != Collective::none) {
      std::ostringstream text;
      text << "wait at " << name_of(thread.waits_for);
      if (thread.waits_for != Collective::block_barrier) text << "(mask 0x" << std::hex << thread.mask << ")";
      text << " in " << place(thread.site);
      what = text.str();
    }
    auto found = std::find_if(groups.begin(), groups.end(), [&](const auto& group) { return group.first == what; });
    if (found == groups.end()) found = groups.insert(groups.end(), {what, {}});
    found->second.push_back(thread.linear);
  }
  std::string text;
  for (const auto& [what, threads] : groups) text += "\n  threads " + threads_text(threads) + " " + what;
  return text;
}

std::string block_text() {
  const dim3 index = block->fibers.front()->thread.block_index;
  return "block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

void make_ready(Fiber& fiber) {
  fiber.thread.waits_for = Collective::none;
  block->ready.push_back(&fiber);
}

// All threads of the block have come to a barrier: the same one?
void leave_barrier() {
  const Site& first = block->fibers.front()->thread.site;
  for (const Fiber* fiber : block->fibers)
    if (fiber->thread.site.line() != first.line() || std::strcmp(fiber->thread.site.file_name(), first.file_name()) != 0) {
      failure = "divergence: " + block_text() + " reached __syncthreads at different places" + waits_text();
      return;
    }
  block->num_at_barrier = 0;
  block->barrier_phase ^= 1;
  for (Fiber* fiber : block->fibers) make_ready(*fiber);
}

// Completes the collective that `last` has just come to, if every lane of its mask is there.
void try_collective(const Thread& last) {
  const int first = last.linear / 32 * 32;
  const int lanes = std::min<int>(32, static_cast<int>(block->fibers.size()) - first);
  Fiber** warp = block->fibers.data() + first;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(last.mask >> lane & 1)) continue;
    if (lane >= lanes) {
      failure = std::string(name_of(last.waits_for)) + " in " + place(last.site) + " names lane " + std::to_string(lane) +
                ", which " + block_text() + " does not have";
      return;
    }
    const Thread& thread = warp[lane]->thread;
    if (thread.waits_for != last.waits_for || thread.mask != last.mask || thread.site.line() != last.site.line()) return;
  }
  for (int lane = 0; lane < lanes; ++lane) {
    if (!(last.mask >> lane & 1)) continue;
    Thread& thread = warp[lane]->thread;
    switch (last.waits_for) {
      case Collective::shuffle:
        if (!(last.mask >> thread.source_lane & 1)) {
          failure = "__shfl_sync in " + place(last.site) + " reads lane " + std::to_string(thread.source_lane) +
                    ", which is not in its mask";
          return;
        }
        thread.result = warp[thread.source_lane]->thread.payload;
        break;
      case Collective::ballot:
      case Collective::match_any:
        thread.result = 0;
        for (int other = 0; other < lanes; ++other) {
          if (!(last.mask >> other & 1)) continue;
          const uint64_t value = warp[other]->thread.payload;
          const bool bit = last.waits_for == Collective::ballot ? value != 0 : value == thread.payload;
          thread.result |= uint64_t{bit} << other;
        }
        break;
      default: break;
    }
  }
  const unsigned mask = last.mask;
  for (int lane = 0; lane < lanes; ++lane)
    if (mask >> lane & 1) make_ready(*warp[lane]);
}

void fiber_entry() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (host.stack == nullptr) {
    host.stack = static_cast<char*>(const_cast<void*>(bottom));
    host.stack_bytes = bytes;
  }
#endif
  acquire(&launch_sync);
  (*kernel)();
  release(&end_sync);
  running->thread.exited = true;
  ++block->num_exited;
  switch_to(host, true);
  std::abort();  // nobody returns to a thread that has exited
}

void run_block(dim3 index, dim3 grid, dim3 dims, size_t dynamic_bytes) {
  const Unobserved unobserved;
  const int num_threads = static_cast<int>(dims.x * dims.y * dims.z);
  block = std::make_unique<Block>();
  block->dynamic_bytes = dynamic_bytes;
  // which fiber plays which thread changes from block to block: ThreadSanitizer sees no race of a fiber with itself
  std::vector<int> order(num_threads);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_bits);
  for (int linear = 0; linear < num_threads; ++linear) {
    Fiber& fiber = *pool[order[linear]];
    fiber.thread = Thread();
    fiber.thread.linear = linear;
    fiber.thread.thread_index = dim3(linear % dims.x, linear / dims.x % dims.y, linear / (dims.x * dims.y));
    fiber.thread.block_index = index;
    fiber.thread.block_dim = dims;
    fiber.thread.grid_dim = grid;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack, kStackBytes);  // frames that an earlier failure abandoned
    fiber.fake_stack = nullptr;
#endif
    fiber.context.prepare(fiber.stack, fiber_entry);
    block->fibers.push_back(&fiber);
    block->ready.push_back(&fiber);
  }
  while (failure.empty() && !block->ready.empty()) {
    const size_t at = random_bits() % block->ready.size();
    std::swap(block->ready[at], block->ready.back());
    Fiber* next = block->ready.back();
    block->ready.pop_back();
    switch_to(*next);
  }
  if (failure.empty() && block->num_exited < num_threads)
    failure = (block->num_at_barrier > 0 ? "__syncthreads reached by only part of " : "deadlock in ") + block_text() + ":" +
              waits_text();
  for (const SharedArray& array : block->shared) {
#if !defined(__SANITIZE_ADDRESS__)
    const auto intact = [&](const unsigned char* guard) {
      return std::all_of(guard, guard + kGuardBytes, [](unsigned char byte) { return byte == kGuard; });
    };
    if (failure.empty() && !(intact(array.memory) && intact(array.array() + array.bytes)))
      failure = block_text() + " wrote outside shared array " + array.name + " of " + std::to_string(array.bytes) + " bytes";
#endif
    std::free(array.memory);
  }
  block.reset();
}

void check_limits(dim3 grid, dim3 dims, size_t dynamic_bytes) {
  const auto refuse = [](const std::string& what) { throw std::runtime_error("simt: launch refused: " + what); };
  const uint64_t threads = uint64_t{dims.x} * dims.y * dims.z;
  if (threads == 0 || threads > kMaxThreads || dims.z > 64) refuse(std::to_string(threads) + " threads in a block");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) refuse("an empty grid");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) refuse("a grid past the limits");
  if (dynamic_bytes > kMaxSharedBytes) refuse(std::to_string(dynamic_bytes) + " bytes of dynamic shared memory");
}

}  // namespace

void launch(const Launch& launch, const std::function<void()>& body) {
  const auto [grid, dims, dynamic_bytes, address, parameters] = launch;
  check_limits(grid, dims, dynamic_bytes);
  if (launcher != nullptr) {
    const unsigned sizes[] = {grid.x, grid.y, grid.z, dims.x, dims.y, dims.z};
    if (!launcher(sizes, dynamic_bytes, address, parameters.data(), parameters.size()))
      throw std::runtime_error("simt: the launcher found an error");
    return;
  }
  const std::lock_guard<std::mutex> lock(one_launch);
  make_fibers(dims.x * dims.y * dims.z);
#if defined(SIMT_TSAN)
  host.tsan = __tsan_get_current_fiber();
#endif
#if defined(__SANITIZE_ADDRESS__)
  host.stack = nullptr;  // the caller may be another thread than last time
#endif
  kernel = &body;
  failure.clear();
  random_bits.seed(seed);
  const uint64_t num_blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> order(num_blocks);
  std::iota(order.begin(), order.end(), uint64_t{0});
  std::shuffle(order.begin(), order.end(), random_bits);
  release(&launch_sync);
  for (size_t i = 0; i < order.size() && failure.empty(); ++i) {
    const uint64_t at = order[i];
    run_block(dim3(at % grid.x, at / grid.x % grid.y, at / (uint64_t{grid.x} * grid.y)), grid, dims, dynamic_bytes);
  }
  acquire(&end_sync);
  if (!failure.empty()) throw std::runtime_error("simt: " + failure);
}

void* shared_array(const void* key, const char* name, size_t bytes) {
  const Unobserved unobserved;
  for (const SharedArray& array : block->shared)
    if (array.key == key) return array.array();
  SharedArray array{key, name, bytes, nullptr};
#if defined(__SANITIZE_ADDRESS__)
  // aligned_alloc rounds nothing up in libasan: the red zone begins at the last byte
  void* memory = nullptr;
  if (posix_memalign(&memory, kGuardBytes, std::max<size_t>(bytes, 1)) != 0) std::abort();
  array.memory = static_cast<unsigned char*>(memory);
#else
  void* memory = nullptr;
  if (posix_memalign(&memory, kGuardBytes, bytes + 2 * kGuardBytes) != 0) std::abort();
  array.memory = static_cast<unsigned char*>(memory);
  std::memset(memory, kGuard, bytes + 2 * kGuardBytes);
#endif
  std::memset(array.array(), kPoison, bytes);
  block->shared.push_back(array);
  size_t total = 0;
  for (const SharedArray& each : block->shared) total += each.bytes;
  if (total > kMaxSharedBytes) fail("shared arrays take more memory than a block can have", Site::current());
  return array.array();
}

void* dynamic_shared_array() {
  static const char key = 0;
  return shared_array(&key, "extern __shared__", block->dynamic_bytes);
}

void fail(const char* what, Site at) {
  {
    const Unobserved unobserved;
    failure = std::string(what) + " in " + place(at) + ", thread " + std::to_string(current->linear) + " of " + block_text();
  }
  switch_to(host);
  std::abort();  // nobody returns to a block that has failed
}

void wait(Collective kind, unsigned mask, uint64_t payload, int source_lane, Site at) {
  Thread& thread = *current;
  char* sync = nullptr;
  if (kind == Collective::block_barrier) sync = &block->barrier_sync[block->barrier_phase];
  if (kind == Collective::warp_sync) sync = &block->warp_sync[thread.linear / 32];
  if (sync != nullptr) release(sync);
  {
    const Unobserved unobserved;
    thread.waits_for = kind;
    thread.mask = mask;
    thread.payload = payload;
    thread.source_lane = source_lane;
    thread.site = at;
    if (kind == Collective::block_barrier) {
      if (++block->num_at_barrier == static_cast<int>(block->fibers.size())) leave_barrier();
    } else if (!(mask >> lane() & 1)) {
      failure = std::string(name_of(kind)) + " in " + place(at) + ": thread " + std::to_string(thread.linear) +
                " is not in its own mask";
    } else {
      try_collective(thread);
    }
  }
  switch_to(host);
  if (sync != nullptr) acquire(sync);
}

void copy_async(void* to, const void* from, size_t bytes, size_t from_bytes, Site at) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async of a size other than 4, 8 and 16", at);
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0)
    fail("cp.async of a misaligned address", at);
  std::memset(to, kPoison, bytes);
  current->open_copies.push_back({to, from, bytes, from_bytes});
}

void commit_copies() {
  current->committed_copies.push_back(std::move(current->open_copies));
  current->open_copies.clear();
}

void wait_copies(size_t groups_left) {
  auto& groups = current->committed_copies;
  while (groups.size() > groups_left) {
    for (const Thread::Copy& copy : groups.front()) {
      std::memset(copy.to, 0, copy.bytes);
      std::memcpy(copy.to, copy.from, copy.from_bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace simt

// Another seed is another order of blocks and threads.
extern "C" __attribute__((visibility("default"))) void simt_set_seed(uint64_t value) { simt::seed = value; }

// Sends launches elsewhere; null brings them back.
extern "C" __attribute__((visibility("default"))) void simt_set_launcher(simt::Launcher value) { simt::launcher = value; }
