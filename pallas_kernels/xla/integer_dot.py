"""Integer products: int8 activations with int2..int8 weights, int32 sums per group."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.xla.tiles import Tiling

Decode = Callable[[jax.Array], jax.Array]


def integer_dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Return the int32 product of int8 ``x[..., M, K]`` and ``weight[..., K, N]``."""
    return jnp.matmul(x, weight, preferred_element_type=jnp.int32)


def integer_tiled_dot(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    *,
    bits: int,
    pack: int,
    group: int,
    decode: Decode,
) -> jax.Array:
    """Return ``Σ_g scale_g · (x_g @ (code_g − zero_g))``, integer inside each group.

    Args:
        x: int8 codes of the activations ``[M, K]``, without the weight's padding rows
            or with zeros there.
        codes: packed uint8 ``[K · bits / 8, N]``.
        scales: float32 ``[groups, N]``; one group stands for all rows.
        zeros: int8 like ``scales``, or None; ``code − zero`` must fit int8.
        bits: bits per code.
        pack: rows per packing block.
        group: rows per scale.
        decode: from uint8 codes to int8 numbers.

    Returns:
        float32 ``[M, N]``.
    """
    rows = codes.shape[-2] * 8 // bits
    if x.shape[1] != rows:
        x = jnp.pad(x, ((0, 0), (0, rows - x.shape[1])))
    single = scales.shape[-2] == 1
    group = rows if single else group
    limit = None if single else max(group, 128)
    tiling = Tiling.of(rows, codes.shape[-1], bits, pack, group, limit)

    def step(
        total: jax.Array, tile: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        index, parts = tile
        scale = None if single else tiling.groups_of(scales, index)
        zero = None if zeros is None else tiling.groups_of(zeros, index)
        for i, piece in enumerate(tiling.codes_of(codes, index)):
            w = decode(piece)
            w = w if zero is None else w - zero[i]
            if scale is None:
                total = total + integer_dot(parts[i], w.reshape(-1, w.shape[-1]))
            else:
                total = total + _grouped(parts[i], w, scale[i], tiling)
        return total, None

    dtype = jnp.int32 if single else jnp.float32
    start = jnp.zeros((x.shape[0], codes.shape[-1]), dtype)
    indices = jnp.arange(tiling.steps, dtype=jnp.int32)
    total, _ = lax.scan(step, start, (indices, tiling.split_activation(x)))
    return total.astype(jnp.float32) * scales if single else total


def _grouped(x: jax.Array, w: jax.Array, scale: jax.Array, tiling: Tiling) -> jax.Array:
    """Multiply one piece, summing in int32 within a group and in float32 across them.

    Args:
        x: ``[M, blocks · piece_rows]`` int8.
        w: ``[blocks, piece_rows, N]`` int8.
        scale: ``[blocks or 1, 1, N]``.
        tiling: the geometry; its packing blocks lie inside groups.
    """
    groups = max(tiling.tile // tiling.group, 1)
    if groups == 1:
        total = integer_dot(x, w.reshape(-1, w.shape[-1]))
        return total.astype(jnp.float32) * scale[0]
    parts = x.reshape(x.shape[0], groups, -1).swapaxes(0, 1)
    partial = integer_dot(parts, w.reshape(groups, -1, w.shape[-1]))
    scale = scale[:: scale.shape[0] // groups]
    return jnp.sum(partial.astype(jnp.float32) * scale, axis=0)
