"""Products with binary-coded weights by look-ups: LUT-GEMM (Park et al. 2022)."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# row b holds the eight signs of the byte b, low bit first
SIGNS = (((np.arange(256)[:, None] >> np.arange(8)) & 1) * 2 - 1).astype(np.float32)


def binary_lut_dot(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    offsets: jax.Array | None = None,
    *,
    group: int,
) -> jax.Array:
    """Return ``x @ w`` of weights that are sums of scaled signs.

    ``w = Σ_i α_i · b_i + z`` with ``b_i = ±1``: q bits are q sign matrices. Eight rows
    meet only 256 sums of the activation, whatever the column; so those are made once,
    and a column takes q · K / 8 look-ups and additions and no multiplication but by
    its scales::

        T[s, byte] = Σ_j ±x[8 s + j]        y = Σ_g Σ_i α_ig Σ_{s in g} T[s, c_isn]

    This is the formulation in plain XLA, for every backend: a reference. It keeps no
    float weight, only sums of one group.

    Args:
        x: ``[M, K]``.
        codes: uint8 ``[q, K / 8, N]``: bit j of a byte is the sign of row ``8 s + j``.
        scales: float32 ``[q, groups, N]``.
        offsets: float32 ``[groups, N]``, the z, or None.
        group: rows per scale, a multiple of 8 that divides K.

    Returns:
        float32 ``[M, N]``.

    Raises:
        ValueError: when groups cut bytes or do not divide K.

    Example:
        >>> import jax.numpy as jnp
        >>> codes = jnp.full((1, 1, 1), 0b11111110, jnp.uint8)  # −1 1 1 1 1 1 1 1
        >>> scale = jnp.full((1, 1, 1), 0.5)
        >>> binary_lut_dot(jnp.ones((1, 8)), codes, scale, group=8).tolist()
        [[3.0]]
    """
    rows = codes.shape[1] * 8
    if group % 8 or rows % group:
        raise ValueError(
            f"group={group} must be a multiple of 8 that divides the {rows} rows"
        )
    groups = rows // group
    x = x.astype(jnp.float32).reshape(-1, groups, group // 8, 8)
    tables = jnp.einsum("mgsj,bj->gmsb", x, SIGNS, precision="highest")
    codes = codes.reshape(codes.shape[0], groups, group // 8, -1).swapaxes(0, 1)

    def step(
        total: jax.Array, part: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        table, code, scale = part

        def of_bit(code: jax.Array, scale: jax.Array) -> jax.Array:
            index = code.astype(jnp.int32)[None]
            found = jnp.take_along_axis(table, index, axis=2)
            return jnp.sum(found, axis=1) * scale

        return total + jnp.sum(jax.vmap(of_bit)(code, scale), 0), None

    start = jnp.zeros((x.shape[0], codes.shape[-1]), jnp.float32)
    y, _ = lax.scan(step, start, (tables, codes, scales.swapaxes(0, 1)))
    if offsets is None:
        return y
    sums = jnp.sum(x, axis=(2, 3))
    return y + jnp.matmul(sums, offsets, precision="highest")
