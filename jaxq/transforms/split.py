"""OCS: store the channels with the largest weights as several smaller ones."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.quantize import Blocking, block_bounds
from jaxq.scales import affine
from jaxq.spec import QuantSpec

# Just below ½, so that halves of w = 1.5 do not land on ties, where rounding half to
# even would lose or gain a step: with ½ it holds for ⌊x + ½⌋ alone.
HALF = 0.5 - 2.0**-14
# The step depends on the rows and the rows on the step; it settles by a factor of 2
# (2 bits) to 250 (8 bits) each time.
ROUNDS = 8


@functools.partial(jax.jit, static_argnames=("spec", "ratio"))
def split(
    weight: jax.Array, spec: QuantSpec, *, ratio: float = 0.02
) -> tuple[jax.Array, jax.Array]:
    """Return a weight whose outlier channels are split, and the channel of every row.

    ``⌈ratio · K⌉`` times, the row with the largest magnitude is replaced by two,
    ``(w − Δ/2) / 2`` and ``(w + Δ/2) / 2`` with Δ the step of the grid (Zhao et al.
    2019, section 3.3): the codes of the two add up to the code of w, where halves alone
    would both be rounded the same way. A row may be split again. Where blocks run along
    the contraction, or the format is no integer, no common Δ exists and rows are
    halved.

    Args:
        weight: ``float[*stack, K, N]``.
        spec: how it will be quantized, to nearest and with nothing clipped.
        ratio: extra rows for each row; 0.01 to 0.05 is usual.

    Returns:
        ``w'[*stack, K', N]`` in the dtype of the weight, float32 at least, and ``index:
        int32[*stack, K']``, with ``x @ w = x[..., index] @ w'``. The first K rows keep
        their places.

    Raises:
        ValueError: when ``ratio`` is not between 0 and 1.

    Example:
        >>> w = jnp.asarray([[1.0], [7.0], [2.0]])
        >>> rows, index = split(w, QuantSpec("nf4", "tensor"), ratio=0.1)
        >>> rows[:, 0].tolist(), index.tolist()
        ([1.0, 3.5, 2.0, 3.5], [0, 1, 2, 1])
    """
    if not 0 <= ratio <= 1:
        raise ValueError(
            f"ratio={ratio!r} must lie between 0 and 1: 0.02 adds two rows to a hundred"
        )
    extra = math.ceil(ratio * weight.shape[-2])
    one = functools.partial(_split_matrix, spec=spec, extra=extra)
    for _ in weight.shape[:-2]:
        one = jax.vmap(one)
    narrow = jnp.finfo(weight.dtype).bits < 32
    return one(weight.astype(jnp.float32) if narrow else weight)


def _split_matrix(
    weight: jax.Array, spec: QuantSpec, extra: int
) -> tuple[jax.Array, jax.Array]:
    """Split one matrix ``[K, N]`` into ``K + extra`` rows."""
    index, share, shift = _choose(jnp.max(jnp.abs(weight), 1), extra)
    rows = weight[index] * share[:, None].astype(weight.dtype)
    if not _has_common_step(spec):
        return rows, index
    shift = shift[:, None].astype(weight.dtype)
    where = Blocking.of(spec, rows.shape, 0)

    def shifted(step: jax.Array) -> jax.Array:
        return rows + shift * step.astype(weight.dtype)

    def settle(i: int, step: jax.Array) -> jax.Array:
        scale, _ = affine(*block_bounds(shifted(step), where.block), spec)
        return jnp.abs(scale)

    start = jnp.zeros_like(block_bounds(rows, where.block)[0])
    return shifted(lax.fori_loop(0, ROUNDS, settle, start)), index


def _has_common_step(spec: QuantSpec) -> bool:
    """Whether all the rows of an output share one uniform grid."""
    return spec.number_format.is_integer and isinstance(spec.block, str)


def _choose(peak: jax.Array, extra: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return for every row its channel, its share of it, and its shift in steps.

    Args:
        peak: the largest magnitude of every channel ``[K]``.
        extra: how many splits there are.
    """
    length = peak.shape[0]
    state = (
        jnp.pad(peak.astype(jnp.float32), (0, extra)),
        jnp.pad(jnp.arange(length, dtype=jnp.int32), (0, extra)),
        jnp.ones(length + extra, jnp.float32),
        jnp.zeros(length + extra, jnp.float32),
    )

    def step(i: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        peak, index, share, shift = state
        at, new = jnp.argmax(peak), length + i
        both = jnp.stack([at, jnp.asarray(new, at.dtype)])
        sides = (shift[at] + jnp.asarray([-HALF, HALF], jnp.float32)) / 2
        return (
            peak.at[both].set(peak[at] / 2),
            index.at[new].set(index[at]),
            share.at[both].set(share[at] / 2),
            shift.at[both].set(sides),
        )

    _, index, share, shift = lax.fori_loop(0, extra, step, state)
    return index, share, shift
