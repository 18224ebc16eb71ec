// Packed task vectors from bit planes and back, on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "ops/task_vector/differences.h"
#include "ops/task_vector/pack.h"

namespace moe {
namespace {

const uint64_t* plane_words(const Tensor& planes, int64_t numel) {
  MOE_CHECK(planes.is_contiguous() && planes.scalar_type() == ScalarType::Long && planes.dim() == 2 &&
                planes.size(0) == (numel + kTernaryGroup - 1) / kTernaryGroup && planes.size(1) == 2,
            "compress: planes must be int64 of shape [ceil(numel / 64), 2]");
  return reinterpret_cast<const uint64_t*>(data<int64_t>(planes));
}

Tensor pack_ternary_cpu(Tensor planes, std::vector<int64_t> shape, double scale, double sigma, int64_t base_hash) {
  const uint64_t* words = plane_words(planes, num_elements(shape));
  return pack_blocks(
      planes, words, {.shape = shape, .scale = scale, .sigma = sigma, .base_hash = base_hash},
      [](int64_t, int64_t) { return int64_t{0}; }, [](int64_t, int64_t, uint8_t*) {});
}

// And |tensor - base| / scale of what the planes have; scale is a power of two that no magnitude exceeds.
Tensor pack_values_cpu(Tensor planes, Tensor tensor, std::optional<Tensor> base, std::vector<int64_t> shape, double scale,
                       double sigma, int64_t base_hash, int64_t dtype) {
  const int64_t numel = num_elements(shape);
  MOE_CHECK(dtype >= 1 && dtype <= 3, "compress: values must be float32, bfloat16 or float16");
  MOE_CHECK(tensor.numel() == numel, "compress: planes and tensor must be of one size");
  const PackedDtype type = static_cast<PackedDtype>(dtype);
  const int64_t itemsize = packed_itemsize(type);
  const uint64_t* words = plane_words(planes, numel);
  Tensor packed;
  dispatch_float("compress", tensor.scalar_type(), [&]<class T>() {
    const Differences<T> differences("compress", tensor, base);
    packed = pack_blocks(
        planes, words,
        {.shape = shape, .kind = PackedKind::values, .dtype = type, .scale = scale, .sigma = sigma, .base_hash = base_hash},
        [&](int64_t, int64_t count) { return (count * itemsize + 3) / 4 * 4; },
        [&](int64_t b, int64_t count, uint8_t* out) {
          float buffer[kTernaryBlock];
          if (count * itemsize % 4 != 0) fill_zero(out + count * itemsize, 2);
          task_vector_kernel_table().codec.encode_magnitudes(differences.block(b, buffer), static_cast<float>(1 / scale),
                                                             differences.size(b), words + b * kPlaneWords, type, out);
        });
  });
  return packed;
}

Tensor unpack_ternary_cpu(Tensor packed) {
  const PackedView view("decompress", packed);
  MOE_CHECK(view.kind() == PackedKind::ternary, "decompress: a packed task vector must be of kind 0 (ternary), got ",
            view.header().kind);
  Tensor planes =
      torch::stable::new_empty(packed, {(view.numel() + kTernaryGroup - 1) / kTernaryGroup, 2}, ScalarType::Long);
  uint64_t* words = reinterpret_cast<uint64_t*>(mutable_data<int64_t>(planes));
  view.decode_all([&](int64_t b) { return view.decode<float>(b, 1, words + b * kPlaneWords, nullptr); });
  return planes;
}

// Planes and t in float32: what the planes have may have become zero when it was rounded.
std::tuple<Tensor, Tensor> unpack_values_cpu(Tensor packed) {
  const PackedView view("decompress", packed);
  MOE_CHECK(view.kind() == PackedKind::values, "decompress: a packed task vector must be of kind 1 (values), got ",
            view.header().kind);
  Tensor planes =
      torch::stable::new_empty(packed, {(view.numel() + kTernaryGroup - 1) / kTernaryGroup, 2}, ScalarType::Long);
  Tensor dense = torch::stable::new_empty(packed, {view.numel()}, ScalarType::Float);
  uint64_t* words = reinterpret_cast<uint64_t*>(mutable_data<int64_t>(planes));
  float* values = mutable_data<float>(dense);
  fill_zero(values, view.numel());
  view.decode_all([&](int64_t b) {
    return view.decode<float>(b, 1, words + b * kPlaneWords, values + b * kTernaryBlock);
  });
  return {planes, dense};
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("pack_ternary", TORCH_BOX(&moe::pack_ternary_cpu));
  m.impl("pack_values", TORCH_BOX(&moe::pack_values_cpu));
  m.impl("unpack_ternary", TORCH_BOX(&moe::unpack_ternary_cpu));
  m.impl("unpack_values", TORCH_BOX(&moe::unpack_values_cpu));
}
