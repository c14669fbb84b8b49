"""`relayout`: the same codes, arranged as a backend's kernels want them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.qtensor import QTensor, is_qtensor
from jaxq.quantize import padded_length
from pallas_kernels import table
from pallas_kernels.target import Target

PLANAR = "planar"
LOOKUP = "lookup"  # of binary-coded weights, where there is a kernel that looks up


def relayout(q: QTensor, layout: str) -> QTensor:
    """Return ``q`` with its codes in another layout: the same tensor, bit for bit.

    ``relayout(relayout(q, name), q.layout) == q``. Saved files hold the canonical
    ``"planar"`` layout; `jaxq.load_model` chooses the backend's own.

    Args:
        q: a matrix packed along its rows, or a stack of such matrices.
        layout: ``"planar"``, or a key of `pallas_kernels.table.LAYOUTS`.

    Raises:
        ValueError: when the codes have no such layout; the message says why. On a GPU
            also for fp8 codes of NaN or infinity (not seen inside `jax.jit`).

    Example:
        >>> import jax, jaxq
        >>> w = jax.random.normal(jax.random.key(0), (64, 8))
        >>> q = jaxq.relayout(jaxq.quantize(w, jaxq.QuantSpec("int4")), "tpu")
        >>> q.codes.dtype.name, q.codes.shape, q.shape
        ('int4', (64, 8), (64, 8))
    """
    if layout == q.layout:
        return q
    if q.layout != PLANAR:
        return relayout(_planar(q), layout)
    if (reason := relayout_declines(q, layout)) is not None:
        raise ValueError(f"{q!r} has no layout {layout!r}: {reason}")
    _refuse_unreadable(q, layout)
    codes = table.layout(layout).prepack(q.codes, q.coding)
    length = q.stored_shape[-2]
    q = dataclasses.replace(q, codes=codes, layout=layout, padding=0)
    return dataclasses.replace(q, padding=q.stored_shape[-2] - length)


def _refuse_unreadable(q: QTensor, layout: str) -> None:
    """Refuse what a GPU's kernels would take for large numbers.

    Raises:
        ValueError: codes stand for NaN or infinity.
    """
    kind = q.coding.kind
    known = isinstance(q.codes, jax.Array) and not isinstance(q.codes, jax.core.Tracer)
    if layout != "gpu" or not kind.startswith("float8") or not known:
        return
    numbers = jax.lax.bitcast_convert_type(q.codes, jnp.dtype(kind))
    count = int(jnp.sum(~jnp.isfinite(numbers.astype(jnp.float32))))
    if count:
        raise ValueError(
            f"{q.name or repr(q)} has {count} codes of NaN or infinity, which GPU "
            f"kernels read as numbers: quantize finite weights, or mend the checkpoint"
        )


def _planar(q: QTensor) -> QTensor:
    """Return a relaid tensor in the canonical layout, less what filled another up."""
    codes = table.layout(q.layout).unpack(q.codes, q.coding)
    length, rows = q.stored_shape[-2], _planar_rows(q)
    codes = codes[..., : rows * q.spec.bits // 8, :]
    return dataclasses.replace(q, codes=codes, layout=PLANAR, padding=rows - length)


def _planar_rows(q: QTensor) -> int:
    """Return the rows of the codes in the canonical layout, padding included."""
    return padded_length(q.stored_shape[-2], q.blocks[-2], q.spec.bits)


def relayout_declines(q: QTensor, layout: str) -> str | None:
    """Return why a planar tensor cannot take a layout, or None."""
    if q.ndim < 2 or q.axis != -2:
        return f"it packs axis {q.axis} of {q.ndim}, not the rows of a matrix"
    if any(n > 1 for n in q.blocks[:-2]):
        return "matrices of the stack share scales"
    if q.spec.binary != (layout == LOOKUP):
        return "it is binary-coded" if q.spec.binary else "it is not binary-coded"
    rows, columns = q.codes.shape[-2] * 8 // q.spec.bits, q.codes.shape[-1]
    if rows != (canonical := _planar_rows(q)):
        return f"its rows are padded to {rows}, not to {canonical}"
    return table.layout(layout).declines(q.coding, rows, columns)


def canonical_params(params: Any) -> Any:
    """Return parameters in the layout of saved files, themselves if they are in it."""
    leaves = jax.tree.leaves(params, is_leaf=is_qtensor)
    if all(leaf.layout == PLANAR for leaf in leaves if is_qtensor(leaf)):
        return params
    move = lambda leaf: relayout(leaf, PLANAR) if is_qtensor(leaf) else leaf
    return jax.tree.map(move, params, is_leaf=is_qtensor)


def relayout_params(params: Any, target: Target | None = None) -> Any:
    """Return parameters whose quantized matrices lie as a chip's kernels want them.

    What has no such layout stays as it is, and runs without a kernel: `jaxq.explain`
    says why. Nothing changes on a backend without kernels.

    Args:
        params: any tree with `QTensor` leaves.
        target: the chip; the one this runs on by default.
    """
    target = Target.here() if target is None else target
    if target.backend not in table.LAYOUTS:
        return params

    def one(leaf: Any) -> Any:
        if not is_qtensor(leaf) or math.prod(leaf.shape) == 0:
            return leaf
        lookup = leaf.spec.binary and target.backend == "gpu"
        name = LOOKUP if lookup else target.backend
        leaf = relayout(leaf, PLANAR)
        if relayout_declines(leaf, name) is not None:
            return leaf
        _refuse_unreadable(leaf, name)
        move = jax.jit(lambda q: relayout(q, name))
        return dataclasses.replace(move(leaf), name=leaf.name)

    return jax.tree.map(one, params, is_leaf=is_qtensor)
