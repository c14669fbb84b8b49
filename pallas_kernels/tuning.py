"""The autotuner: time every tile that a kernel lists, remember the best in a file.

The file is small JSON, ``key -> tile and seconds``, where the key is all that the speed
depends on (`pallas_kernels.kernel.tuning_key`). Nothing is tuned behind anybody's back:
`load` returns what `pallas_kernels.target.Target` takes as ``tiles``.
"""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import table
from pallas_kernels.kernel import Kernel, Operands, Problem, tuning_key

Timer = Callable[[Callable[[], Any]], float]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The best tile for a problem.

    Attributes:
        key: the problem, as `tuning_key` files it.
        tile: the best.
        seconds: what it took.
        tried: seconds of every tile; infinity for one that did not compile.
    """

    key: str
    tile: Any
    seconds: float
    tried: tuple[tuple[Any, float], ...]


def median_time(run: Callable[[], Any], rounds: int = 7) -> float:
    """Return the median seconds of ``run``, which has run once before."""
    jax.block_until_ready(run())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def tune(
    kernel: Kernel,
    problem: Problem,
    operands: Operands,
    generation: str,
    timer: Timer = median_time,
    interpret: Any = False,
) -> Tuned:
    """Return the fastest of the kernel's tiles for a problem.

    Args:
        kernel: a row of `pallas_kernels.table`.
        problem: which it takes.
        operands: arrays of that problem, larger than the caches.
        generation: of the chip.
        timer: from a function of nothing to seconds.
        interpret: as `jax.experimental.pallas.pallas_call` takes it.

    Raises:
        ValueError: when the kernel declines the problem, or no tile compiles.
    """
    if (reason := kernel.declines(problem)) is not None:
        raise ValueError(f"{kernel.name} does not take {problem}: {reason}")
    names = [f.name for f in dataclasses.fields(operands)]
    arrays = {n: a for n in names if (a := getattr(operands, n)) is not None}
    tried: dict[Any, float] = {}
    for row in kernel.tiles:
        if row.tile in tried or not row.fits(generation, problem.rows):
            continue
        run = jax.jit(
            lambda arrays, tile=row.tile: kernel.run(
                problem, Operands(**arrays), tile, interpret
            )
        )
        try:
            tried[row.tile] = timer(lambda run=run: run(arrays))
        except jax.errors.JaxRuntimeError:  # too large for this chip's memories
            tried[row.tile] = float("inf")
    tile = min(tried, key=lambda t: tried[t], default=None)
    if tile is None or tried[tile] == float("inf"):
        raise ValueError(f"no tile of {kernel.name} compiles for {problem}")
    return Tuned(tuning_key(kernel, problem), tile, tried[tile], tuple(tried.items()))


def save(path: str | os.PathLike[str], tuned: Sequence[Tuned]) -> None:
    """Write (or add to) a file of tuned tiles, completely or not at all."""
    target = Path(path)
    known: dict[str, Any] = _read(target) if target.exists() else {}
    for row in tuned:
        known[row.key] = {"tile": dataclasses.asdict(row.tile), "seconds": row.seconds}
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    fresh.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", "utf-8")
    fresh.replace(target)


def load(path: str | os.PathLike[str], backend: str) -> tuple[tuple[str, Any], ...]:
    """Return the tuned tiles of a file, as a `Target` takes them.

    Entries of kernels that the backend does not have (any more) are left out.

    Raises:
        ValueError: when the file is not one of tuned tiles.
    """
    kinds = {k.name: type(k.tiles[0].tile) for k in table.kernels(backend)}
    out = []
    for key, entry in _read(Path(path)).items():
        kind = kinds.get(key.partition(" ")[0])
        if kind is not None:
            try:
                out.append((key, kind(**entry["tile"])))
            except (TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}: the entry {key!r} is no {kind.__name__}: {error}; remove "
                    f"the file and tune again"
                ) from error
    return tuple(out)


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON ({error}): remove it, and tune again"
        ) from error
    if not isinstance(known, dict):
        raise ValueError(f"{path} holds no table of tiles: remove it, and tune again")
    return known
