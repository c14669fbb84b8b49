"""LLM.int8(): the activation's outlier columns in floats, beside an integer product."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.blocks import spread
from jaxq.ops.activation import take_columns
from jaxq.qtensor import QTensor
from pallas_kernels import layouts

# The outliers of language models lie in at most 7 columns (Dettmers et al. 2022,
# section 4.1); this many rows of a weight cost next to nothing. Gathering saves time up
# to an eighth of all.
FEW_COLUMNS = 32
MOST_COLUMNS = 1 / 8


def outlier_product(
    x: jax.Array,
    w: QTensor,
    columns: jax.Array,
    whole: Callable[[jax.Array], jax.Array],
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Return ``x[:, columns] @ w[columns]``, at the cost of what there is.

    Without outliers it costs a look at ``columns``. Few are gathered, with the weight's
    rows, into `FEW_COLUMNS` places or into K / 8; with more, the other columns of ``x``
    are zeroed and all of it is multiplied. Shapes are static, and the result is the
    same either way.

    Args:
        x: ``[M, K]``; the product is of its dtype, summed in float32.
        w: planar ``[K, N]``.
        columns: ``bool[K]``, which of them have outliers.
        whole: the product of any ``x`` with all of ``w``.
        precision: as in `jax.lax.dot_general`.

    Returns:
        float32 ``[M, N]``.
    """
    count = jnp.sum(columns, dtype=jnp.int32)

    def none() -> jax.Array:
        return jnp.zeros((x.shape[0], w.shape[1]), jnp.float32)

    def gathered(places: int) -> jax.Array:
        (at,) = jnp.nonzero(columns, size=places, fill_value=0)
        used = jnp.arange(places, dtype=jnp.int32) < count
        picked = jnp.where(used, take_columns(x, at), 0)
        return jnp.matmul(
            picked,
            decoded_rows(w, at).astype(x.dtype),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def many() -> jax.Array:
        return whole(jnp.where(columns, x, 0))

    sizes = sorted({FEW_COLUMNS, max(FEW_COLUMNS, int(w.shape[0] * MOST_COLUMNS))})
    which = jnp.searchsorted(jnp.asarray([0, *sizes], jnp.int32), count)
    some = [functools.partial(gathered, places) for places in sizes]
    return lax.switch(which, (none, *some, many))


def decoded_rows(w: QTensor, at: jax.Array) -> jax.Array:
    """Return rows of a planar matrix as float32, without decoding the others.

    Args:
        w: ``[K, N]``, packed along K, without offset or input scale.
        at: int ``[C]``.
    """
    codes = layouts.unpack_rows(w.codes, w.spec.bits, w.pack, at)

    def per_row(values: jax.Array) -> jax.Array:
        if values.shape[0] > 1:
            values = values[at // w.blocks[0]]
        return spread(values, (1, w.blocks[1]), codes.shape)

    values = w.spec.number_format.decode(codes)
    if w.zeros is not None:
        values = values - per_row(w.zeros.astype(jnp.float32))
    return values * per_row(w.scale_values())
