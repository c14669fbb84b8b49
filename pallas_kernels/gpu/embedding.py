"""Rows of an embedding, gathered out of packed words.

In the GPU layout a token's embedding (a column of the output projection it is tied to)
is one run of 64 bytes per slab. XLA gathers those, unpacks and scales them in a single
fusion that reads nothing else, so this needs no kernel of its own.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.gpu.cases import numbers
from pallas_kernels.gpu.layout import WORDS, matrix
from pallas_kernels.kernel import Coding


def gather_columns(
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    tokens: jax.Array,
    *,
    coding: Coding,
    group: int,
    dtype: DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """Return ``((value(codes) − zeros) · scales)[:, tokens].T``.

    Args:
        codes: uint16 ``[slabs, 32 N]`` (see `layout`), of a weight ``[K, N]``.
        scales: float ``[groups, N]``; groups and N may be 1.
        zeros: integers like ``scales``, or None.
        tokens: int ``[T]``, each below N.
        coding: what codes stand for.
        group: rows per scale.
        dtype: of the result.

    Returns:
        ``[T, K]``.
    """
    inner, columns = matrix(codes.shape, coding)
    words = codes.reshape(codes.shape[0], columns, WORDS)[:, tokens]
    mine = words.reshape(codes.shape[0], -1)
    values = numbers(mine, coding, "float32")

    def spread(a: jax.Array) -> jax.Array:
        a = jnp.broadcast_to(a.astype(jnp.float32), (a.shape[0], columns))[:, tokens]
        return jnp.repeat(a, group, axis=0)[:inner] if a.shape[0] > 1 else a

    values = values if zeros is None else values - spread(zeros)
    return (values * spread(scales)).T.astype(dtype)
