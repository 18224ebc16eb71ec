"""Changed kernels must be caught: a bench that lets a mutant live proves nothing about the kernel it came from."""

# ruff: noqa: E501
import pytest

from tests.gpu.shim import library
from tests.gpu.shim.exercise import run

pytestmark = pytest.mark.skipif(library.missing_reason() is not None, reason=str(library.missing_reason()))

PLAN, PERMUTE, ROUTE = "plan_dispatch_cuda.cu", "permute_cuda.cu", "route_cuda.cu"
TASK_VECTOR, DECODE, MERGE = "task_vector_cuda.cu", "decode_cuda.cu", "merge_cuda.cu"
TERNARY, LOGITS = "ternary_linear_cuda.cu", "logit_fusion_cuda.cu"

#: source, what is taken out, what comes in, the build that must see it
MUTANTS = {
    # barriers
    "count: no barrier after zeroing": (PLAN, "counts[e] = 0;\n    __syncthreads();", "counts[e] = 0;", "tsan"),
    "count: no barrier before reading": (
        PLAN, "1);\n    __syncthreads();", "1);", "tsan",
    ),
    "count: atomic made plain": (
        PLAN, "atomicAdd(&counts[experts[i] - first], 1)", "counts[experts[i] - first] += 1", "tsan",
    ),
    "scan: no barrier before reading sums": (
        PLAN, "warp_sums[warp] = inclusive;\n  __syncthreads();", "warp_sums[warp] = inclusive;", "plain",
    ),
    "scan: no barrier after reading sums": (PLAN, "  __syncthreads();\n  *total", "  *total", "tsan"),
    "scatter: no barrier before ranks": (
        PLAN, "histogram[i] = 0;\n    __syncthreads();", "histogram[i] = 0;", "plain",
    ),
    "scatter: no barrier after first rows": (
        PLAN, "    }\n    __syncthreads();\n#pragma unroll\n    for (int i = 0; i < kPairsPerThread; ++i) {\n      if (experts",
        "    }\n#pragma unroll\n    for (int i = 0; i < kPairsPerThread; ++i) {\n      if (experts", "plain",
    ),
    "scatter: first __syncwarp": (
        PLAN, "+ before;\n      __syncwarp();", "+ before;", "plain",
    ),
    "scatter: second __syncwarp": (PLAN, "__popc(same);\n      __syncwarp();", "__popc(same);", "tsan"),
    "backward: no barrier after zeroing": (
        PERMUTE, "partial[i] = 0;\n    __syncthreads();", "partial[i] = 0;", "tsan",
    ),
    "backward: no barrier before the last sum": (
        PERMUTE, "    __syncthreads();\n    if (thread < num_pairs)", "    if (thread < num_pairs)", "plain",
    ),
    "barrier in divergent code": (
        PERMUTE, "    __syncthreads();\n    if (thread < num_pairs) {", "    if (thread < num_pairs) {\n __syncthreads();",
        "plain",
    ),
    "route: group scores read before they are there": (
        ROUTE, "  __syncwarp();\n  // a chosen", "  // a chosen", "tsan",
    ),
    "route: groups read before they are chosen": (
        ROUTE, "  __syncwarp();\n#pragma unroll", "#pragma unroll", "tsan",
    ),
    "undo: no barrier after the sums": (
        TASK_VECTOR, "  }\n  __syncthreads();\n  if (thread < kWarpSize) scan_groups(counts, starts);\n  __syncthreads();\n  int",
        "  }\n  if (thread < kWarpSize) scan_groups(counts, starts);\n  __syncthreads();\n  int", "plain",
    ),
    "undo: no barrier before the strings are read": (
        TASK_VECTOR, "  }\n  __syncthreads();\n  if (thread < kWarpSize) strings", "  }\n  if (thread < kWarpSize) strings", "tsan",
    ),
    "undo: no barrier before the kept": (
        TASK_VECTOR, "  }\n  __syncthreads();\n#pragma unroll\n  for (int v = 0; v < kVecs; ++v) {\n    uint32_t kept",
        "  }\n#pragma unroll\n  for (int v = 0; v < kVecs; ++v) {\n    uint32_t kept", "tsan",
    ),
    "undo: counts read before the warp wrote them": (
        TASK_VECTOR, "    __syncwarp();\n    scan_groups", "    scan_groups", "tsan",
    ),
    "undo: bits written without an atomic": (
        TASK_VECTOR, "atomicOr(string + word, bits << shift)", "string[word] |= bits << shift", "tsan",
    ),
    "decode: ones read before they are written": (
        DECODE, "count - found);\n    __syncwarp();", "count - found);", "tsan",
    ),
    "decode: ones written before they are read": (
        DECODE, "ones[here - 1];\n    __syncwarp();", "ones[here - 1];", "tsan",
    ),
    "decode: planes stored before they are whole": (
        DECODE, "  }\n  __syncwarp();\n  for (int group", "  }\n  for (int group", "tsan",
    ),
    "decode: bits put together without an atomic": (
        DECODE, "atomicOr(memory.nonzero + position / 32, 1u << (position % 32))", "memory.nonzero[position / 32] |= 1u << (position % 32)", "tsan",
    ),
    "verdict: no barrier before the sums are read": (DECODE, "  __syncthreads();\n  if (thread != 0)", "  if (thread != 0)", "tsan"),
    "merge: no barrier before the sums are read": (MERGE, "__syncthreads();\n      if (thread < 2)", "if (thread < 2)", "tsan"),
    "merge: no barrier before all blocks' sums are read": (
        MERGE, "__syncthreads();\n  if (thread >= 2)", "if (thread >= 2)", "tsan",
    ),
    "ternary: no barrier before the parts are added": (TERNARY, "__syncthreads();", "", "tsan"),
    # masks and bounds
    "ternary: rows behind the last": (TERNARY, "i < num_rows ? num_columns : 0", "num_columns", "asan"),
    "ternary: bits of one group": (TERNARY, "if (shift > kTernaryGroup - 8 && group", "if (false && group", "plain"),
    "ternary: planes behind the last group": (TERNARY, "group < num_groups ? planes", "true ? planes", "asan"),
    "ternary: a delta twice counts once": (TERNARY, "factor += weight", "factor = weight", "plain"),
    "ternary: products with others' deltas": (TERNARY, "if (users >> token & 1) ", "", "plain"),
    "ternary: features of one warp": (TERNARY, "for (int w = 0; w < kWarps; ++w) sum", "for (int w = 0; w < 1; ++w) sum", "plain"),
    "ternary: outputs behind the last": (
        TERNARY, "if (token >= x.num_rows || column >= weight.num_rows) continue;", "if (token >= x.num_rows) continue;", "asan",
    ),
    "merge: planes behind the last": (MERGE, "if (!inside) return;", "", "asan"),
    "merge: all equals of the threshold": (MERGE, "< lower + (e < equals ? 0 : 1)", "< lower", "plain"),
    "merge: signs of no sum": (MERGE, "? rule.zero_sign : Acc(1)", "? Acc(0) : Acc(1)", "plain"),
    "merge: no entry agrees": (MERGE, "divisor[e] < 1 ? Acc(1) : divisor[e]", "divisor[e]", "plain"),
    "merge: blocks where nothing waits again": (MERGE, "wanted[blockIdx.x] == 0", "wanted[blockIdx.x] != 0", "plain"),
    "merge: a minority": (MERGE, "signs += (sums", "signs -= (sums", "plain"),
    "merge: what a neighbour kept": (MERGE, "kept[k * kThreads + thread] = ", "kept[k * kThreads + (thread ^ 1)] = ", "plain"),
    "merge: random numbers of a neighbour": (MERGE, "random.words[i];", "random.words[i ^ 1];", "plain"),
    "merge: too little shared memory": (MERGE, "kThreads * 16;", "kThreads * 12;", "asan"),
    "decode: words behind the payload": (DECODE, "return i < num_words ? words[i] : 0", "return words[i]", "asan"),
    "decode: any offset": (DECODE, "bool whole = words_left >= 0 && ", "bool whole = ", "asan"),
    "decode: bits of a descriptor that must be zero": (DECODE, "words_left >= 0 && fields >> 56 == 0", "words_left >= 0", "plain"),
    "decode: positions behind the block": (DECODE, "if (position < size) {", "if (true) {", "asan"),
    "decode: no bound on blocks": (DECODE, "if (block >= packed.num_blocks) return;", "", "asan"),
    "decode: elements behind the last": (DECODE, "(mode == PackedMode::all ? ~0u : bits.word(half)) & first_bits32(size - 32 * half)",
                                         "(mode == PackedMode::all ? ~0u : bits.word(half))", "plain"),
    "decode: zeros behind the last": (DECODE, "~memory.nonzero[half] & first_bits32(size - 32 * half)", "~memory.nonzero[half]", "plain"),
    "decode: counts unlike the bits": (DECODE, " || count_marks(memory) != count", "", "plain"),
    "decode: fields of two words": (DECODE, "bit % 32 + count > 32 ? word(bit / 32 + 1) : 0", "0", "plain"),
    "decode: low parts of one round": (DECODE, "      low = of_last_lane(low_upto);", "", "plain"),
    "decode: signs of one round": (DECODE, "    bit += of_last_lane(upto);", "", "plain"),
    "decode: bits before the unary part": (DECODE, "if (word == unary / 32) mine &=", "if (false) mine &=", "plain"),
    "decode: the header's count not compared": (DECODE, "sum == static_cast<int64_t>(header.nnz) ? kWhole : kOtherCount", "kWhole", "plain"),
    "verdict: the first warp's blocks": (DECODE, "if (firsts[w] < first) first = firsts[w];", "", "plain"),
    "apply: no bound on weights": (TASK_VECTOR, "if (at >= weight.numel) return;", "", "asan"),
    "apply: the last vector whole": (
        TASK_VECTOR, "store_elements(weight, at, w);",
        "*reinterpret_cast<Vec<T, kVecElements<T>>*>(weight.data + at) = w;",
        "asan",
    ),
    "apply: NaN changed": (TASK_VECTOR, "if ((touched >> e & 1) && x == x) w", "if (touched >> e & 1) w", "plain"),
    "undo: NaN changed": (TASK_VECTOR, "if (!(touched >> e & 1) || x != x) continue;\n          w", "if (!(touched >> e & 1)) continue;\n          w", "plain"),
    "undo: scratch of half its size": (TASK_VECTOR, "{64 * num_words}", "{8 * num_words}", "asan"),
    "undo: bits that go on in the next word": (
        TASK_VECTOR, "if (shift != 0 && bits >> (32 - shift) != 0) atomicOr", "if (false) atomicOr", "plain",
    ),
    "undo: the sum of one round alone": (TASK_VECTOR, "int64_t before = base;", "int64_t before = 0;", "plain"),
    "unapply: one lost": (TASK_VECTOR, "? bits_t<T>{0} - 1 : bits_t<T>{1}", "? bits_t<T>{0} : bits_t<T>{1}", "plain"),
    "route: no bound on tokens": (ROUTE, "if (token >= logits.num_tokens) return;", "", "asan"),
    "route: lanes past the last expert": (
        ROUTE, "e < logits.num_experts ? logits.load(token, e) : -kInfinity<Acc>", "logits.load(token, e)", "asan",
    ),
    "route: ties to the highest": (ROUTE, "other_id < id", "other_id > id", "plain"),
    "route: group shared by all warps": (ROUTE, "all_group_scores + threadIdx.y * num_groups", "all_group_scores", "tsan"),
    "route: group memory of one warp": (ROUTE, "? kWarps * num_groups *", "? num_groups *", "asan"),
    "route: backward of null experts": (ROUTE, "id >= 0 && id < num_weighed", "id >= 0 && id < num_experts", "plain"),
    "route: sum of one lane": (ROUTE, "scores.scale = Acc{1} / warp_sum(sum)", "scores.scale = Acc{1} / sum", "plain"),
    "plan: no bound on pairs": (PLAN, "if (pair >= num_pairs) return -1;", "", "asan"),
    "plan: no upper bound on ids": (PLAN, "id >= 0 && id < num_experts", "id >= 0", "asan"),
    "plan: no lower bound on ids": (PLAN, "id >= 0 && id < num_experts", "id < num_experts", "asan"),
    "plan: tail past the end": (
        PLAN, "row >= num_permuted && row < ids.num_pairs", "row >= num_permuted", "asan",
    ),
    "permute: no bound on rows": (PERMUTE, "if (row >= num_rows) return;", "", "asan"),
    "permute: no bound on columns": (PERMUTE, "if (at < vecs_per_row) to[at]", "to[at]", "asan"),
    "permute: skipped rows read": (PERMUTE, "if (owned && at < vecs_per_row)", "if (at < vecs_per_row)", "plain"),
    "unpermute: no bound on columns": (PERMUTE, "if (column >= hidden_size) continue;", "", "asan"),
    "unpermute: no skipped pairs": (PERMUTE, "if (row_of_lane < 0 || row_of_lane >= num_rows) row_of_lane = -1;", "", "asan"),
    # indices and strides
    "permute: output stride of the input": (PERMUTE, "rows + row * vecs_per_row", "rows + row * (vecs_per_row + 1)", "asan"),
    "permute: column shifted": (PERMUTE, "(kVecsPerLane * kWarpSize) + threadIdx.x", "(kVecsPerLane * kWarpSize) + threadIdx.x + 1",
                                "asan"),
    "plan: unstable rank": (PLAN, "((1u << lane) - 1)", "~((2u << lane) - 1)", "plain"),
    "plan: token and slot strides swapped": (
        PLAN, "token * token_stride + (pair - token * top_k) * slot_stride",
        "token * slot_stride + (pair - token * top_k) * token_stride", "asan",
    ),
    "unpermute: weights of the next slot": (PERMUTE, "= topk_weights.load<Acc>(token, k);",
                                            "= topk_weights.load<Acc>(token, k ^ 1);", "plain"),
    "backward: one warp left out": (PERMUTE, "for (int w = 0; w < kWarps; ++w) inner", "for (int w = 1; w < kWarps; ++w) inner",
                                    "plain"),
    "backward: half of the warp's sum": (PERMUTE, "inner = warp_sum(inner);", "inner += __shfl_xor_sync(kAllLanes, inner, 1);",
                                         "plain"),
    "backward: rows of nobody not zeroed": (PERMUTE, "if (source >= 0 && source < num_tokens) continue;", "continue;", "plain"),
    # memory
    "scatter: histogram one warp short": (
        PLAN, "histogram, kWarps * kExpertsAtOnce", "histogram, (kWarps - 1) * kExpertsAtOnce", "plain",
    ),
    "scan: sums one warp short": (PLAN, "warp_sums, kScanThreads / kWarpSize", "warp_sums, kScanThreads / kWarpSize - 1", "asan"),
    "launch: too many threads": (PLAN, "constexpr int kScanThreads = 1024", "constexpr int kScanThreads = 2048", "plain"),
    "launch: a block short": (PERMUTE, "ceil_div(num_rows, kWarps)", "num_rows / kWarps", "plain"),
    # logits
    "logits: tokens past the last": (LOGITS, "static_cast<unsigned>(token_of(first, j) < f.vocab_size) << j", "1u << j", "asan"),
    "logits: the last vector whole": (LOGITS, "source.aligned && first + kVec <= vocab_size", "source.aligned", "asan"),
    "logits: rows that are not there read": (LOGITS, "if (state.broken) kept = 0;", "", "asan"),
    "logits: a maximum of some lanes": (
        LOGITS, "lanes /= 2) {\n    const Acc other = __shfl_xor_sync(kAllLanes, x, lanes);\n    x = other > x",
        "lanes /= 4) {\n    const Acc other = __shfl_xor_sync(kAllLanes, x, lanes);\n    x = other > x", "plain",
    ),
    "logits: a scan that counts itself": (LOGITS, "before + (upto - sum)", "before + upto", "plain"),
    "logits: records of the first row": (LOGITS, "const of_row = records + row * num_blocks;", "const of_row = records;", "plain"),
    "logits: a product's rounding": (LOGITS, " + fmaf(a, b, -product)", "", "plain"),
    "logits: what breaks a whole source": (LOGITS, "bad |= whole.values[kTop] == kInfinity<Acc>;", "", "plain"),
    "logits: nothing left out": (LOGITS, "if (!(z[j] >= state.keep_bound))", "if (false)", "plain"),
    "logits: the anchor's weight alone": (LOGITS, "low[j], state.weight_sum, anchor[j])", "low[j], anchor_weight, anchor[j])", "plain"),
    "logits: the filter's floor alone": (LOGITS, "smallest < kInfinity<Acc> && smallest > first", "false", "plain"),
}  # fmt: skip


@pytest.mark.parametrize("flavour", ["plain", "asan", "tsan", "ucontext"])
def test_kernels_are_right_in_every_build(flavour):
    process = run(flavour)
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, tmp_path):
    file, out, into, flavour = MUTANTS[name]
    (source,) = (path for path in library.cuda_sources() if path.name == file)
    text = source.read_text()
    assert out in text, "the kernel has changed: change the mutant with it"
    changed = tmp_path / file
    changed.write_text(text.replace(out, into, 1))
    process = run(flavour, changed)
    assert process.returncode != 0, f"lives: {name}"
    print(*(process.stdout + process.stderr).splitlines()[-12:], sep="\n")
