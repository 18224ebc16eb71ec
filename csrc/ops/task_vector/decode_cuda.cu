// Packed task vectors to bit planes on CUDA. docs/task_vector_format.md has the layout, microkernels/split_rice.h the CPU's
// way: blocks that one refuses the other refuses.
//
// A warp decodes a block of 4096 elements. Of a Rice code's unary part each lane takes a word of 32 bits and writes down
// where its ones are, at places that a scan over the lanes' counts gives; then each lane takes one code, whose field lies
// where its number says, and a second scan over the low parts gives its position. Codes are dealt out evenly and every
// load is of neighbouring words, however the ones lie. Signs behind the positions: a scan over the counts of set bits.
// At 5 % density a block's unary part is 13 words, so a warp is as much as a block can use.
//
// Nothing outside of the bytes is read, whatever they are: a word past the payload counts as zero. A block that is none
// becomes zeros and a count of -1, and a second kernel of one block makes a verdict of the counts. The checksum is not
// looked at here: PackedDelta.from_bytes did that on the host.
#include "ops/task_vector/decode_cuda.h"

#include "common/vec.cuh"
#include "ops/task_vector/packed.h"

namespace moe {
namespace {

constexpr int kWarps = 8;  // blocks of 4096 that a CUDA block decodes
constexpr int kHalves = static_cast<int>(kTernaryBlock) / 32;  // words of 32 bits of a plane
constexpr int kRoundBits = 32 * kWarpSize;  // of a unary part, at once
// No block needs more: 4096 fields of 12 bits, 4096 ones among 4095 zeros, 4096 signs. Bits are then numbered by int.
constexpr int kMostWords = 2048;
constexpr int kVerdictThreads = 1024;

// What a vector may be, but for the number of a damaged block.
constexpr int64_t kWhole = -1, kOtherHeader = -2, kOtherCount = -3;

// The bytes of a vector as words of 32 bits; sizes are those that its number of elements asks for.
struct PackedWords {
  const uint32_t* words;
  int64_t numel, num_blocks, payload, payload_words;
};

// The bits of a block, zeros behind the last word that the payload has.
struct BlockBits {
  const uint32_t* words;
  int num_words;

  __device__ __forceinline__ uint32_t word(int i) const { return i < num_words ? words[i] : 0; }
  // `count` <= 32 bits from any bit on; the bits above them are any
  __device__ __forceinline__ uint32_t at(int bit, int count) const {
    const uint64_t low = word(bit / 32), high = bit % 32 + count > 32 ? word(bit / 32 + 1) : 0;
    return static_cast<uint32_t>((high << 32 | low) >> (bit % 32));
  }
  __device__ __forceinline__ int num_bits() const { return 32 * num_words; }
};

// The planes of a block in shared memory, kHalves words each, and kRoundBits places of ones.
struct WarpMemory {
  uint32_t *nonzero, *negative;
  uint16_t* ones;
};

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x); }

__device__ __forceinline__ int of_last_lane(int x) { return __shfl_sync(kAllLanes, x, kWarpSize - 1); }

__device__ __forceinline__ uint32_t first_bits32(int n) { return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1; }

// Sets the bits of `count` split-Rice codes, whose fields have the sign for their lowest bit if kSigned. Returns the bit
// after the last one, -1 where the codes leave the block or the stream; the same in all lanes, as every argument is.
template <bool kSigned>
__device__ __forceinline__ int decode_codes(const BlockBits& bits, int count, int k, int size, const WarpMemory& memory) {
  const int width = k + kSigned, unary = count * width;
  if (count == 0 || unary >= bits.num_bits()) return -1;
  int found = 0, low = 0, last = 0;
  bool outside = false;
  for (int first_word = unary / 32; found < count; first_word += kWarpSize) {
    if (first_word >= bits.num_words) return -1;
    const int word = first_word + lane_id();
    uint32_t mine = bits.word(word);
    if (word == unary / 32) mine &= ~0u << (unary % 32);
    const int ones = __popc(mine), ones_upto = warp_scan(ones, lane_id());
    for (int place = ones_upto - ones; mine != 0; mine &= mine - 1)
      memory.ones[place++] = static_cast<uint16_t>(32 * word + __ffs(static_cast<int>(mine)) - 1 - unary);
    const int here = min(of_last_lane(ones_upto), count - found);
    __syncwarp();
    for (int first = 0; first < here; first += kWarpSize) {
      const bool is_code = first + lane_id() < here;
      const int i = found + first + lane_id();
      const uint32_t field = is_code ? bits.at(i * width, width) & ((1u << width) - 1) : 0;
      const int low_upto = low + warp_scan(static_cast<int>(field >> kSigned), lane_id());
      if (is_code) {
        const int position = ((memory.ones[first + lane_id()] - i) << k) + low_upto + i;
        if (position < size) {
          atomicOr(memory.nonzero + position / 32, 1u << (position % 32));
          if (kSigned && (field & 1)) atomicOr(memory.negative + position / 32, 1u << (position % 32));
        } else {
          outside = true;
        }
      }
      low = of_last_lane(low_upto);
    }
    found += here;
    if (here > 0) last = memory.ones[here - 1];
    __syncwarp();
  }
  return __any_sync(kAllLanes, outside) ? -1 : unary + last + 1;
}

