"""Changes to the source of our Triton kernels that the op's results, or the PTX interpreter, must show."""

# ruff: noqa: E501
import importlib.util
import re
from pathlib import Path

import pytest

from . import triton_on_ptx

if triton_on_ptx.missing_reason() is not None:
    pytest.skip(triton_on_ptx.missing_reason(), allow_module_level=True)

import moe_kernels.ops.expert_ffn
import moe_kernels.ops.grouped_gemm
import moe_kernels.ops.logit_fusion
import moe_kernels.ops.merge
import moe_kernels.ops.permute
import moe_kernels.ops.route
import moe_kernels.ops.routed_lora
import moe_kernels.ops.task_vector
import moe_kernels.ops.ternary_linear

from .exercises import report_of

ROOMS = {
    name: getattr(moe_kernels.ops, name)
    for name in (
        "permute",
        "route",
        "grouped_gemm",
        "expert_ffn",
        "merge",
        "ternary_linear",
        "task_vector",
        "routed_lora",
        "logit_fusion",
    )
}

#: exercise -> room and file, where they are not the exercise's own room and triton.py
FILES = {
    "unpack": ("task_vector", "unpack_triton"),
    "lora halves": ("routed_lora", "triton"),
    "lora parts": ("routed_lora", "triton"),
    "lora dropout": ("routed_lora", "triton"),
    "logit_fusion bounds": ("logit_fusion", "triton"),
    "logit_fusion rows": ("logit_fusion", "triton"),
}

