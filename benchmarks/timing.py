"""Time functions fairly on a machine that others use too.

Every function runs once per round, rounds follow each other, and the order rotates: a
neighbour's load then falls on all of them alike. The minimum says what the code can do,
the median what it did.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Times:
    """The seconds that one function took, per call.

    Attributes:
        minimum: of all rounds.
        median: of all rounds.
        rounds: how many there were.
    """

    minimum: float
    median: float
    rounds: int


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    *,
    seconds: float,
    least_rounds: int = 5,
    burst: float = 0.01,
) -> dict[str, Times]:
    """Time every function, round by round, until the time is up.

    Args:
        functions: by name; what they return is waited for. Each is called once before.
        seconds: to spend on all of them together.
        least_rounds: run at least so often.
        burst: a function faster than this is called several times in a row, each call
            timed: the first after another function finds its data out of the caches.
    """
    calls = {}
    for name, function in functions.items():
        jax.block_until_ready(function())
        calls[name] = max(1, min(20, int(burst / max(_once(function), 1e-7))))
    taken: dict[str, list[float]] = {name: [] for name in functions}
    names, end, done = list(functions), time.perf_counter() + seconds, 0
    while done < least_rounds or time.perf_counter() < end:
        for name in names[done % len(names) :] + names[: done % len(names)]:
            taken[name] += [_once(functions[name]) for _ in range(calls[name])]
        done += 1
    return {
        name: Times(min(values), float(np.median(values)), done)
        for name, values in taken.items()
    }


def _once(function: Callable[[], Any]) -> float:
    """Return the seconds of one call, result included."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start
