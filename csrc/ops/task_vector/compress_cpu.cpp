// From a dense difference to a packed task vector and back, on the CPU.
//
// Finding the k largest of n magnitudes takes two histograms (their high 16 bits, then the low 15 of those that share the
// threshold's high ones): two passes over the tensor, no copy of it, exact. t = tensor - base is made block by block.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "common/parallel.h"
#include "common/workspace.h"
#include "ops/task_vector/packed.h"

namespace moe {
namespace {

constexpr int64_t kBlocksPerTask = 16;
constexpr int64_t kHighCounts = int64_t{1} << 16, kLowCounts = int64_t{1} << kLowBits;
constexpr int64_t kHistogramBlocks = 1024;  // 4M elements into one 32-bit histogram

const TernaryCodecKernels& codec() { return task_vector_kernel_table().codec; }

int64_t count_blocks(int64_t numel) { return (numel + kTernaryBlock - 1) / kTernaryBlock; }

// tensor - base, block by block.
template <class T>
class Differences {
 public:
  Differences(const char* op, const Tensor& tensor, const std::optional<Tensor>& base)
      : x_(data<T>(tensor)), base_(base ? data<T>(*base) : nullptr), numel_(tensor.numel()) {
    MOE_CHECK(tensor.is_contiguous() && (!base || (base->is_contiguous() && base->numel() == tensor.numel() &&
                                                   base->scalar_type() == tensor.scalar_type())),
              op, ": tensor and base must be contiguous, of one shape and dtype");
  }

  int64_t numel() const { return numel_; }
  int64_t num_blocks() const { return count_blocks(numel_); }
  int64_t size(int64_t block) const { return std::min(kTernaryBlock, numel_ - block * kTernaryBlock); }

  // The block's differences: in `buffer`, or where they lie already.
  const float* block(int64_t block, float* buffer) const {
    const int64_t at = block * kTernaryBlock;
    if constexpr (__is_same(T, float))
      if (base_ == nullptr) return x_ + at;
    task_vector_kernels<T>().differences(x_ + at, base_ == nullptr ? nullptr : base_ + at, size(block), buffer);
    return buffer;
  }

