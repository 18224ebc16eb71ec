"""Runs benchmarks: ``python benchmarks/run.py --op expert_ffn --shape A --dtype bf16 --tokens 1 4 16``.

``--list`` names everything there is. README.md beside this file says what each number means.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
# this folder's modules have everyday names (timing, limits, ops): they are only to be found as benchmarks.*
sys.path[:] = [str(_HERE.parent)] + [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]

_DTYPES = ("fp32", "bf16", "fp16")
_DEVICES = ("cpu", "cuda")
#: device -> samples of a provider and seconds for it, in one cell
_SAMPLING = {"cpu": (9, 4.0), "cuda": (50, 0.2)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", default=["expert_ffn"], help="ops, or 'all'")
    parser.add_argument("--shape", nargs="+", help="named shapes (each op has defaults)")
    parser.add_argument("--dtype", nargs="+", choices=_DTYPES)
    parser.add_argument("--tokens", nargs="+", type=int, help="numbers of tokens")
    parser.add_argument("--device", choices=_DEVICES, default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--providers", help="comma-separated; default: all that are installed, bar the slowest")
    parser.add_argument("--repeats", type=int, help="clean samples wanted of each provider; default 9, on a GPU 50")
    parser.add_argument("--budget", type=float, help="seconds for one provider in one cell; default 4, on a GPU 0.2")
    parser.add_argument(
        "--csv", type=Path, help="history to append to; default results/<op>.csv, on a GPU results/<op>_cuda.csv"
    )
    parser.add_argument("--no-csv", action="store_true", help="print only")
    parser.add_argument(
        "--refuse-on-red",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="do not time one of our own providers whose result is wrong (default)",
    )
    parser.add_argument(
        "--bars", nargs="+", type=Path, metavar="CSV", help="time nothing; judge the newest run of each cell in these"
    )
    parser.add_argument("--list", action="store_true", help="ops, shapes and providers, with what is missing and why")
    return parser


def _defaults(module, device: str) -> dict | None:
    """An op's shapes, dtypes and tokens on a device, None where it is not measured there."""
    return module.DEFAULTS if device == "cpu" else getattr(module, "GPU_DEFAULTS", None)


def _limits(device: str, threads: int):
    """The probe, what it measured, and why there is none."""
    from benchmarks import limits, limits_cuda

    try:
        if device == "cuda":
            return None, limits_cuda.measure(), ""
        probe = limits.Probe()
        return probe, probe.measure(threads), ""
    except (RuntimeError, OSError) as error:
        return None, None, str(error)


