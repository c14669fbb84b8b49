"""Compile for TPUs that are not here, and count what a kernel's inner loop issues.

libtpu compiles without a chip. Asked to, it also writes the final schedule of every
kernel: one *bundle* of instructions per clock. The bundles of the grid loop's body are
thus the clocks of one grid step, as long as data arrives in time; the clocks that the
memory needs to deliver the step's weights are known from the data sheet. The larger of
the two is the estimate. Nothing here is a measurement of time.
"""

import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLD", "FILL", "VST", "SPILL", "SALU")


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation, per core that a kernel runs on (public data sheets).

    Attributes:
        topology: the smallest that libtpu compiles for.
        bandwidth: of the memory, bytes per second and core.
        clock: of the core; inferred from the peak rate and the size of its units.
        peak: bfloat16 operations per second and core.
        doubled: the dtypes that it multiplies twice as fast.
    """

    topology: str
    bandwidth: float
    clock: float
    peak: float
    doubled: tuple[str, ...]


CHIPS = {
    "v5e": Chip("v5e:2x2", 819e9, 1.5e9, 197e12, ("int8",)),
    "v5p": Chip("v5p:2x2x1", 2765e9 / 2, 1.75e9, 459e12 / 2, ("int8",)),
    "v6e": Chip("v6e:2x2", 1640e9, 1.75e9, 918e12, ("int8",)),
    "v7x": Chip("tpu7x:2x2x1", 7380e9 / 2, 2.2e9, 2307e12 / 2, ("float8_e4m3fn",)),
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The body of a kernel's grid loop.

    Attributes:
        bundles: its length: clocks per grid step.
        units: instructions per functional unit.
    """

    bundles: int
    units: dict[str, int]


def mesh(topology: str, shape: Sequence[int], names: Sequence[str]) -> Mesh:
    """Return a mesh over the first devices of a topology that is not here."""
    _prepare()
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    count = int(np.prod(shape))
    return Mesh(np.array(found.devices[:count]).reshape(shape), tuple(names))


def compile_for(
    fn: Callable[..., Any], arguments: Sequence[Any], generation: str
) -> Any:
    """Compile ``fn`` of abstract arrays for one core of a generation."""
    one = mesh(CHIPS[generation].topology, (1,), ("x",))
    everywhere = NamedSharding(one, PartitionSpec())
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
        list(arguments),
    )
    with jax.sharding.use_abstract_mesh(one.abstract_mesh):
        lowered = jax.jit(fn).trace(*placed).lower(lowering_platforms=("tpu",))
    return lowered.compile()


def schedule(
    fn: Callable[..., Any], arguments: Sequence[Any], generation: str
) -> Schedule:
    """Compile ``fn``, and return the longest grid loop among its kernels."""
    folder = _prepare()
    for old in folder.iterdir():
        old.unlink()
    compile_for(fn, arguments, generation)
    found = [_read(path) for path in sorted(folder.glob("*final_bundles.txt"))]
    found = [s for s in found if s is not None]
    if not found:
        raise RuntimeError(
            "libtpu wrote no schedules: something used it before LIBTPU_INIT_ARGS was "
            "set; call benchmarks.tpu_compile first in a fresh process"
        )
    return max(found, key=lambda s: s.bundles)


_FLAG = "--xla_jf_dump_to="


def _prepare() -> Path:
    """Point libtpu at no chip and at a folder for its schedules; return the folder."""
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    if _FLAG not in flags:
        folder = tempfile.mkdtemp(prefix="llo-")
        flags += f" {_FLAG}{folder} --xla_jf_dump_hlo_text=true"
        flags += " --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = flags.strip()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    return Path(re.search(f"{_FLAG}(\\S+)", os.environ["LIBTPU_INIT_ARGS"])[1])


def _read(path: Path) -> Schedule | None:
    """Return the grid loop of one program's final bundles, None for other files."""
    if any(word in path.name for word in ("schedule", "static_gap", "<", "TLP")):
        return None
    lines = [
        line for line in path.read_text().splitlines() if _address(line) is not None
    ]
    if not lines:
        return None
    starts = [_address(s) for s in lines if re.match(r"^\s*0x[0-9a-f]+\s+LB:", s)]
    looped = [_address(line) for line in lines if ">" in line[:14]]
    first = starts[0] if starts else 0
    last = looped[-1] if looped else _address(lines[-1])
    prefix = path.name.rsplit("-", 2)[0]
    usage = next(
        iter(path.parent.glob(f"{prefix}*final_hlo-static-per-bundle-utilization.txt")),
        None,
    )
    units: dict[str, int] = {}
    if usage is not None:
        rows = usage.read_text().splitlines()[4:]
        counts = [
            list(map(int, r.split())) for r in rows if re.match(r"^[\d ]+\d\s*$", r)
        ]
        inside = counts[first : last + 1]
        units = {name: sum(r[i] for r in inside) for i, name in enumerate(UNITS)}
    return Schedule(last - first + 1, units)


def _address(line: str) -> int | None:
    found = re.match(r"^\s*(0x[0-9a-f]+|0)\s", line)
    return int(found[1], 16) if found else None
