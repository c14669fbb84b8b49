"""The kernels of `pallas_kernels` as rows of the dispatch table."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.ops.activation import row_scale
from jaxq.ops.parallel import Split, placement
from jaxq.ops.problem import Kernel, Problem
from jaxq.qtensor import QTensor
from jaxq.spec import QuantSpec
from pallas_kernels import kernel as pallas
from pallas_kernels import table
from pallas_kernels.target import Target

# how a kernel may round the activation: format -> dtype
ROUNDED = {"int8": "int8", "fp8_e4m3": "float8_e4m3fn"}


def accelerated(target: Target) -> tuple[Kernel, ...]:
    """Return the kernels of a chip, best first."""
    return tuple(_row(kernel, target) for kernel in table.kernels(target.backend))


@functools.lru_cache
def _row(kernel: pallas.Kernel, target: Target) -> Kernel:
    """Return a row of the table; the same object every time, so that jit knows it."""

    def declines(p: Problem) -> str | None:
        here = target.generation or f"this kind of {target.backend}"
        if here not in kernel.generations:
            return f"not for {here}"
        reason = _not_a_product_of_codes(p)
        if reason is None and p.w.layout != kernel.layout:
            reason = f"the codes are in layout {p.w.layout!r}, not {kernel.layout!r}"
        if reason is not None:
            return reason
        sharding = placement(p.w, p.x)
        if isinstance(sharding, str):
            return sharding
        known, split = facts(p), Split.of(sharding, p.x.shape[0])
        if split is None:
            return kernel.refuses(known, here)
        return split.declines(known, p.w.padding) or kernel.refuses(
            split.local(known), here
        )

    def alone(known: pallas.Problem, a: pallas.Operands) -> jax.Array:
        return kernel.run(known, a, tuned_tile(kernel, known, target), target.interpret)

    def run(p: Problem) -> jax.Array:
        split = Split.of(placement(p.w, p.x), p.x.shape[0])
        if split is None:
            return alone(facts(p), operands(p))
        return split.run(alone, facts(p), operands(p))

    return Kernel(kernel.name, (target.backend,), declines, run, accelerated=True)


def tuned_tile(kernel: pallas.Kernel, p: pallas.Problem, target: Target) -> Any:
    """Return the tile that was tuned for a problem, or else the table's."""
    tuned = dict(target.tiles).get(pallas.tuning_key(kernel, p))
    return kernel.tile(p, target.generation) if tuned is None else tuned


def facts(p: Problem) -> pallas.Problem:
    """Return what a kernel decides on; only for products of codes."""
    inner, columns = p.w.stored_shape[-2:]
    act = p.w.activation
    precision = p.precision
    return pallas.Problem(
        rows=p.x.shape[0],
        inner=inner,
        columns=columns,
        dtype=p.x.dtype.name,
        out_dtype=jnp.dtype(p.out_dtype).name,
        coding=p.w.coding,
        group=min(p.w.blocks[-2], inner),
        zeros=p.w.zeros is not None,
        activation=None if act is None else ROUNDED[act.format],
        layers=None if p.layer is None else p.w.shape[0],
        precise=str(precision).upper().rpartition(".")[2] in ("HIGH", "HIGHEST"),
    )


def operands(p: Problem) -> pallas.Operands:
    """Return the arrays, one scale per column."""
    w, scale = p.w, None
    if w.activation is not None:
        scale = row_scale(p.x, w, w.activation)
    plain = isinstance(w.scales, jax.Array) and w.spec.scale in ("bfloat16", "float16")
    scales = w.scales if plain else w.scale_values()
    zeros = None if w.zeros is None else _per_column(w.zeros, w)
    return pallas.Operands(p.x, w.codes, _per_column(scales, w), zeros, scale, p.layer)


def _per_column(values: Any, w: QTensor) -> jax.Array:
    """Spread one value per block over columns: ``[..., groups, 1 or N]``."""
    columns, block = w.shape[-1], w.blocks[-1]
    if values.shape[-1] in (1, columns):
        return values
    return jnp.repeat(values, block, axis=-1)[..., :columns]


def _not_a_product_of_codes(p: Problem) -> str | None:
    """Return why the weight is more than codes, scales and zeros, or None."""
    if p.x.dtype.name not in ("bfloat16", "float16", "float32"):
        return f"the activation is {p.x.dtype.name}"
    if p.w.axis != -2:
        return "the weight is packed along an axis that is not contracted"
    if p.w.spec.binary:
        return "every bit of the weight has a scale of its own"
    if p.w.offset is not None:
        return "the weight has an offset"
    act = p.w.activation
    return None if act is None else _unusual(act)


def _unusual(act: QuantSpec) -> str | None:
    """Return why no kernel rounds the activation as asked, or None."""
    plain = act.symmetric and act.grid == "restricted" and not act.center
    rows = act.block in ("token", "channel", "tensor")
    if act.outliers is not None:
        return "the activation keeps outliers in float"
    if act.format in ROUNDED and plain and rows and isinstance(act.scale, str):
        return None
    return f"the activation is {act.describe()}, not int8 or fp8 per token or tensor"
