// Lossless patches, on the CPU: what turns the bits of one weight into those of another, and back.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "ops/task_vector/pack.h"

namespace moe {
namespace {

template <class T>
constexpr PackedDtype packed_dtype() {
  if constexpr (__is_same(T, float)) return PackedDtype::f32;
  if constexpr (__is_same(T, bf16)) return PackedDtype::b16;
  if constexpr (__is_same(T, fp16)) return PackedDtype::f16;
  return PackedDtype::f64;
}

Tensor make_patch_cpu(Tensor weight, Tensor base, std::vector<int64_t> shape, int64_t base_hash) {
  MOE_CHECK(weight.is_contiguous() && base.is_contiguous() && weight.numel() == base.numel() &&
                weight.scalar_type() == base.scalar_type() && weight.numel() == num_elements(shape),
            "make_patch: weight and base must be contiguous, of one shape and dtype");
  Tensor packed;
  dispatch_float("make_patch", weight.scalar_type(), [&]<class T>() {
    const T *x = data<T>(weight), *from = data<T>(base);
    const int64_t numel = weight.numel(), num_blocks = (numel + kTernaryBlock - 1) / kTernaryBlock;
    const TaskVectorKernels<T>& kernels = task_vector_kernels<T>();
    const auto size = [&](int64_t b) { return std::min(kTernaryBlock, numel - b * kTernaryBlock); };
    Scratch scratch;
    uint64_t* planes = scratch.take<uint64_t>(num_blocks * kPlaneWords);
    int64_t* step_bits = scratch.take<int64_t>(num_blocks);
    parallel_ranges(num_blocks, kPackedBlocksPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        step_bits[b] = kernels.find_steps(x + b * kTernaryBlock, from + b * kTernaryBlock, size(b), planes + b * kPlaneWords);
    });
    packed = pack_blocks(
        weight, planes, {.shape = shape, .kind = PackedKind::patch, .dtype = packed_dtype<T>(), .base_hash = base_hash},
        [&](int64_t b, int64_t) { return (step_bits[b] + 31) / 32 * 4; },
        [&](int64_t b, int64_t, uint8_t* out) {
          const int64_t at = b * kTernaryBlock;
          kernels.encode_steps(x + at, from + at, size(b), planes + b * kPlaneWords, out);
        });
  });
  return packed;
}

// Each block is decoded before it changes; a damaged one is left as it is.
void apply_patch_cpu(Tensor weight, Tensor packed, bool back) {
  const PackedView view("apply_patch_", packed);
  MOE_CHECK(view.kind() == PackedKind::patch, "apply_patch_: a patch must be of kind 2, got ", view.header().kind);
  MOE_CHECK(weight.is_contiguous() && view.numel() == weight.numel(), "apply_patch_: the patch must be of ",
            weight.numel(), " elements, got ", view.numel());
  dispatch_float("apply_patch_", weight.scalar_type(), [&]<class T>() {
    MOE_CHECK(view.dtype() == packed_dtype<T>(), "apply_patch_: the patch is of another dtype than the weight");
    T* w = mutable_data<T>(weight);
    std::atomic<bool> damaged{false};
    parallel_ranges(view.num_blocks(), kPackedBlocksPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        if (!task_vector_kernels<T>().move_steps(view.block(b), back, w + b * kTernaryBlock)) damaged = true;
    });
    MOE_CHECK(!damaged, "apply_patch_: a patch was damaged after it was checked; its damaged blocks changed nothing");
  });
}

// Throws where it is damaged.
void check_patch_cpu(Tensor packed) {
  const PackedView view("apply_patch_", packed);
  const auto check = [&]<class T>() {
    view.decode_all([&](int64_t b) {
      T nothing[kTernaryBlock] = {};
      return task_vector_kernels<T>().move_steps(view.block(b), false, nothing);
    });
  };
  switch (view.dtype()) {
    case PackedDtype::f32: return check.template operator()<float>();
    case PackedDtype::b16: return check.template operator()<bf16>();
    case PackedDtype::f16: return check.template operator()<fp16>();
    default: return check.template operator()<double>();
  }
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("make_patch", TORCH_BOX(&moe::make_patch_cpu));
  m.impl("apply_patch", TORCH_BOX(&moe::apply_patch_cpu));
  m.impl("check_patch", TORCH_BOX(&moe::check_patch_cpu));
}
