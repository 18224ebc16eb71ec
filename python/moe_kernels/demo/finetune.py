"""Part 3: a short training of a small mixture of experts, ours against ``grouped_mm``, each in a process of its own.

Processes, because peak memory belongs to a process. :func:`run` starts them and lets them take steps in turn, so that a
busy machine slows all of them alike; the module run as ``python -m moe_kernels.demo.finetune`` is what they execute.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from moe_kernels.demo.settings import FinetuneSettings


def run(settings: FinetuneSettings, seed: int, progress) -> dict:
    """Trains the same model from the same seed on the same windows of text, once with each implementation.

    Returns:
        For each implementation the result of :func:`train` and ``loss_differences``, step by step, to the first one.
    """
    results: dict = {"settings": asdict(settings), "implementations": {}}
    with TemporaryDirectory(prefix="moe_kernels_demo_") as folder:
        workers = {}
        try:
            for implementation in settings.implementations:
                out = Path(folder) / f"{implementation}.json"
                job = {"implementation": implementation, "settings": asdict(settings), "seed": seed, "out": str(out)}
                workers[implementation] = _start(job)
            for implementation, worker in workers.items():
                _wait(implementation, worker)  # until it is ready for its first step
            for _ in progress(range(settings.num_steps), "training"):
                for implementation, worker in workers.items():
                    worker.stdin.write("step\n")
                    worker.stdin.flush()
                    _wait(implementation, worker)
            for implementation, worker in workers.items():
                if worker.wait():
                    raise _failure(implementation, worker)
                out = Path(folder) / f"{implementation}.json"
                results["implementations"][implementation] = json.loads(out.read_text())
        finally:
            for worker in workers.values():
                worker.kill()
                worker.communicate()
    first = results["implementations"][settings.implementations[0]]["losses"]
    for result in results["implementations"].values():
        result["loss_differences"] = [abs(a - b) for a, b in zip(result["losses"], first, strict=True)]
    return results


#: what a worker prints when it is ready for its first step, and after each step
_TURN_IS_OVER = "moe_kernels demo: turn is over"


def _start(job: dict) -> subprocess.Popen:
    command = [sys.executable, "-m", "moe_kernels.demo.finetune", json.dumps(job)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _wait(implementation: str, worker: subprocess.Popen) -> None:
    for line in worker.stdout:
        if line.strip() == _TURN_IS_OVER:
            return
    raise _failure(implementation, worker)


def _failure(implementation: str, worker: subprocess.Popen) -> RuntimeError:
    return RuntimeError(f"demo: training with {implementation} must succeed, got exit code {worker.wait()}")


def _in_turn(steps: list[Tensor]) -> Iterator[Tensor]:
    """Yields ``steps``, each when :func:`run` says so, and tells it when the step is done."""
    for step in steps:
        print(_TURN_IS_OVER, flush=True)
        if not sys.stdin.readline():
            raise SystemExit("demo: the process that started this training is gone")
        yield step
    print(_TURN_IS_OVER, flush=True)


def build_model(settings: FinetuneSettings, seed: int, implementation: str) -> nn.Module:
    """A Qwen3-MoE over bytes with random weights that depend on ``seed`` alone."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

    if implementation == "moe_kernels":
        import moe_kernels.integrations.transformers  # noqa: F401  registers "moe_kernels"
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        moe_intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=settings.hidden_size // 4,
        num_experts=settings.num_experts,
        num_experts_per_tok=settings.top_k,
        norm_topk_prob=True,
        max_position_embeddings=settings.window_size,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation(implementation)
    return model


def batches(text: str, settings: FinetuneSettings, seed: int) -> list[Tensor]:
    """``num_steps`` batches [batch_size, window_size] of bytes from random places in ``text``."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(
        data.numel() - settings.window_size, (settings.num_steps, settings.batch_size), generator=generator
    )
    return [torch.stack([data[s : s + settings.window_size] for s in row]).long() for row in starts.tolist()]


def saved_bytes(model: nn.Module, batch: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch, labels=batch).loss
    del loss
    return sum(storages.values())


def resident_bytes(field: str) -> int | None:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process, or None where the system does not tell.

    Not ``getrusage``'s ru_maxrss: Linux hands the parent's peak down to a child, and ours may have held a whole
    Mixtral layer.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith(field + ":")]
    return int(found[0].split()[1]) * 1024 if found else None


def train(
    settings: FinetuneSettings,
    seed: int,
    implementation: str,
    text: str,
    in_turn: Callable[[list[Tensor]], Iterable[Tensor]] = iter,
) -> dict:
    """Trains with AdamW on the batches that ``in_turn`` yields.

    Returns:
        ``losses`` of each step, median ``step_ms`` and ``tokens_per_second`` of all steps but the first (which warms
        up), ``saved_bytes`` for backward, ``resident_bytes`` before training, ``peak_resident_bytes`` of the process.
    """
    model = build_model(settings, seed, implementation).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, foreach=False)
    steps = batches(text, settings, seed)
    resident = resident_bytes("VmRSS")
    losses, seconds = [], []
    for batch in in_turn(steps):
        begin = time.perf_counter()
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    peak = resident_bytes("VmHWM")
    step_seconds = median(seconds[1:] or seconds)
    return {
        "losses": losses,
        "step_ms": 1e3 * step_seconds,
        "tokens_per_second": steps[0].numel() / step_seconds,
        "saved_bytes": saved_bytes(model, steps[0]),
        "resident_bytes": resident,
        "peak_resident_bytes": peak,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def main() -> None:
    from moe_kernels.demo.text import reference_texts

    job = json.loads(sys.argv[1])
    settings = FinetuneSettings(**job["settings"])
    result = train(settings, job["seed"], job["implementation"], reference_texts().calibration, _in_turn)
    Path(job["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
