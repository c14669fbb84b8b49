"""What goes to the terminal: results to stdout, progress and complaints to stderr."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def results() -> Console:
    """Return the console for results. Made anew, as tests replace `sys.stdout`."""
    return Console()


def errors() -> Console:
    """Return the console for everything that is no result."""
    return Console(stderr=True)


def print_json(data: Any) -> None:
    """Print plain data as JSON; what it has no number for (NaN, infinity) is null."""
    text = json.dumps(_finite(data), indent=2, allow_nan=False, default=str)
    Console(soft_wrap=True).print(text, markup=False, highlight=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


@contextmanager
def progress() -> Iterator[Progress]:
    """Yield a progress display on stderr that leaves nothing behind.

    Bars show how long they ran and how long they will; without a terminal, nothing.
    """
    console = errors()
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("[dim]elapsed"),
        TimeElapsedColumn(),
        TextColumn("[dim]left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bars:
        yield bars


def size(count: float) -> str:
    """Return bytes as people write them: ``3.12 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def loss_color(kl: float) -> str:
    """Return the colour of a divergence in nats: next to nothing, some, much."""
    return "green" if kl < 0.01 else "yellow" if kl < 0.1 else "red"
