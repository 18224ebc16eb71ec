"""What the commands on checkpoints share: names that are left out, progress, and how they fail."""

import fnmatch
import importlib.util
from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path

PACKAGES = ("safetensors",)


class CommandError(RuntimeError):
    """What a user has to know; printed without a traceback."""


def require_packages(command: str) -> None:
    """Raises :class:`CommandError` unless what checkpoints need is installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f"{command}: {', '.join(missing)} must be installed, got no such package; "
            "run: pip install 'moe-kernels-torch[checkpoints]'"
        )


def add_leave_out(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--leave-out", nargs="+", default=[], metavar="GLOB", help="names of tensors to leave as the base has them"
    )


def is_left_out(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def file_and_number(command: str, argument: str) -> tuple[str, float]:
    """``path=number``; 1 where there is no number."""
    path, _, number = argument.rpartition("=")
    if not path or Path(argument).exists():
        return argument, 1.0
    try:
        return path, float(number)
    except ValueError:
        raise CommandError(f"{command}: {argument!r} must end in a number after the =") from None


def listed(names: Iterable[str], most: int = 8) -> str:
    """The first few names and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def progress_bar(total: int, description: str):
    """tqdm's bar on a terminal, where it is installed; else one that shows nothing."""
    if importlib.util.find_spec("tqdm") is None:
        return _NoBar()
    from tqdm import tqdm

    return tqdm(total=total, desc=description, unit=" tensors", disable=None, leave=False)


class _NoBar:
    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def update(self, count: int = 1) -> None:
        return None
