"""Times of several calls that take turns."""

import time
from collections.abc import Callable, Hashable
from statistics import median
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


def rotated(names: list[Name], turn: int) -> list[Name]:
    """``names`` in their order from another one each turn: all take their turn at being first, and a busy machine slows
    all of them alike."""
    start = turn % len(names)
    return names[start:] + names[:start]


def in_turn(calls: dict[Name, Callable[[], None]], repeats: int, progress, description: str) -> dict[Name, float]:
    """Median milliseconds of each call over ``repeats`` rounds; one more before them warms up."""
    samples: dict[Name, list[float]] = {name: [] for name in calls}
    for repeat in progress(range(repeats + 1), description):
        for name in rotated(list(calls), repeat):
            begin = time.perf_counter()
            calls[name]()
            if repeat:
                samples[name].append(1e3 * (time.perf_counter() - begin))
    return {name: median(found) for name, found in samples.items()}
