"""Weight-only products: dequantize a tile of rows, multiply it, forget it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.xla.tiles import Tiling

Decode = Callable[[jax.Array], jax.Array]
Dot = Callable[[jax.Array, jax.Array], jax.Array]


def tiled_dot(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    *,
    bits: int,
    pack: int,
    group: int,
    decode: Decode,
    dot: Dot | None = None,
    compute: DTypeLike = jnp.float32,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Return ``x @ ((decode(codes) − zeros) · scales)`` without the float weight.

    ``y = Σ_t x_t @ w_t`` over tiles ``t`` of rows; inside a tile every contiguous row
    range of the packing is multiplied on its own, so that nothing is concatenated. The
    body is rematerialized under differentiation: a gradient keeps no floats either.

    Args:
        x: activations ``[M, K]``; K may lack the weight's padding rows.
        codes: packed uint8 ``[..., K · bits / 8, N]``.
        scales: float32 ``[..., groups, N]``; one group stands for all rows.
        zeros: float32 like ``scales``, or None.
        bits: bits per code.
        pack: rows per packing block.
        group: rows per scale.
        decode: from uint8 codes to float32 numbers.
        dot: the product of ``[M, k]`` with ``[..., k, N]`` in float32; a matrix product
            by default (a grouped one serves mixtures of experts).
        compute: the dtype of the product's operands.
        precision: of the product.

    Returns:
        float32, ``[M, N]`` for the default ``dot``.
    """
    rows = codes.shape[-2] * 8 // bits
    group = rows if scales.shape[-2] == 1 else group
    tiling = Tiling.of(rows, codes.shape[-1], bits, pack, group)
    if x.shape[1] != rows:
        x = jnp.pad(x, ((0, 0), (0, rows - x.shape[1])))
    if dot is None:
        dot = _matmul(precision)
    scale_last = scales.shape[-2] == 1 and codes.ndim == 2

    def step(
        total: jax.Array, tile: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        index, parts = tile
        pieces = tiling.codes_of(codes, index)
        scale = None if scale_last else tiling.groups_of(scales, index)
        zero = None if zeros is None else tiling.groups_of(zeros, index)
        for i, piece in enumerate(pieces):
            w = decode(piece)
            w = w if zero is None else w - zero[i]
            w = w if scale is None else w * scale[i]
            w = w.reshape(*w.shape[:-3], -1, w.shape[-1]).astype(compute)
            total = total + dot(parts[i], w)
        return total, None

    parts = tiling.split_activation(x.astype(compute))
    out = jax.eval_shape(dot, x.astype(compute), _rows_like(codes, rows, compute))
    start = jnp.zeros(out.shape, jnp.float32)
    if tiling.steps == 1:
        total, _ = jax.checkpoint(step)(start, (jnp.int32(0), parts[0]))
    else:
        indices = jnp.arange(tiling.steps, dtype=jnp.int32)
        total, _ = lax.scan(jax.checkpoint(step), start, (indices, parts))
    return total * scales if scale_last else total


def _rows_like(codes: jax.Array, rows: int, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """Return the abstract float weight of packed codes."""
    return jax.ShapeDtypeStruct((*codes.shape[:-2], rows, codes.shape[-1]), dtype)


def _matmul(precision: lax.PrecisionLike) -> Dot:
    """Return the matrix product with a float32 result."""

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)

    return dot