 private:
  const T *x_, *base_;
  int64_t numel_;
};

// Adds what `count(t, n, counts)` counts in each block into [size] int64.
template <class F>
Tensor histogram(const Tensor& tensor, const std::optional<Tensor>& base, int64_t size, const F& count) {
  Tensor counts = torch::stable::new_empty(tensor, {size}, ScalarType::Long);
  int64_t* totals = mutable_data<int64_t>(counts);
  fill_zero(totals, size);
  dispatch_float("compress", tensor.scalar_type(), [&]<class T>() {
    const Differences<T> differences("compress", tensor, base);
    // whole numbers: the order in which threads add theirs does not matter
    parallel_ranges(differences.num_blocks(), kHistogramBlocks, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      uint32_t* here = scratch.take<uint32_t>(size);
      float* buffer = scratch.take<float>(kTernaryBlock);
      fill_zero(here, size);
      for (int64_t b = begin; b < end; ++b) count(differences.block(b, buffer), differences.size(b), here);
      for (int64_t i = 0; i < size; ++i)
        if (here[i] != 0) __atomic_fetch_add(&totals[i], here[i], __ATOMIC_RELAXED);
    });
  });
  return counts;
}

// prefix < 0: how often each high half of a magnitude's bits occurs; else how often each low one beside that high one.
Tensor count_magnitudes_cpu(Tensor tensor, std::optional<Tensor> base, int64_t prefix) {
  return histogram(tensor, base, prefix < 0 ? kHighCounts : kLowCounts, [&](const float* t, int64_t n, uint32_t* counts) {
    if (prefix < 0)
      codec().count_magnitudes(t, n, counts);
    else
      codec().count_low_magnitudes(t, n, static_cast<uint32_t>(prefix), counts);
  });
}

// The first of these for the high halves from `first` to `last`; the others are summed up in the bins beside those.
Tensor count_window_cpu(Tensor tensor, std::optional<Tensor> base, int64_t first, int64_t last) {
  MOE_CHECK(0 <= first && first <= last && last + 1 < (0x7f800000 >> kLowBits), "compress: no such window of magnitudes");
  return histogram(tensor, base, kHighCounts, [&](const float* t, int64_t n, uint32_t* counts) {
    codec().count_window(t, n, static_cast<int32_t>(first), static_cast<int32_t>(last), counts);
  });
}

// [sum, sum of squares] in float64, in one order whatever the threads and the instruction set
Tensor moments_cpu(Tensor tensor, std::optional<Tensor> base) {
  Tensor result = torch::stable::new_empty(tensor, {2}, ScalarType::Double);
  double* out = mutable_data<double>(result);
  dispatch_float("compress", tensor.scalar_type(), [&]<class T>() {
    const Differences<T> differences("compress", tensor, base);
    Scratch scratch;
    const int64_t num_tasks = (differences.num_blocks() + kBlocksPerTask - 1) / kBlocksPerTask;
    double* partial = scratch.take<double>(num_tasks * 2 * kMomentLanes);
    fill_zero(partial, num_tasks * 2 * kMomentLanes);
    parallel_tasks(num_tasks, [&](int64_t task) {
      float buffer[kTernaryBlock];
      const int64_t end = std::min(differences.num_blocks(), (task + 1) * kBlocksPerTask);
      for (int64_t b = task * kBlocksPerTask; b < end; ++b)
        codec().add_moments(differences.block(b, buffer), differences.size(b), partial + task * 2 * kMomentLanes);
    });
    out[0] = out[1] = 0;
    for (int64_t i = 0; i < num_tasks * 2 * kMomentLanes; ++i) out[i / kMomentLanes % 2] += partial[i];
  });
  return result;
}

// Planes of the elements whose magnitude's bits are above the threshold, and of the first num_ties that are just that.
Tensor select_ternary_cpu(Tensor tensor, std::optional<Tensor> base, int64_t threshold, int64_t num_ties) {
  const int64_t groups = (tensor.numel() + kTernaryGroup - 1) / kTernaryGroup;
  constexpr int64_t kWords = kTernaryBlock / kTernaryGroup * 2;
  Tensor planes = torch::stable::new_empty(tensor, {groups, 2}, ScalarType::Long);
  uint64_t* words = reinterpret_cast<uint64_t*>(mutable_data<int64_t>(planes));
  MOE_CHECK(threshold >= 0 && threshold < (int64_t{1} << 31), "compress: threshold must be the bits of a magnitude");
  dispatch_float("compress", tensor.scalar_type(), [&]<class T>() {
    const Differences<T> differences("compress", tensor, base);
    const int64_t num_blocks = differences.num_blocks();
    Scratch scratch;
    int64_t* ties = scratch.take<int64_t>(num_blocks);
    const auto select = [&](int64_t b, bool equal, uint64_t* out) {
      float buffer[kTernaryBlock];
      return codec().select_ternary(differences.block(b, buffer), differences.size(b), static_cast<uint32_t>(threshold),
                                    equal, out);
    };
    parallel_ranges(num_blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) ties[b] = select(b, false, words + b * kWords);
    });
    int64_t left = num_ties;
    for (int64_t b = 0; b < num_blocks; ++b) left -= ties[b] = std::min(ties[b], left);
    parallel_ranges(num_blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        if (ties[b] == 0) continue;
        uint64_t equal[kWords];
        select(b, true, equal);
        const int64_t last = (differences.size(b) + kTernaryGroup - 1) / kTernaryGroup;
        for (int64_t g = 0, wanted = ties[b]; g < last && wanted > 0; ++g) {
          uint64_t nonzero = equal[2 * g], chosen = 0;
          for (; nonzero != 0 && wanted > 0; nonzero &= nonzero - 1, --wanted) chosen |= nonzero & -nonzero;
          words[b * kWords + 2 * g] |= chosen;
          words[b * kWords + 2 * g + 1] |= equal[2 * g + 1] & chosen;
        }
      }
    });
  });
  return planes;
}

// The index after the num_ties-th element whose magnitude has just these bits.
int64_t end_of_ties_cpu(Tensor tensor, std::optional<Tensor> base, int64_t threshold, int64_t num_ties) {
  int64_t end = tensor.numel();
  dispatch_float("compress", tensor.scalar_type(), [&]<class T>() {
    const Differences<T> differences("compress", tensor, base);
    Scratch scratch;
    int64_t* ties = scratch.take<int64_t>(differences.num_blocks());
    uint64_t planes[kTernaryBlock / kTernaryGroup * 2];
    const auto select = [&](int64_t b, uint64_t* out) {
      float buffer[kTernaryBlock];
      return codec().select_ternary(differences.block(b, buffer), differences.size(b), static_cast<uint32_t>(threshold),
                                    true, out);
    };
    parallel_ranges(differences.num_blocks(), kBlocksPerTask, [&](int64_t begin, int64_t last) {
      uint64_t here[kTernaryBlock / kTernaryGroup * 2];
      for (int64_t b = begin; b < last; ++b) ties[b] = select(b, here);
    });
    int64_t left = num_ties;
    for (int64_t b = 0; b < differences.num_blocks(); left -= ties[b++]) {
      if (ties[b] < left) continue;
      select(b, planes);
      for (int64_t g = 0; left > 0; ++g)
        for (uint64_t word = planes[2 * g]; word != 0 && left > 0; word &= word - 1, --left)
          end = b * kTernaryBlock + g * kTernaryGroup + __builtin_ctzll(word) + 1;
      break;
    }
  });
  return end;
}

