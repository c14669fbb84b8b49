"""Products with binary-coded weights: by look-ups for a few rows, else in tiles."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxq.layer import Layer
from jaxq.ops.activation import quantized_input
from jaxq.ops.parallel import divided_mesh
from jaxq.ops.problem import Kernel, Problem
from jaxq.relayout import LOOKUP, relayout
from pallas_kernels.target import Target, generations
from pallas_kernels.xla import binary_lut_dot, binary_tiled_dot

# up to here tables for every row cost less than weights for all of them
LOOKUP_ROWS = 4


class Signs(NamedTuple):
    """A binary-coded product as the kernels take it.

    Attributes:
        x: ``[M, K]``, K as long as the stored rows.
        codes: uint8 ``[q, K / 8, N]``.
        scales: float32 ``[q, groups, N]``.
        offsets: float32 ``[groups, N]``, or None.
    """

    x: jax.Array
    codes: jax.Array
    scales: jax.Array
    offsets: jax.Array | None

    @classmethod
    def of(cls, p: Problem) -> "Signs":
        """Return the operands of a problem."""
        w = p.w if p.layer is None else Layer(p.w, p.layer).taken()
        w = relayout(w, LOOKUP)
        bits, columns = w.spec.bits, w.codes.shape[1]
        x = jnp.pad(quantized_input(p.x, w), ((0, 0), (0, w.padding)))
        scales = w.scale_values().reshape(-1, bits, columns).swapaxes(0, 1)
        return cls(x, w.codes.reshape(bits, -1, columns), scales, w.offset)

    @property
    def group(self) -> int:
        """Rows per scale."""
        return self.x.shape[1] // self.scales.shape[1]


def _not_signs(p: Problem) -> str | None:
    """Return why the weight is no matrix of signs, or None."""
    w = p.w
    if not w.spec.binary:
        return "the weight is not binary-coded"
    if w.axis != -2:
        return "the weight is packed along an axis that is not contracted"
    rows, group = w.stored_shape[-2] + w.padding, w.blocks[-2]
    if group < w.stored_shape[-2] and (group % 8 or rows % group):
        return f"groups of {group} cut bytes of signs"
    return None


def _many_rows(p: Problem) -> str | None:
    if p.x.shape[0] > LOOKUP_ROWS:
        return f"{p.x.shape[0]} rows, each with tables of its own"
    return _not_signs(p)


def _run_lookup(p: Problem) -> jax.Array:
    s = Signs.of(p)
    return binary_lut_dot(s.x, s.codes, s.scales, s.offsets, group=s.group)


def _run_tiles(p: Problem) -> jax.Array:
    return binary_tiled_dot(
        *Signs.of(p), compute=p.compute_dtype, precision=p.precision
    )


def run_dequantized(p: Problem) -> jax.Array:
    """Return the product with the weight as floats; takes every weight."""
    x = quantized_input(p.x, p.w).astype(p.compute_dtype)
    w = p.w.dequantize(p.compute_dtype)
    return jnp.matmul(x, w, precision=p.precision, preferred_element_type=jnp.float32)


_ANY = ("cpu", "gpu", "tpu")
LOOKUPS: tuple[Kernel, ...] = (
    Kernel("xla.binary_lut_dot", _ANY, _many_rows, _run_lookup, run_dequantized),
    Kernel("xla.binary_tiled_dot", _ANY, _not_signs, _run_tiles, run_dequantized),
)


@functools.lru_cache
def lookups(target: Target) -> tuple[Kernel, ...]:
    """Return a chip's own kernels for binary-coded weights; the same objects always."""
    if target.backend != "gpu":
        return ()

    def declines(p: Problem) -> str | None:
        if target.generation not in generations("gpu"):
            return f"not for {target.generation or 'this kind of gpu'}"
        if p.w.layout != LOOKUP:
            return f"the codes are in layout {p.w.layout!r}, not {LOOKUP!r}"
        if p.w.sharding is not None or divided_mesh(p.w.codes, p.x) is not None:
            return "it runs on one device, not on a mesh: use jax.shard_map"
        return _many_rows(p)

    def run(p: Problem) -> jax.Array:
        from pallas_kernels.gpu.lookup_product import lookup_product

        s = Signs.of(p)
        interpret = bool(target.interpret)
        y = lookup_product(s.x, s.codes, s.scales, interpret=interpret)
        if s.offsets is None:
            return y
        groups = s.x.astype(jnp.float32).reshape(s.x.shape[0], -1, s.group)
        return y + jnp.matmul(jnp.sum(groups, 2), s.offsets, precision="highest")

    row = Kernel("gpu.lookup_product", ("gpu",), declines, run, run_dequantized)
    return (dataclasses.replace(row, accelerated=True),)
