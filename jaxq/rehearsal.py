"""`rehearse`: can a format express what a plan will make of a model? Asked beforehand.

A model is solved for hours and converted at the end. What the format refuses is nearly
always known from shapes and specs: one block of every kind is converted with made-up
numbers and forgotten.
"""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.checkpoints.errors import UnsupportedError
from jaxq.codecs import CODECS
from jaxq.codecs.unpacked import Unpacked
from jaxq.convert import GGUF, Row, by_note, few, sink_of, write_leaves
from jaxq.convertible import FLOAT, block_of, config_of, leaves_of
from jaxq.fold import fold
from jaxq.model import Model
from jaxq.plan import Plan, PlanRow
from jaxq.qtensor import QTensor

# A scale that 16 bits would round, as they would round nearly all that are solved for;
# and the bits of 1 in e4m3, of a tiny number in e8m0.
SCALE, SCALE_BITS = 1 / 3, 56


def rehearse(lm: Model, todo: Plan, to: str, shard_bytes: int) -> int:
    """Raise unless a format can express what a plan will make.

    Args:
        lm: the float model.
        todo: the plan for it.
        to: the format, one of `jaxq.convert.TARGETS`.
        shard_bytes: the limit of one file.

    Returns:
        About how many bytes the conversion will need on the disk.

    Raises:
        UnsupportedError: weights that it cannot express, each with the reason.
        CheckpointError: the model has no config, which every format needs.
    """
    from jaxq.models import find_family

    config = config_of(lm)
    family = find_family(config)
    slots = family.slots(family.read_config(config))
    rows = {row.path: row for row in todo}
    if to != FLOAT:
        kinds = _one_of_each_kind(slots, rows)
        made_up = functools.partial(_made_up, rows)
        with _forgetting(to, config) as sink:
            fold_block = functools.partial(fold, family=family.name)
            leaves = leaves_of(kinds, made_up, fold_block)
            _refuse(list(write_leaves(leaves, sink, to, False)), to, todo.recipe.name)
    return _needed(slots, rows, to, shard_bytes)


def _one_of_each_kind(
    slots: Mapping[str, Any], rows: Mapping[str, PlanRow]
) -> dict[str, Any]:
    """Return the slots of the first of all blocks that are alike, and one expert each.

    What is in no block is left out: it may stay float in every format.
    """
    blocks: dict[str, dict[str, Any]] = {}
    for name, slot in slots.items():
        if block_of(name) and not slot.place:
            blocks.setdefault(block_of(name), {})[name] = slot
    kinds: dict[Any, dict[str, Any]] = {}
    for block, held in blocks.items():
        kind = tuple(
            (name.removeprefix(block), _alike(rows["/".join(slot.path)]))
            for name, slot in held.items()
        )
        kinds.setdefault(kind, held)
    return {name: slot for held in kinds.values() for name, slot in held.items()}


def _alike(row: PlanRow) -> Any:
    """Return what two weights of which the same is made have in common."""
    return row.shape, row.dtype, row.rule, row.contracting, row.stacked


def _made_up(rows: Mapping[str, PlanRow], path: tuple[str, ...]) -> Any:
    """Return what will be made of a parameter, with made-up numbers.

    Zeros cost no memory until they are touched.
    """
    row = rows["/".join(path)]
    if row.made is None:
        return np.ones(row.shape, jnp.dtype(row.dtype))
    return _filled(row.made)


def _filled(q: QTensor) -> QTensor:
    zeros: Any = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), q)
    held = q.scales
    scales: Any
    if isinstance(held, QTensor):
        scales = _filled(held)
    else:
        one = SCALE if jnp.issubdtype(held.dtype, jnp.floating) else SCALE_BITS
        scales = np.full(held.shape, one, held.dtype)
    return dataclasses.replace(zeros, scales=scales)


@dataclasses.dataclass
class _Forgetful:
    """A sink that keeps nothing, and refuses what the real one refuses.

    Attributes:
        quantized: expresses a weight, and returns a note.
    """

    quantized: Callable[[str, Unpacked], str]

    def floating(self, name: str, values: np.ndarray, is_layer: bool) -> None:
        """Take a float tensor."""


@contextlib.contextmanager
def _forgetting(to: str, config: Mapping[str, Any]) -> Iterator[_Forgetful]:
    """Yield a sink of a format that keeps nothing."""
    if to not in GGUF:
        make = CODECS[to].write
        assert make is not None
        writer = make()
        yield _Forgetful(lambda module, w: writer.write(module, w)[1])
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        sink_of(Path(folder), config, to, 1) as sink,
    ):

        def quantized(module: str, w: Unpacked) -> str:
            note = sink.quantized(module, w)
            sink.spool.seek(0)
            sink.spool.truncate()
            return note

        yield _Forgetful(quantized)


def _refuse(rows: Sequence[Row], to: str, recipe: str) -> None:
    refused = {row.name: row.note for row in rows if not row.outcome}
    if refused:
        raise UnsupportedError(
            f"recipe {recipe!r} makes weights that cannot be written as {to} without "
            f"loss (of each kind of block one was tried):{few(by_note(refused))}\n"
            "choose another recipe or format; or write "
            "jaxq's own, and let jaxq convert --requantize round them anew"
        )


def _needed(
    slots: Mapping[str, Any], rows: Mapping[str, PlanRow], to: str, shard_bytes: int
) -> int:
    """Return the bytes of what is written, and of what waits to be."""
    written = 0
    for path, name in {"/".join(slot.path): n for n, slot in slots.items()}.items():
        stays = to == FLOAT or not (block_of(name) or to in GGUF)
        written += rows[path].bytes_before if stays else rows[path].bytes_after
    return written + (written if to in GGUF else min(written, shard_bytes))
