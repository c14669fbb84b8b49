"""`convert`: a model from one format into another, losslessly where it can be."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.checkpoints import atomic
from jaxq.checkpoints.errors import UnsupportedError
from jaxq.codecs import CODECS
from jaxq.codecs.folder import SafetensorsSink, carry_over, may_replace
from jaxq.codecs.gguf_write import GGUFSink
from jaxq.codecs.reading import LOST
from jaxq.codecs.unpacked import Unpacked
from jaxq.convertible import FLOAT, JAXQ, Convertible, Leaf, is_foreign, opened
from jaxq.lm import load_model
from jaxq.model import Model
from jaxq.names import lookup
from jaxq.qtensor import QTensor, is_qtensor
from jaxq.quantize import quantize
from jaxq.spec import QuantSpec

# name of a target -> ggml's type of requantized layers
GGUF = {"gguf": 8, "gguf-q4_0": 2}
# Formats whose engines look for Linear layers; GPT-2's are Conv1D.
LINEAR = ("awq", "compressed-tensors", "fp8")
TARGETS: dict[str, str] = {
    JAXQ: "jaxq's own folder",
    FLOAT: "safetensors of floats",
    **{name: f"{name} safetensors" for name, row in CODECS.items() if row.write},
    "gguf": "one GGUF file, requantized layers in Q8_0",
    "gguf-q4_0": "one GGUF file, requantized layers in Q4_0",
}
EXACT, REQUANTIZED, DEQUANTIZED, AS_FLOAT = "exact", "requantized", "float", "kept"
SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one tensor.

    Attributes:
        name: in the checkpoint.
        outcome: ``exact``: its codes and scales are what they were; ``requantized``:
            rounded anew; ``float``: dequantized; ``kept``: a float that stayed one.
        note: what was lost or left out; empty: nothing.
        error: ``‖w' − w‖ / ‖w‖`` where it was requantized, else 0.
    """

    name: str
    outcome: str
    note: str = ""
    error: float = 0.0


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        path: the folder that was written.
        source: the format that was read.
        target: the format that was written.
        rows: of every tensor, in order.
        notes: of the reading: what was not taken as it is, and why, by tensor.
    """

    path: Path
    source: str
    target: str
    rows: tuple[Row, ...]
    notes: Mapping[str, str]

    @property
    def lossless(self) -> bool:
        """Whether every weight that was quantized is what it was."""
        return all(row.outcome in (EXACT, AS_FLOAT) for row in self.rows)

    def counts(self) -> dict[str, int]:
        """Return how many tensors had each outcome."""
        outcomes = [row.outcome for row in self.rows]
        return {o: outcomes.count(o) for o in dict.fromkeys(outcomes)}

    def __str__(self) -> str:
        """Say in a few lines what was done."""
        told = ", ".join(f"{count} {name}" for name, count in self.counts().items())
        lines = [f"{self.source} → {self.target}: {told}; written to {self.path}"]
        found = dict(self.notes)
        for row in self.rows:
            if row.note:
                read = found.get(row.name)
                found[row.name] = f"{row.note}; {read}" if read else row.note
        lines += [f"  {line}" for line in by_note(found)]
        return "\n".join(lines)


def convert(
    source: str | Path | Model,
    path: str | Path,
    to: str,
    *,
    requantize: bool = False,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """Write a model in another library's format.

    A quantized weight keeps its codes and scales where the target can express them.
    Where it cannot, it is refused, or rounded anew (to nearest) if that is asked for.
    Embeddings and heads that the target has no form for are written as floats, and so
    are weights that cannot even be rounded anew. Scales of inputs (AWQ, SmoothQuant)
    are folded into the module before, and each layer that this changes is checked. The
    folder appears completely or not at all; what a killed process leaves is a hidden
    folder `.NAME.*.partial`, which may be removed. Folders (but for Orbax') are read
    and written tensor by tensor, or layer by layer where scales are folded.

    Args:
        source: a model, or what `jaxq.load_model` takes.
        path: the folder to make.
        to: one of `TARGETS`: ``jaxq``, ``float``, ``gptq``, ``awq``,
            ``auto-round``, ``compressed-tensors``, ``bitsandbytes``, ``fp8``, ``gguf``,
            ``gguf-q4_0``.
        requantize: whether weights that the target cannot express are rounded anew.
        overwrite: whether a model's folder at ``path`` is replaced.
        shard_bytes: the limit of one file.

    Returns:
        What became of every tensor.

    Raises:
        UnsupportedError: weights that the target cannot express, each with the reason;
            nothing is written.
        CheckpointError: the source is damaged.
        ExistsError: there is something at ``path``.
        WriteError: the disk is full, or not writable.

    Example:
        >>> import jaxq
        >>> small = jaxq.load_model("demo").quantize("nf4")  # doctest: +SKIP
        >>> print(jaxq.convert(small, "out", "bitsandbytes"))  # doctest: +SKIP
        jaxq → bitsandbytes: ...
    """
    lookup(TARGETS, to, "format")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes} must be at least 1")
    target = Path(path)
    if to == JAXQ:
        return _to_jaxq(source, target, overwrite)
    model = opened(source, to, requantize)
    replace = may_replace if overwrite else None
    with atomic.new_folder(target, model.nbytes, replace) as folder:
        rows = fill(folder, model, to, requantize, shard_bytes)
    return Conversion(target, model.codec, to, rows, model.notes)


def fill(
    folder: Path, model: Convertible, to: str, requantize: bool, shard_bytes: int
) -> tuple[Row, ...]:
    """Write a model into an empty folder; return what became of every tensor."""
    with sink_of(folder, model.config, to, shard_bytes) as sink:
        rows = tuple(write_leaves(model.leaves, sink, to, requantize))
        refuse_lost(rows, to)
        sink.close(model.config)
        carry_over(model.folder, model.files, folder)
    return rows


def refuse_lost(rows: Sequence[Row], to: str) -> None:
    """Raise `UnsupportedError` if a tensor cannot be written, or none is quantized."""
    refused = [row for row in rows if not row.outcome]
    if refused:
        raise _refusal(refused, to)
    if to != FLOAT and not any(r.outcome in (EXACT, REQUANTIZED) for r in rows):
        raise UnsupportedError(
            f"no weight of the model is quantized, so there is nothing to write as "
            f"{to}: quantize it with a recipe first (jaxq quantize ... --to {to})"
        )


def write_leaves(
    leaves: Iterator[Leaf], sink: Any, to: str, requantize: bool
) -> Iterator[Row]:
    """Write every tensor; a row without outcome is one that cannot be."""
    for leaf in leaves:
        if not isinstance(leaf.value, QTensor):
            _write_float(leaf, sink, np.asarray(leaf.value))
            lost = leaf.note.startswith(LOST)
            yield Row(leaf.name, DEQUANTIZED if lost else AS_FLOAT)
        elif to == FLOAT or not (leaf.is_layer or to in GGUF):
            _write_float(leaf, sink, np.asarray(_dequantized(_nameless(leaf.value))))
            why = "" if to == FLOAT else f"{to} has no quantized embeddings"
            yield Row(leaf.name, DEQUANTIZED, why)
        else:
            yield _write_layer(leaf, sink, to, requantize)


def _write_layer(leaf: Leaf, sink: Any, to: str, requantize: bool) -> Row:
    """Write a quantized layer as it is, rounded anew, or (a head) as floats."""
    q, module = leaf.value, leaf.name.removesuffix(".weight")
    foreign = to in LINEAR and not leaf.transposed
    why = f"it is a Conv1D, and {to} is of Linear layers only"
    if not foreign:
        try:
            return Row(leaf.name, EXACT, sink.quantized(module, Unpacked.of(q)))
        except UnsupportedError as error:
            why = str(error)
    if not leaf.is_inner:
        _write_float(leaf, sink, np.asarray(_dequantized(_nameless(q))))
        return Row(leaf.name, DEQUANTIZED, why)
    if not requantize:
        return Row(leaf.name, "", why)
    reasons = [why]
    for choose in () if foreign else _specs(q, sink):
        try:
            spec = choose()
            again, error = _requantized(q, spec)
            note = sink.quantized(module, Unpacked.of(again))
        except UnsupportedError as refused:
            reasons.append(str(refused))
            continue
        told = f"{why}; now {spec.describe()}" + (f"; {note}" if note else "")
        return Row(leaf.name, REQUANTIZED, told, float(error))
    _write_float(leaf, sink, np.asarray(_dequantized(_nameless(q))))
    return Row(leaf.name, DEQUANTIZED, f"{why}; nor rounded anew: {reasons[-1]}")


def _specs(q: QTensor, sink: Any) -> Iterator[Callable[[], QuantSpec]]:
    """Yield how to round a weight anew: as it was, if that helps, then the target's."""
    if any(a is not None for a in (q.offset, q.input_scale, q.input_index)):
        yield lambda: q.spec
    yield lambda: sink.nearest(q.shape, q.dtype)


def _requantized(q: QTensor, spec: QuantSpec) -> tuple[QTensor, jax.Array]:
    """Return a weight rounded to nearest, for the activation it had, and its error."""
    again, error = _rounded(_nameless(q), spec)
    scaled = q.input_scale is not None
    again = dataclasses.replace(
        again,
        dtype=q.dtype,
        activation=q.activation,
        activation_scale=None if scaled else q.activation_scale,
        activation_zero=None if scaled else q.activation_zero,
    )
    return again, error


@functools.partial(jax.jit, static_argnames="spec")
def _rounded(q: QTensor, spec: QuantSpec) -> tuple[QTensor, jax.Array]:
    """Round a weight; compiled, since floats of all of it would be many times its size.

    Returns:
        The weight, and ``‖w' − w‖ / ‖w‖``.
    """
    values = q.dequantize(jnp.float32)
    again = quantize(values, spec)
    lost = jnp.linalg.norm(again.dequantize(jnp.float32) - values)
    size = jnp.maximum(jnp.linalg.norm(values), jnp.finfo(jnp.float32).tiny)
    return again, lost / size


def _nameless(q: QTensor) -> QTensor:
    """Return a tensor that was compiled for if another like it was."""
    return dataclasses.replace(q, name=None)


@jax.jit
def _dequantized(q: QTensor) -> jax.Array:
    return q.dequantize()


def _write_float(leaf: Leaf, sink: Any, values: np.ndarray) -> None:
    sink.floating(leaf.name, values.T if leaf.transposed else values, leaf.is_layer)


def _refusal(rows: list[Row], to: str) -> UnsupportedError:
    reasons = by_note({row.name: row.note for row in rows})
    return UnsupportedError(
        f"{len(rows)} weight(s) cannot be written as {to} without loss:"
        f"{few(reasons)}\n"
        f"ask for requantize=True (--requantize) to round them anew, and to write as "
        f"floats what {to} does not take then either"
    )


def few(reasons: Sequence[str]) -> str:
    """Return some of many reasons, each on a line of its own."""
    shown = "".join(f"\n  {line}" for line in reasons[:5])
    more = f"\n  and {len(reasons) - 5} more reasons" if len(reasons) > 5 else ""
    return f"{shown}{more}"


def by_note(notes: Mapping[str, str]) -> list[str]:
    """Return one line for each note, with the first tensor that has it."""
    names: dict[str, list[str]] = {}
    for name, note in notes.items():
        names.setdefault(note, []).append(name)
    return [
        f"{alike[0]}{f' and {len(alike) - 1} more' if len(alike) > 1 else ''}: {note}"
        for note, alike in names.items()
    ]


@contextlib.contextmanager
def sink_of(
    folder: Path, config: Mapping[str, Any], to: str, shard_bytes: int
) -> Iterator[Any]:
    """Yield what writes a folder of a format; let go of its files in the end."""
    sink: Any
    if to in GGUF:
        sink = GGUFSink(folder, config, GGUF[to])
    else:
        write = None if to == FLOAT else CODECS[to].write
        sink = SafetensorsSink(folder, None if write is None else write(), shard_bytes)
    try:
        yield sink
    finally:
        sink.release()


def _to_jaxq(source: Any, target: Path, overwrite: bool) -> Conversion:
    lm = source if isinstance(source, Model) else load_model(source)
    lm.save(target, overwrite=overwrite)
    leaves, _ = jax.tree_util.tree_flatten_with_path(lm.params, is_leaf=is_qtensor)
    rows = tuple(
        Row(
            jax.tree_util.keystr(path, simple=True, separator="/"),
            EXACT if isinstance(leaf, QTensor) else AS_FLOAT,
        )
        for path, leaf in leaves
    )
    ours = lm.codec == FLOAT and not is_foreign(source)
    return Conversion(target, JAXQ if ours else lm.codec, JAXQ, rows, lm.notes)