#: exercise, what is changed, what is taken out, what comes in; the first place that has it
MUTANTS = [
    # masks
    ("one tile", "ids past the last pair", "mask=pairs < num_pairs, other=-1)", ")"),
    ("one tile", "ids past the last expert", "(ids >= 0) & (ids < num_experts)", "ids >= 0"),
    ("one tile", "negative ids", "(ids >= 0) & (ids < num_experts)", "ids < num_experts"),
    ("one tile", "counts past the last expert", "counts, mask=experts < num_experts)", "counts)"),
    ("one tile", "rows past the last pair", "tl.where(owned, rows, -1), mask=inside)", "tl.where(owned, rows, -1))"),
    ("one tile", "rows of nobody left as they were", "mask=inside & (pairs >= num_permuted)", "mask=inside & (pairs > num_permuted)"),
    ("permute", "skipped rows read", "columns, mask=inside & owned, other=0)\n    tl.store", "columns, mask=inside, other=0)\n    tl.store"),
    ("permute", "columns past the last", "columns, x, mask=inside)", "columns, x)"),
    ("permute", "skipped pairs read", "owned = (row >= 0) & (row < num_rows)", "owned = row < num_rows"),
    ("permute", "rows of nobody without a gradient", "zeros, mask=inside & nobodys)", "zeros, mask=inside & nobodys & owned)"),
    ("route", "logits past the last expert", "mask=inside, other=float(\"-inf\")", ""),
    ("route", "weights past the last slot", "weights * scaling_factor, mask=picks < top_k)", "weights * scaling_factor)"),
    # indices
    ("one tile", "an offset too late", "base + tl.cumsum(counts, 0)", "base + tl.cumsum(counts, 0) - counts"),
    ("two tiles", "a scan that counts itself", "tl.cumsum(in_tile, 0) - in_tile", "tl.cumsum(in_tile, 0)"),
    ("one tile", "ranks that count themselves", "others[None, :] < places[:, None]", "others[None, :] <= places[:, None]"),
    ("one tile", "an unstable rank", "others[None, :] < places[:, None]", "others[None, :] > places[:, None]"),
    ("two tiles", "the first block of experts alone", "tl.program_id(1) * BLOCK_EXPERTS", "0 * BLOCK_EXPERTS"),
    ("two tiles", "rows of the tile before", "if not ONE_TILE:", "if ONE_TILE:"),
    ("permute", "the next row", "tl.load(source_rows_ptr + row)", "tl.load(source_rows_ptr + row + 1)"),
    ("permute", "the weight of the first slot", "tl.cast(k, tl.int64) * weights_slot_stride", "0 * weights_slot_stride"),
    ("permute", "products of the last block alone", "products += grad * x", "products = grad * x"),
    ("permute", "one pair less", "for k in range(top_k):", "for k in range(top_k - 1):"),
    ("route", "ties to the highest", "tl.min(tl.where(values == best, ids, 0x7FFFFFFF), 0)", "tl.max(tl.where(values == best, ids, -1), 0)"),
    ("route", "one group less", "for group in range(num_groups):", "for group in range(num_groups - 1):"),
    ("route", "the same expert twice", "choice = tl.where(experts == expert, float(\"-inf\"), choice)", "choice = choice"),
    ("route", "half of softmax's gradient", "(grad_scores - tl.sum(grad_scores * scores, 0))", "grad_scores"),
    # products
    ("grouped_gemm", "columns past the last", "mask=inside[:, None] & c_inside[None, :])", "mask=inside[:, None])"),
    ("grouped_gemm", "rows of the next expert", "    inside = rows < end\n    columns = column_block", "    inside = rows < num_rows\n    columns = column_block"),
    ("grouped_gemm", "depth past the last", "mask=x_inside[:, None] & inside[None, :], other=0)", "mask=x_inside[:, None], other=0)"),
    ("grouped_gemm", "the tile after the last", "if expert >= num_experts:\n        return\n    rows", "if expert > num_experts:\n        return\n    rows"),
    ("grouped_gemm", "every tile the first", "(tile - upto + tiles) * BLOCK_ROWS", "0 * BLOCK_ROWS"),
    ("grouped_gemm", "a tail unwritten", "mask=(columns < num_columns) & (not owned)", "mask=(columns < num_columns) & owned"),
    ("grouped_gemm", "the first rows' outer products alone", "for first in range(begin, end, BLOCK_ROWS):\n        rows = first + tl.arange(0, BLOCK_ROWS)\n        inside = rows < end\n        if CHUNK", "for first in range(begin, begin + 1, BLOCK_ROWS):\n        rows = first + tl.arange(0, BLOCK_ROWS)\n        inside = rows < end\n        if CHUNK"),
    ("grouped_gemm", "the bias of expert 0", "bias_ptr + expert.to(tl.int64) * bias_expert_stride", "bias_ptr + 0 * bias_expert_stride"),
    ("expert_ffn", "up for gate", "(both // BLOCK_COLUMNS).to(tl.int64) * up_offset", "(1 - both // BLOCK_COLUMNS).to(tl.int64) * up_offset"),
    ("expert_ffn", "a clamp forgotten", "x = _at_most(gate, GATE_LIMIT)", "x = gate"),
    ("expert_ffn", "a gradient beyond the clamp", "(gate > _constant(GATE_LIMIT, gate)) | ", ""),
    ("expert_ffn", "an activation without its weight", "(weights * a * factor)", "(a * factor)"),
    ("expert_ffn", "one part of a weight's gradient", "mask=owned & (parts < num_parts)", "mask=owned & (parts < 1)"),
    ("expert_ffn", "no bias in a weight's gradient", "HAS_BIAS=down_bias is not None, ACC", "HAS_BIAS=False, ACC"),
    ("expert_ffn", "skipped tokens read", "x_inside = (sources >= 0) & (sources < num_tokens)", "x_inside = sources < num_tokens"),
    ("merge", "a product that is not rounded", "enable_fp_fusion=False", "enable_fp_fusion=True"),
    ("merge", "a quotient that is not the nearest", "return tl.div_rn(a, b)", "return a * (1.0 / b)"),
    ("merge", "words of four elements in another order", "tl.join(tl.join(a, c), tl.join(b, d))", "tl.join(tl.join(a, b), tl.join(c, d))"),
    ("merge", "the same random numbers in each block", "at = first // 4 + tl.arange", "at = 0 * first + tl.arange"),
    ("merge", "entries at the bound", "(magnitude > lower) | ((magnitude == lower)", "(magnitude >= lower) | ((magnitude == lower)"),
    ("merge", "the largest kept", "kept &= (magnitude < upper)", "kept &= (magnitude <= upper)"),
    ("merge", "a sum of zero elects nothing", "plus = elected >= 0", "plus = elected > 0"),
    ("merge", "undecided elements not counted", "tl.sum(tl.where(elected == 0, some, 0), 0)", "tl.sum(some, 0) * 0"),
    ("merge", "elements past the last", "total.to(out_ptr.dtype.element_ty), mask=elements < numel)", "total.to(out_ptr.dtype.element_ty))"),
    ("merge", "signs of a vector forgotten", "tl.where(negative != 0, -scale, scale)", "scale"),
    ("ternary_linear", "the next row's features", "in_row = first + features < in_features", "in_row = first + features < in_features + 64"),
    ("ternary_linear", "one word of two", "(low >> shift) | ((high << 1) << (31 - shift))", "low >> shift"),
    ("ternary_linear", "words past the last group", "mask=wanted & (bit // 64 < num_groups), other=0)", ")"),
    ("ternary_linear", "signs of the nonzero word", "planes_ptrs[e] + 2, bit", "planes_ptrs[e], bit"),
    ("ternary_linear", "tokens without the delta", "tl.where((used > 0)[:, None], sums + factor[:, None] * products, sums)", "sums + factor[:, None] * products"),
    ("ternary_linear", "the sums of the first launch", "HAS_SUMS=number > 0", "HAS_SUMS=False"),
    ("ternary_linear", "the bias in every launch", "HAS_BIAS=last and bias is not None", "HAS_BIAS=bias is not None"),
    ("ternary_linear", "columns past the last", "both_inside = inside[:, None] & c_inside[None, :]", "both_inside = inside[:, None]"),
    ("ternary_linear", "the delta used last counts", "factors + weight * of_delta", "weight * of_delta"),
    ("unpack", "bits before the payload", "mask=wanted & (at >= 0) & (at < limit), other=0)", "mask=wanted & (at < limit + 1024), other=0)"),
    ("unpack", "ones of the chunks before", "rank = before + tl.cumsum", "rank = tl.cumsum"),
    ("unpack", "low parts of the chunks before", "low_before += tl.sum(low, 0)", "low_before += 0 * tl.sum(low, 0)"),
    ("unpack", "a low part without its own", "low_before + tl.cumsum(low, 0) + rank", "low_before + tl.cumsum(low, 0) - low + rank"),
    ("unpack", "ones that are no codes", "coded = (bits != 0) & (rank < number)", "coded = bits != 0"),
    ("unpack", "positions that leave the block", "whole &= tl.sum((coded & (position >= size)).to(tl.int32), 0) == 0", "whole &= number > 0"),
    ("unpack", "signs of the zeros", "nonzero = tl.where(mode == 4, 1 - zeros, 1)", "nonzero = tl.where(mode == 4, zeros, 1)"),
    ("unpack", "signs from the first bit", "        signs_at = end", "        signs_at = unary"),
    # adapters
    ("routed_lora", "ids past the last adapter are nobody's", "tl.where((ids >= 0) & (ids < num_adapters), ids, num_adapters)", "tl.where(ids >= 0, ids, num_adapters)"),
    ("routed_lora", "negative ids are nobody's", "tl.where((ids >= 0) & (ids < num_adapters), ids, num_adapters)", "tl.where(ids < num_adapters, ids, num_adapters)"),
    ("routed_lora", "ids past the last adapter", "tl.where((ids >= 0) & (ids < num_adapters), ids, -1)", "tl.where(ids >= 0, ids, -1)"),
    ("routed_lora", "an adapter of rank 0", "mask=ids >= 0, other=0) > 0, ids, -1)", "mask=ids >= 0, other=0) >= 0, ids, -1)"),
    ("routed_lora", "an adapter forgotten", "adapter = next_adapter(ids, adapter)", "adapter = next_adapter(ids, adapter + 1)"),
    ("routed_lora", "tokens without adapters are nobody's", "Pairs((num_adapters + 1, triton", "Pairs((num_adapters, triton"),
    ("routed_lora", "tokens without adapters are not sorted", "num_tiles(num_pairs, num_adapters + 1, tile)", "num_tiles(num_pairs, 0, tile)"),
    ("routed_lora", "a place too late", "tl.cumsum(here.to(tl.int32), 0) - 1 - first", "tl.cumsum(here.to(tl.int32), 0) - 2 - first"),
    ("routed_lora", "the first tile again", "tl.cumsum(here.to(tl.int32), 0) - 1 - first", "tl.cumsum(here.to(tl.int32), 0) - 1"),
    ("routed_lora", "pairs of the next adapter", "mask=places < end, other=num_pairs)", "mask=places < num_pairs, other=num_pairs)"),
    ("routed_lora", "the first slot's ids", "(pairs % top_k).to(tl.int64) * slot_stride", "(pairs % top_k).to(tl.int64) * 0"),
    ("routed_lora", "rows past the rank", "inside = (rows < rank)[:, None] & (columns < num_columns)", "inside = (columns < num_columns)"),
    ("routed_lora", "a row that is not there times infinity", "tl.store(v_ptrs, tl.where(of_rank, v, 0)", "tl.store(v_ptrs, v"),
    ("routed_lora", "an infinite weight times a row that is not there", "tl.where(of_rank, v * coefficients[:, None], 0)", "v * coefficients[:, None]"),
    ("routed_lora", "an infinite weight times a slot's row that is not there", "here[:, :, None] & (rows < rank)[None, None, :], v, 0)", "here[:, :, None], v, 0)"),
    ("routed_lora", "packed rows from the first on", "offset = start.to(tl.int64) * row_stride", "offset = start.to(tl.int64) * 0"),
    ("routed_lora", "another adapter's infinity", "sums = tl.where(owners[:, None], sums + part, sums)  # zero", "sums = sums + part  # zero"),
    ("routed_lora", "a token without an adapter loses its base", "sums, mine & (rank > 0), mine", "sums, mine, mine"),
    ("routed_lora", "a token without adapters loses its base", "tl.max(ids, 1) >= 0, tokens", "tl.max(ids, 1) >= -1, tokens"),
    ("routed_lora", "products saved for the first token", "tokens.to(tl.int64)[:, None] * max_rank + rows[None, :]\n    of_rank", "tokens.to(tl.int64)[:, None] * 0 + rows[None, :]\n    of_rank"),
    ("routed_lora", "columns past the last", "(columns < num_columns)[None, :]\n    out = sums", "(columns < num_columns + 1)[None, :]\n    out = sums"),
    ("routed_lora", "no scaling", "if HAS_SCALING:\n        coefficients *=", "if HAS_SCALING:\n        coefficients = 0 +"),
    ("routed_lora", "the first tile's gradient alone", "total += tl.dot(tl.trans(v), x", "total = tl.dot(tl.trans(v), x"),
    ("routed_lora", "a gradient of everybody's tokens", "v = tl.sum(tl.load(v_ptrs, mask=here[:, :, None] & r_inside", "v = tl.sum(tl.load(v_ptrs, mask=(ids >= 0)[:, :, None] & r_inside"),
    ("lora halves", "half of the slots", "v_ptr + pairs.to(tl.int64)[:, None] * max_rank", "v_ptr + (pairs // 2 * 2).to(tl.int64)[:, None] * max_rank"),
    ("lora halves", "rows past the rank written", "tl.store(v_ptrs, products, mask=mine[:, None] & (rows < rank)[None, :])", "tl.store(v_ptrs, products, mask=mine[:, None])"),
    ("lora halves", "weights forgotten", "v = v * coefficients[:, :, None]", "v = v"),
    ("lora halves", "the first rows again", "rows = first + tl.arange(0, RANKS)", "rows = 0 * first + tl.arange(0, RANKS)"),
    ("lora halves", "the first rows' products again", "tl.program_id(2) * RANKS + tl.arange(0, RANKS)", "0 * RANKS + tl.arange(0, RANKS)"),
    ("lora parts", "bits of a product forgotten", "sums = tl.dot(low, b, sums, out_dtype=ACC)", "sums += 0"),
    ("lora parts", "more bits of a product forgotten", "sums = tl.dot(middle, b, sums, out_dtype=ACC)", "sums += 0"),
    ("lora parts", "bits of a float16's product forgotten", "sums = tl.dot(middle, wide, sums", "sums += 0 * tl.dot(middle, wide, sums"),
    ("lora parts", "infinity less infinity", "rest = tl.where(tl.abs(v) == float(\"inf\"), 0, v - high)", "rest = v - high"),
    ("lora dropout", "one mask for all tokens", "random_bits(tl.load(seed_ptr), token, first", "random_bits(tl.load(seed_ptr), token * 0, first"),
    ("lora dropout", "the first block's mask again", "token, first, COLUMNS)", "token, first * 0, COLUMNS)"),
    ("lora dropout", "columns past the last", "columns, out, mask=columns < length)", "columns, out)"),
    ("lora dropout", "the dropped kept", "tl.where(words < tl.full((), BELOW, tl.uint32), 0, x)", "tl.where(words < tl.full((), BELOW, tl.uint32), x, 0)"),
    ("lora dropout", "columns side by side", "columns * x_column_stride", "columns"),
    # logits
    ("logit_fusion", "logits past the last token", "z, mask=tokens < vocab_size)\n        elif", "z)\n        elif"),
    ("logit_fusion", "tokens past the last", "kept = tokens < vocab_size", "kept = tokens < vocab_size + 1"),
    ("logit_fusion", "every tile the first", "blocks, tokens = _tile(tile, BLOCK, BLOCKS)\n        z, low", "blocks, tokens = _tile(0 * tile, BLOCK, BLOCKS)\n        z, low"),
    ("logit_fusion", "no temperature", "divisor = tl.where(temperature == 0, 1, temperature) + zeros", "divisor = zeros + 1"),
    ("logit_fusion", "a row without the blocks' distances", "z += _beside(_shift(of_block[0]), of_block[1], top, top_low)[:, None]", "z += 0 * top"),
    ("logit_fusion", "block sums as they are", "tl.sum(sums * tl.exp(_beside(tops, lows, top, top_low)), 0), 1)", "tl.sum(sums, 0), 1)"),
    ("logit_fusion", "an absent token of negative weight", "                absent |= x == -_INF\n", "                absent |= (x == -_INF) & (weight > 0)\n"),
    ("logit_fusion", "the anchor not alone", "alone |= (x == -_INF) & (weight < 0)", "alone |= (x == -_INF) & (weight > 1)"),
    ("logit_fusion bounds", "what is not read", "tokens, kept & (weight != 0), NUM_SOURCES", "tokens, kept, NUM_SOURCES"),
    ("logit_fusion", "a draw of the request's lower half", "_word(request >> 32)", "_word(request)"),
    ("logit_fusion", "a draw without its step", "_word(zero + step)", "_word(zero)"),
    ("logit_fusion", "tokens of the blocks before", "reached = before + tl.cumsum", "reached = tl.cumsum"),
    ("logit_fusion", "a block's sum in its own scale", "0) * scale > target", "0) > target"),
    ("logit_fusion bounds", "a mixture's sum in its blocks' scale", "tl.sum(sums * tl.exp(tops - _shift(top)), 0)", "tl.sum(sums, 0)"),
    ("logit_fusion bounds", "a mixture without weights", "(tl.log(tl.where(weight > 0, weight, 1)) - log_sum)", "(0 - log_sum)"),
    ("logit_fusion bounds", "terms in the first one's scale", "z = z * tl.exp(top - _shift(new_top)) + tl.exp", "z = z + tl.exp"),
    ("logit_fusion bounds", "no mask", "kept &= (anchor >= top + tl.load(mask_ptr))", "kept &= (anchor >= top - 1e30)"),
    ("logit_fusion bounds", "no floor", "x = tl.where((weight < 0) & (x < floor), floor, x)", "x = x"),
    ("logit_fusion bounds", "the largest of what is past the row", "tops = tl.max(tl.where(inside, x, -_INF), 1)", "tops = tl.max(x, 1)"),
    ("logit_fusion bounds", "the floor of the filter alone", "floor = tl.maximum(floor, tl.where(smallest < _INF, smallest, -_INF))", "floor = tl.maximum(floor, -_INF)"),
    ("logit_fusion bounds", "a floor at -inf", "tl.min(tl.where(inside & (x > -_INF), x, _INF), 1)", "tl.min(tl.where(inside, x, _INF), 1)"),
    ("logit_fusion bounds", "the floor of what is past the row", "tl.min(tl.where(inside & (x > -_INF), x, _INF), 1)", "tl.min(tl.where(x > -_INF, x, _INF), 1)"),
    ("logit_fusion bounds", "nothing left out", "HAS_KEEP=bool(keep)", "HAS_KEEP=False"),
    ("logit_fusion rows", "blocks past the last", "sums = tl.load(sums_ptr + at, mask=inside, other=0)", "sums = tl.load(sums_ptr + at)"),
    ("logit_fusion rows", "what rounding lost", "low = (tl.fma(-quotient, divisor, z) + low) / divisor", "low = zeros"),
    ("logit_fusion rows", "a product's rounding", " + tl.fma(a, b, -product)", ""),
    ("logit_fusion rows", "ties to the highest", "token = tl.min(tl.where(z == largest, tokens, 0x7FFFFFFF), 0)", "token = tl.max(tl.where(z == largest, tokens, -1), 0)"),
    ("logit_fusion rows", "ties to the last block", "block = tl.min(tl.where(tops == top, blocks, num_blocks - 1), 0)", "block = tl.max(tl.where(tops == top, blocks, 0), 0)"),
    ("logit_fusion rows", "+inf is a number", "bad |= (x != x) | (x == _INF)", "bad |= x != x"),
    ("logit_fusion rows", "a broken row's other logits", "mask=(tokens < vocab_size) & (top == _INF))", "mask=(tokens < 0) & (top == _INF))"),
    ("logit_fusion rows", "rows past the last", "(at >= 0) & (at < num_source_rows)", "at >= 0"),
    ("logit_fusion rows", "rows side by side", "at * inputs[1][k] + tokens", "at * 1100 + tokens"),
    ("logit_fusion rows", "a negative temperature", " | (temperature < 0)", ""),
    ("logit_fusion rows", "a mixture's negative weight", "bad |= weights < 0", "bad |= weights < -2"),
    ("logit_fusion rows", "no token at temperature 0", "token = tl.where(greedy, token, _first", "token = tl.where(greedy, -1, _first"),
    # strides
    ("one tile", "token and slot swapped", "* token_stride + (pairs - tokens * top_k).to(tl.int64) * slot_stride",
     "* slot_stride + (pairs - tokens * top_k).to(tl.int64) * token_stride"),
    ("permute", "rows out as far apart as rows in", "row.to(tl.int64) * hidden_size + columns, x", "row.to(tl.int64) * row_stride + columns, x"),
    ("permute", "gradient as far apart as rows", "grad_out_ptr + token * grad_stride", "grad_out_ptr + token * row_stride"),
    ("routed_lora", "the base's columns side by side", "columns.to(tl.int64)[None, :] * base_column_stride", "columns.to(tl.int64)[None, :]"),
    ("routed_lora", "ids of the weights' strides", "num_tokens, num_adapters, 1, ids_token_stride, 0, FEW", "num_tokens, num_adapters, 1, weights_token_stride, 0, FEW"),
    ("route", "logits side by side", "experts.to(tl.int64) * expert_stride", "experts.to(tl.int64)"),
]  # fmt: skip