// The signs of the elements that are not zero, one bit each from `bit` on.
__device__ __forceinline__ void decode_signs(const BlockBits& bits, int bit, const WarpMemory& memory) {
  for (int half = lane_id(); half < kHalves; half += kWarpSize) {
    const uint32_t marks = memory.nonzero[half];
    const int count = __popc(marks), upto = warp_scan(count, lane_id());
    uint32_t signs = bits.at(bit + upto - count, count), negative = 0;
    for (uint32_t rest = marks; rest != 0; rest &= rest - 1, signs >>= 1)
      if (signs & 1) negative |= rest & (~rest + 1);
    memory.negative[half] = negative;
    bit += of_last_lane(upto);
  }
}

// Elements of the block that are not zero, counted.
__device__ __forceinline__ int count_marks(const WarpMemory& memory) {
  int count = 0;
  for (int half = lane_id(); half < kHalves; half += kWarpSize) count += __popc(memory.nonzero[half]);
  return warp_sum(count);
}

// The planes of a block into memory that is zero. False where the block is none.
__device__ __forceinline__ bool decode_block(const BlockBits& bits, PackedMode mode, int count, int k, int size,
                                             const WarpMemory& memory) {
  if (count > size || k > kLargestRice) return false;
  int signs_at = 0;
  switch (mode) {
    case PackedMode::empty: return count == 0;
    case PackedMode::rice: return decode_codes<true>(bits, count, k, size, memory) >= 0;
    case PackedMode::bitmap:
    case PackedMode::all:
      for (int half = lane_id(); half < kHalves; half += kWarpSize)
        memory.nonzero[half] = (mode == PackedMode::all ? ~0u : bits.word(half)) & first_bits32(size - 32 * half);
      if (mode == PackedMode::bitmap) signs_at = size;
      break;
    case PackedMode::rice_of_zeros:
      signs_at = decode_codes<false>(bits, size - count, k, size, memory);
      if (signs_at < 0) return false;
      for (int half = lane_id(); half < kHalves; half += kWarpSize)
        memory.nonzero[half] = ~memory.nonzero[half] & first_bits32(size - 32 * half);
      break;
    default: return false;
  }
  if (signs_at + count > bits.num_bits() || count_marks(memory) != count) return false;
  decode_signs(bits, signs_at, memory);
  return true;
}