Tensor pack_ternary_cpu(Tensor planes, std::vector<int64_t> shape, double scale, double sigma, int64_t base_hash) {
  MOE_CHECK(shape.size() <= 7, "compress: a tensor must have at most 7 dimensions");
  int64_t numel = 1;
  for (const int64_t size : shape) numel *= size;
  constexpr int64_t kWords = kTernaryBlock / kTernaryGroup * 2;
  const int64_t num_blocks = count_blocks(numel);
  MOE_CHECK(planes.is_contiguous() && planes.scalar_type() == ScalarType::Long && planes.dim() == 2 &&
                planes.size(0) == (numel + kTernaryGroup - 1) / kTernaryGroup && planes.size(1) == 2,
            "compress: planes must be int64 of shape [ceil(numel / 64), 2]");
  const uint64_t* words = reinterpret_cast<const uint64_t*>(data<int64_t>(planes));
  const auto size = [&](int64_t b) { return std::min(kTernaryBlock, numel - b * kTernaryBlock); };
  std::vector<PackedChoice> choices(static_cast<size_t>(num_blocks));
  parallel_ranges(num_blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      choices[static_cast<size_t>(b)] = codec().choose_block(words + b * kWords, size(b));
  });
  PackedHeader header{};
  std::memcpy(header.magic, kPackedMagic, sizeof kPackedMagic);
  header.numel = static_cast<uint64_t>(numel);
  header.log2_block = 12;
  header.num_blocks = static_cast<uint32_t>(num_blocks);
  header.scale = static_cast<float>(scale);
  header.sigma = static_cast<float>(sigma);
  header.kind = kTernaryKind;
  const int64_t payload = round_up_64(static_cast<int64_t>(sizeof header) + 8 * num_blocks);
  header.payload_offset = static_cast<uint64_t>(payload);
  header.base_hash = static_cast<uint64_t>(base_hash);
  header.ndim = static_cast<uint32_t>(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) header.shape[i] = static_cast<uint64_t>(shape[i]);
  std::vector<int64_t> offsets(static_cast<size_t>(num_blocks) + 1);
  for (size_t b = 0; b < choices.size(); ++b) {
    offsets[b + 1] = offsets[b] + (choices[b].num_bits + 31) / 32 * 4;
    header.nnz += static_cast<uint64_t>(choices[b].count);
  }
  const int64_t total = round_up_64(payload + offsets.back() + kSpareBytes);
  Tensor packed = torch::stable::new_empty(planes, {total}, ScalarType::Byte);
  uint8_t* bytes = mutable_data<uint8_t>(packed);
  std::memcpy(bytes, &header, sizeof header);
  fill_zero(bytes + sizeof header, payload - static_cast<int64_t>(sizeof header));
  fill_zero(bytes + payload + offsets.back(), total - payload - offsets.back());
  parallel_ranges(num_blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const PackedChoice& choice = choices[static_cast<size_t>(b)];
      const int64_t offset = offsets[static_cast<size_t>(b)];
      const uint64_t fields = static_cast<uint64_t>(offset / 4) | static_cast<uint64_t>(choice.count) << 34 |
                              static_cast<uint64_t>(choice.mode) << 49 | static_cast<uint64_t>(choice.k) << 52;
      std::memcpy(bytes + sizeof header + 8 * b, &fields, sizeof fields);
      codec().encode_block(words + b * kWords, size(b), choice, bytes + payload + offset);
    }
  });
  const uint32_t crc = packed_crc(bytes, total);
  std::memcpy(bytes + kCrcOffset, &crc, sizeof crc);
  return packed;
}

Tensor unpack_ternary_cpu(Tensor packed) {
  const PackedView view("decompress", packed);
  MOE_CHECK(packed_crc(data<uint8_t>(packed), packed.numel()) == view.header().crc,
            "decompress: the packed task vector is damaged: its checksum does not match");
  constexpr int64_t kWords = kTernaryBlock / kTernaryGroup * 2;
  Tensor planes =
      torch::stable::new_empty(packed, {(view.numel() + kTernaryGroup - 1) / kTernaryGroup, 2}, ScalarType::Long);
  uint64_t* words = reinterpret_cast<uint64_t*>(mutable_data<int64_t>(planes));
  std::atomic<int64_t> damaged{-1}, nnz{0};
  parallel_ranges(view.num_blocks(), kBlocksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      if (!view.decode(b, words + b * kWords)) damaged = b;
      nnz += view.count(b);
    }
  });
  MOE_CHECK(damaged < 0 && nnz == static_cast<int64_t>(view.header().nnz), "decompress: block ", damaged.load(),
            " of the packed task vector is damaged");
  return planes;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("count_magnitudes", TORCH_BOX(&moe::count_magnitudes_cpu));
  m.impl("count_window", TORCH_BOX(&moe::count_window_cpu));
  m.impl("delta_moments", TORCH_BOX(&moe::moments_cpu));
  m.impl("select_ternary", TORCH_BOX(&moe::select_ternary_cpu));
  m.impl("end_of_ties", TORCH_BOX(&moe::end_of_ties_cpu));
  m.impl("pack_ternary", TORCH_BOX(&moe::pack_ternary_cpu));
  m.impl("unpack_ternary", TORCH_BOX(&moe::unpack_ternary_cpu));
}
