"""Weight-only products: dequantize a tile of rows, multiply it, forget it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.xla.tiles import Decode, Tiling

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

    ``y = Σ_t x_t @ w_t`` over tiles ``t`` of rows. The body is rematerialized under
    differentiation: a gradient keeps no floats either.

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
    tiling = Tiling.of(codes, scales, bits, pack, group)
    multiply = _matmul(precision) if dot is None else dot
    # one scale per column may wait until the sum is complete
    last = scales.shape[-2] == 1 and codes.ndim == 2
    planes = tiling.planes(codes)

    @jax.checkpoint
    def product(index: jax.Array, x: jax.Array) -> jax.Array:
        w = tiling.weight(planes, None if last else scales, zeros, index, decode)
        return multiply(x, w.astype(compute))

    def step(
        total: jax.Array, tile: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        return total + product(*tile), None

    parts = tiling.split_activation(x.astype(compute))
    first = jnp.int32(0), parts[0]
    if tiling.steps == 1:
        total = product(*first)
    else:
        start = jnp.zeros(jax.eval_shape(product, *first).shape, jnp.float32)
        indices = jnp.arange(tiling.steps, dtype=jnp.int32)
        total, _ = lax.scan(step, start, (indices, parts))
    return total * scales if last else total


def _matmul(precision: lax.PrecisionLike) -> Dot:
    """Return the matrix product with a float32 result."""

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)

    return dot