def use(monkeypatch, folder: Path, exercise: str, out: str = "", into: str = "") -> None:
    """Lets ``backend="triton"`` take the changed source of the exercise's room.

    Blocks of columns are short, so that a short row takes several, and fewer pairs are many.
    """
    triton_on_ptx.redirect(monkeypatch)
    room, file = FILES.get(exercise, (exercise if exercise in ROOMS else "permute", "triton"))
    source = Path(ROOMS[room].__path__[0])
    text = (source / f"{file}.py").read_text()
    # what the kernels share is in the file too
    shared = rf"from moe_kernels.ops.{room}.(\w+_triton) import \(.*?\)\n"
    text = re.sub(shared, lambda found: (source / f"{found[1]}.py").read_text(), text, flags=re.DOTALL)
    assert out in text, "the kernel has changed: change the mutant with it"
    changed = folder / f"{room}_changed.py"
    text = text.replace(out, into, 1).replace("MAX_BLOCK_HIDDEN = 2048", "MAX_BLOCK_HIDDEN = 128")
    text = text.replace("FEW_PAIRS = 512", "FEW_PAIRS = 64")
    # an op is defined once a process: the changed functions are called as they are
    text = text.replace("from moe_kernels._opaque import opaque", "opaque = lambda name, function: function")
    changed.write_text(text)
    spec = importlib.util.spec_from_file_location(changed.stem, changed)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(ROOMS[room], file, module, raising=False)


@pytest.mark.parametrize(
    "exercise",
    [
        "one tile",
        "two tiles",
        "permute",
        "route",
        "grouped_gemm",
        "expert_ffn",
        "merge",
        "ternary_linear",
        "unpack",
        "routed_lora",
        "lora halves",
        "lora dropout",
        "lora parts",
        "logit_fusion",
        "logit_fusion bounds",
        "logit_fusion rows",
    ],  # fmt: skip
)
def test_unchanged_source_passes(exercise, monkeypatch, tmp_path):
    use(monkeypatch, tmp_path, exercise)
    assert report_of(exercise, "triton") == "nothing"


@pytest.mark.parametrize("exercise, what, out, into", MUTANTS, ids=[f"{m[0]}: {m[1]}" for m in MUTANTS])
def test_mutant_is_caught(exercise, what, out, into, monkeypatch, tmp_path):
    use(monkeypatch, tmp_path, exercise, out, into)
    assert report_of(exercise, "triton") != "nothing", f"lives: {what}"