def _list(console, op_modules: dict) -> None:
    from benchmarks.providers import PROVIDERS
    from benchmarks.shapes import SHAPES

    console.print("ops")
    for name, module in op_modules.items():
        console.print(f"  {name:18} {module.SUMMARY}")
        for device in _DEVICES:
            defaults = _defaults(module, device)
            if defaults is not None:
                said = ", ".join(f"{key} {' '.join(map(str, values))}" for key, values in defaults.items())
                console.print(f"  {'':18} {device}: {said}", style="dim")
        console.print(f"  {'':18} providers {' '.join(module.PROVIDER_NAMES)}", style="dim")
    console.print("\nshapes (hidden, intermediate, experts, top_k)")
    for shape in SHAPES.values():
        sizes = f"{shape.hidden_size}, {shape.intermediate_size}, {shape.num_experts}, {shape.top_k}"
        console.print(f"  {shape.name:22} {sizes:22} {shape.model}")
    console.print("\nproviders of expert_ffn")
    for provider in PROVIDERS.values():
        reason = provider.missing()
        state = f"missing: {reason}" if reason else f"{provider.distribution} {provider.version()}"
        console.print(f"  {provider.name:24} {provider.what} ({', '.join(provider.devices)})")
        console.print(f"  {'':24} {state}", style="yellow" if reason else "dim")


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where one of our own results was wrong, else 0."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error("--threads must be at least 1")
    # read by OpenMP when torch is loaded, and by the peers' own runtimes
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)

    import torch
    from rich.console import Console
    from tqdm import tqdm

    from benchmarks import bars, harness, report
    from benchmarks.ops import OPS
    from benchmarks.shapes import SHAPES
    from benchmarks.timing import Gate

    torch.set_num_threads(options.threads)
    # a pipe has no width: tables would be cut to 80 columns
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    modules = {op: importlib.import_module(f"benchmarks.ops.bench_{op}") for op in OPS}
    if options.list:
        _list(console, modules)
        return 0

    def print_verdicts(rows: list[harness.Row]) -> None:
        for verdict in bars.verdicts(rows):
            style = {"pass": "green", "MISS": "bold red", "open": "yellow"}[verdict.state]
            console.print(
                f"{verdict.state:5} {verdict.bar}: {verdict.detail}", style=style, markup=False, soft_wrap=True
            )

    if options.bars:
        print_verdicts(report.read_latest(options.bars))
        return 0

    known = [op for op in OPS if _defaults(modules[op], options.device) is not None]
    ops = known if options.op == ["all"] else options.op
    for op in ops:
        if op not in known:
            parser.error(f"--op must be of {', '.join(known)}, all (--device {options.device}); got {op}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu where torch finds no GPU; got cuda")
    defaults = {op: _defaults(modules[op], options.device) for op in ops}
    # an op may have shapes of its own
    shapes = list(SHAPES) + [name for name in modules[ops[0]].DEFAULTS["shapes"] if name not in SHAPES]
    shapes = [name for name in shapes if name in SHAPES or all(name in modules[op].DEFAULTS["shapes"] for op in ops)]
    unknown = [name for name in options.shape or () if name not in shapes]
    if unknown:
        parser.error(f"--shape must be of {', '.join(shapes)}; got {', '.join(unknown)}")
    providers = options.providers.split(",") if options.providers else None
    for name in providers or ():
        if not any(name in modules[op].PROVIDER_NAMES for op in ops):
            known = dict.fromkeys(name for op in ops for name in modules[op].PROVIDER_NAMES)
            parser.error(f"--providers must be of {', '.join(known)}; got {name}")

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    device = torch.device(options.device)
    probe, measured, limits_missing = _limits(options.device, options.threads)
    name = harness.device_name(device)
    console.print(f"{name}   torch {torch.__version__}   commit {harness.commit()}", style="bold")
    console.print(measured.describe() if measured else f"no floors: {limits_missing}")
    if options.device == "cpu" and not Gate().available:
        console.print("samples are not gated: this system does not say when a thread waited for a core", style="yellow")
    console.print()

    all_rows = []
    repeats, budget_s = _SAMPLING[options.device]
    suffix = "" if options.device == "cpu" else f"_{options.device}"
    for op in ops:
        module = modules[op]
        context = harness.Context(
            shapes=options.shape or defaults[op]["shapes"],
            dtypes=[dtypes[name] for name in options.dtype or defaults[op]["dtypes"]],
            tokens=options.tokens or defaults[op]["tokens"],
            threads=options.threads,
            providers=providers,
            repeats=options.repeats or repeats,
            budget_s=options.budget or budget_s,
            refuse_on_red=options.refuse_on_red,
            limits=measured,
            probe=probe,
            device=device,
        )
        tqdm.monitor_interval = 0  # its watching thread would wake up in the middle of samples
        for cell in harness.cells_on(device, module.cells(context)):
            with tqdm(desc=cell.title, unit=" samples", leave=False, disable=None) as bar:
                rows = harness.run_cell(cell, context, bar.update)
            report.print_cell(console, cell, rows)
            all_rows += rows
            if not options.no_csv:
                # at once: a run that is stopped keeps what it measured
                report.append_csv(options.csv or _HERE / "results" / f"{op}{suffix}.csv", rows)

    if options.device == "cpu":  # the promises are about CPUs
        print_verdicts(all_rows)
    return 1 if any(row.status == "red" for row in all_rows) else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # some peers' thread pools do not survive an orderly exit
    os._exit(code)
