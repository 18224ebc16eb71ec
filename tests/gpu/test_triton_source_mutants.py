"""Changes to the source of our Triton kernels that the op's results, or the PTX interpreter, must show."""

# ruff: noqa: E501
import importlib.util
from pathlib import Path

import pytest

from . import triton_on_ptx

if triton_on_ptx.missing_reason() is not None:
    pytest.skip(triton_on_ptx.missing_reason(), allow_module_level=True)

import moe_kernels.ops.permute
import moe_kernels.ops.route

from .exercises import report_of

ROOMS = {"permute": moe_kernels.ops.permute, "route": moe_kernels.ops.route}

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
    # strides
    ("one tile", "token and slot swapped", "* token_stride + (pairs - tokens * top_k).to(tl.int64) * slot_stride",
     "* slot_stride + (pairs - tokens * top_k).to(tl.int64) * token_stride"),
    ("permute", "rows out as far apart as rows in", "row.to(tl.int64) * hidden_size + columns, x", "row.to(tl.int64) * row_stride + columns, x"),
    ("permute", "gradient as far apart as rows", "grad_out_ptr + token * grad_stride", "grad_out_ptr + token * row_stride"),
    ("route", "logits side by side", "experts.to(tl.int64) * expert_stride", "experts.to(tl.int64)"),
]  # fmt: skip


def use(monkeypatch, folder: Path, exercise: str, out: str = "", into: str = "") -> None:
    """Lets ``backend="triton"`` take the changed source of the exercise's room.

    Blocks of columns are short, so that a short row takes several.
    """
    triton_on_ptx.redirect(monkeypatch)
    room = "route" if exercise == "route" else "permute"
    text = Path(ROOMS[room].__path__[0], "triton.py").read_text()
    assert out in text, "the kernel has changed: change the mutant with it"
    changed = folder / f"{room}_changed.py"
    changed.write_text(text.replace(out, into, 1).replace("MAX_BLOCK_HIDDEN = 2048", "MAX_BLOCK_HIDDEN = 128"))
    spec = importlib.util.spec_from_file_location(changed.stem, changed)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(ROOMS[room], "triton", module, raising=False)


@pytest.mark.parametrize("exercise", ["one tile", "two tiles", "permute", "route"])
def test_unchanged_source_passes(exercise, monkeypatch, tmp_path):
    use(monkeypatch, tmp_path, exercise)
    assert report_of(exercise, "triton") == "nothing"


@pytest.mark.parametrize("exercise, what, out, into", MUTANTS, ids=[f"{m[0]}: {m[1]}" for m in MUTANTS])
def test_mutant_is_caught(exercise, what, out, into, monkeypatch, tmp_path):
    use(monkeypatch, tmp_path, exercise, out, into)
    assert report_of(exercise, "triton") != "nothing", f"lives: {what}"