__global__ void __launch_bounds__(kWarps* kWarpSize)
    decode_blocks_kernel(PackedWords packed, uint32_t* __restrict__ planes,  // [ceil(numel / 64), 2] words of 64 bits
                         int* __restrict__ counts) {                         // [num_blocks]; -1: damaged
  MOE_SHARED(uint32_t, planes_memory, 2 * kHalves * kWarps);
  MOE_SHARED(uint16_t, ones_memory, kRoundBits * kWarps);
  const int warp = static_cast<int>(threadIdx.y);
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (block >= packed.num_blocks) return;
  uint32_t* const nonzero = planes_memory + 2 * kHalves * warp;
  const WarpMemory memory{nonzero, nonzero + kHalves, ones_memory + kRoundBits * warp};
  for (int i = lane_id(); i < 2 * kHalves; i += kWarpSize) nonzero[i] = 0;
  __syncwarp();
  const uint64_t fields = reinterpret_cast<const uint64_t*>(packed.words)[sizeof(PackedHeader) / 8 + block];
  const int64_t offset = static_cast<int64_t>(fields & ((uint64_t{1} << 34) - 1));
  const int count = static_cast<int>(fields >> 34 & 0x7fff), k = static_cast<int>(fields >> 52 & 15);
  const int64_t left = packed.numel - block * kTernaryBlock, words_left = packed.payload_words - offset;
  const int size = static_cast<int>(left < kTernaryBlock ? left : kTernaryBlock);
  bool whole = words_left >= 0 && fields >> 56 == 0;
  if (whole) {
    const BlockBits bits{packed.words + packed.payload + offset,
                         static_cast<int>(words_left < kMostWords ? words_left : kMostWords)};
    whole = decode_block(bits, static_cast<PackedMode>(fields >> 49 & 7), count, k, size, memory);
  }
  __syncwarp();
  for (int group = lane_id(); group * static_cast<int>(kTernaryGroup) < size; group += kWarpSize) {
    const uint32_t* from = nonzero + 2 * group;
    const uint32_t words[4] = {whole ? from[0] : 0, whole ? from[1] : 0, whole ? from[kHalves] : 0, whole ? from[kHalves + 1] : 0};
    ptx::st_global_v4(planes + block * (2 * kHalves) + 4 * group, words);
  }
  if (lane_id() == 0) counts[block] = whole ? count : -1;
}

// Whether the header is that of such a vector, all blocks are whole and the counts add up to what it says. One block.
__global__ void __launch_bounds__(kVerdictThreads)
    verdict_kernel(PackedWords packed, PackedHeader expected, const int* __restrict__ counts, int64_t* __restrict__ verdict) {
  MOE_SHARED(int64_t, sums, kVerdictThreads / kWarpSize);
  MOE_SHARED(int64_t, firsts, kVerdictThreads / kWarpSize);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
  int64_t sum = 0, first = packed.num_blocks;  // damaged
  for (int64_t block = thread; block < packed.num_blocks; block += kVerdictThreads) {
    const int count = counts[block];
    sum += count;
    if (count < 0 && first == packed.num_blocks) first = block;
  }
  sum = warp_sum(sum);
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    const int64_t other = __shfl_xor_sync(kAllLanes, first, lanes);
    if (other < first) first = other;
  }
  if (thread % kWarpSize == 0) {
    sums[warp] = sum;
    firsts[warp] = first;
  }
  __syncthreads();
  if (thread != 0) return;
  for (int w = 1; w < kVerdictThreads / kWarpSize; ++w) {
    sum += sums[w];
    if (firsts[w] < first) first = firsts[w];
  }
  const PackedHeader& header = *reinterpret_cast<const PackedHeader*>(packed.words);
  bool same = header.numel == expected.numel && header.log2_block == expected.log2_block && header.kind == expected.kind &&
              header.num_blocks == expected.num_blocks && header.payload_offset == expected.payload_offset;
  for (int i = 0; i < 8; ++i) same = same && header.magic[i] == expected.magic[i];
  if (!same)
    *verdict = kOtherHeader;
  else if (first < packed.num_blocks)
    *verdict = first;
  else
    *verdict = sum == static_cast<int64_t>(header.nnz) ? kWhole : kOtherCount;
}

