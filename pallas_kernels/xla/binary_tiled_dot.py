"""Products of many rows with binary-coded weights: one group as floats at a time."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike


def binary_tiled_dot(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    offsets: jax.Array | None = None,
    *,
    compute: DTypeLike = jnp.float32,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Return ``x @ (Σ_i α_i · b_i + z)``, the weights of one group of rows at a time.

    Where look-ups take longer than a matrix product: from a few rows on, as every row
    of ``x`` needs tables of its own.

    Args:
        x: ``[M, K]``.
        codes: uint8 ``[q, K / 8, N]``: bit j of a byte is the sign of row ``8 s + j``.
        scales: float32 ``[q, groups, N]``, of groups of equally many bytes.
        offsets: float32 ``[groups, N]``, or None.
        compute: the dtype of the product's operands.
        precision: of the product.

    Returns:
        float32 ``[M, N]``.
    """
    planes, length, columns = codes.shape
    groups = scales.shape[1]
    parts = x.astype(compute).reshape(-1, groups, length // groups * 8).swapaxes(0, 1)
    bytes_ = codes.reshape(planes, groups, -1, 1, columns).swapaxes(0, 1)
    places = np.arange(8, dtype=np.uint8)[:, None]

    def step(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        rows, byte, scale, offset = part
        sign = (byte >> places) & np.uint8(1) != 0
        scale = scale[:, None, None]
        weight = jnp.sum(jnp.where(sign, scale, -scale), axis=0) + offset
        weight = weight.reshape(-1, columns).astype(compute)
        y = jnp.matmul(
            rows, weight, precision=precision, preferred_element_type=jnp.float32
        )
        return total + y, None

    none = jnp.zeros((groups, 1), jnp.float32)
    offsets = none if offsets is None else offsets
    start = jnp.zeros((x.shape[0], columns), jnp.float32)
    y, _ = lax.scan(step, start, (parts, bytes_, scales.swapaxes(0, 1), offsets))
    return y