// Launches both kernels; the verdict comes to `verdict`.
Tensor unpack(const DeviceScope& scope, const char* op, const Tensor& given, int64_t numel, int64_t* verdict) {
  MOE_CHECK(given.scalar_type() == ScalarType::Byte && given.dim() == 1 && given.is_contiguous(), op,
            ": a packed task vector must be a contiguous uint8 tensor");
  // a copy has the alignment that the format counts on
  const bool aligned = common_alignment(given.const_data_ptr(), nullptr, 0) == 16;
  const Tensor packed = aligned ? given : torch::stable::clone(given);
  const int64_t num_blocks = ceil_div(numel, kTernaryBlock);
  const int64_t payload = round_up_64(static_cast<int64_t>(sizeof(PackedHeader)) + 8 * num_blocks);
  MOE_CHECK(packed.numel() >= payload + kSpareBytes && packed.numel() % 64 == 0, op,
            ": the packed task vector is cut short or not of ", numel, " elements");
  Tensor planes = torch::stable::new_empty(packed, {ceil_div(numel, kTernaryGroup), 2}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(packed, {num_blocks}, ScalarType::Int);
  const PackedWords words{reinterpret_cast<const uint32_t*>(data<uint8_t>(packed)), numel, num_blocks, payload / 4,
                          (packed.numel() - payload - kSpareBytes) / 4};
  PackedHeader expected{};
  std::memcpy(expected.magic, kPackedMagic, sizeof kPackedMagic);
  expected.numel = static_cast<uint64_t>(numel);
  expected.log2_block = 12;
  expected.kind = static_cast<uint32_t>(PackedKind::ternary);
  expected.num_blocks = static_cast<uint32_t>(num_blocks);
  expected.payload_offset = static_cast<uint64_t>(payload);
  if (num_blocks > 0)
    launch(scope, decode_blocks_kernel, dim3(grid_size(op, ceil_div(num_blocks, kWarps))), dim3(kWarpSize, kWarps), 0, words,
           reinterpret_cast<uint32_t*>(mutable_data<int64_t>(planes)), mutable_data<int>(counts));
  launch(scope, verdict_kernel, dim3(1), dim3(kVerdictThreads), 0, words, expected, data<int>(counts), verdict);
  return planes;
}

struct Verdicts {
  int64_t all[kMaxPacked];
};

Tensor new_verdicts(const Tensor& like) { return torch::stable::new_zeros(like, {kMaxPacked}, ScalarType::Long); }

// Waits for the device.
void check_whole(const DeviceScope& scope, const char* op, const Tensor& verdicts, int num_packed) {
  const Verdicts found = read_back(scope, reinterpret_cast<const Verdicts*>(data<int64_t>(verdicts)));
  for (int i = 0; i < num_packed; ++i) {
    MOE_CHECK(found.all[i] != kOtherHeader, op, ": the bytes are no packed task vector of that many elements, or damaged");
    MOE_CHECK(found.all[i] != kOtherCount, op, ": the packed task vector is damaged: its blocks have another count of elements");
    MOE_CHECK(found.all[i] == kWhole, op, ": block ", found.all[i], " of the packed task vector is damaged");
  }
}

Tensor unpack_ternary_cuda(Tensor packed) {
  const char* op = "decompress";
  MOE_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous() &&
                packed.numel() >= static_cast<int64_t>(sizeof(PackedHeader)),
            op, ": a packed task vector must be a contiguous uint8 tensor of at least 128 bytes");
  const DeviceScope scope(packed);
  struct Octets {
    uint8_t all[8];
  };
  const Octets octets = read_back(scope, reinterpret_cast<const Octets*>(data<uint8_t>(packed) + offsetof(PackedHeader, numel)));
  uint64_t numel;
  std::memcpy(&numel, &octets, sizeof numel);
  MOE_CHECK(numel < (uint64_t{1} << 43), op, ": the header of the packed task vector is damaged");
  const Tensor verdicts = new_verdicts(packed);
  Tensor planes = unpack(scope, op, packed, static_cast<int64_t>(numel), mutable_data<int64_t>(verdicts));
  check_whole(scope, op, verdicts, 1);
  return planes;
}

}  // namespace

std::vector<Tensor> unpack_deltas(const char* op, const std::vector<Tensor>& deltas, int64_t numel) {
  std::vector<Tensor> result = deltas;
  Tensor verdicts;
  int num_packed = 0;
  for (Tensor& delta : result) {
    if (delta.scalar_type() != ScalarType::Byte) continue;
    MOE_CHECK(num_packed < kMaxPacked, op, ": packed deltas must be at most ", kMaxPacked, " on a GPU; call decompress");
    const DeviceScope scope(delta);
    if (num_packed == 0) verdicts = new_verdicts(delta);
    delta = unpack(scope, op, delta, numel, mutable_data<int64_t>(verdicts) + num_packed++);
  }
  if (num_packed > 0) check_whole(DeviceScope(verdicts), op, verdicts, num_packed);
  return result;
}

}  // namespace moe

MOE_CUDA_LIBRARY(m) { m.impl("unpack_ternary", TORCH_BOX(&moe::unpack_ternary_cuda)); }
