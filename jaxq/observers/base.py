"""What an observer is: pure functions over a state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxq.observers.rows import Rows, observe
from jaxq.spec import QuantSpec

Bounds = tuple[jax.Array, jax.Array]


class Observer(NamedTuple):
    """A statistic of an activation, accumulated batch by batch.

    A state is a `NamedTuple` of arrays, with ``tokens`` (int32) among them: how many
    rows were seen. Rows that a mask takes out influence nothing, whatever they hold.
    NaN and Inf that were seen stay visible in the state (see `is_finite`). States of
    stacked layers and of experts come of `jax.vmap` over all the functions.

    Attributes:
        init: from an abstract activation ``[..., K]`` to an empty state.
        update: from (state, activation, mask or None) to the state with that batch in
            it; the mask is bool, True where a row counts, and broadcasts to the
            activation's leading axes.
        merge: from two states to the state of both their batches; associative and
            commutative, so data-parallel calibration merges in any order.
        bounds: from (state, spec) to the range (low, high) that a static scale of that
            spec is made of (see `jaxq.scales.affine`), float32 scalars: NaN when no
            token was seen, or NaN or Inf was. None for a statistic that is no range.
    """

    init: Callable[[jax.ShapeDtypeStruct], Any]
    update: Callable[..., Any]
    merge: Callable[[Any, Any], Any]
    bounds: Callable[[Any, QuantSpec], Bounds] | None = None


def summary(
    init: Callable[[jax.ShapeDtypeStruct], Any],
    see: Callable[[Rows], Any],
    merge: Callable[[Any, Any], Any],
    bounds: Callable[[Any, QuantSpec], Bounds] | None = None,
) -> Observer:
    """Return the observer that merges the state of each batch into what it has.

    Args:
        init: as in `Observer`.
        see: from the rows of one batch to their state.
        merge: as in `Observer`.
        bounds: as in `Observer`.
    """

    def update(state: Any, x: jax.Array, mask: jax.Array | None = None) -> Any:
        seen = observe(see, x, mask)
        refuse_other_width(state, seen)
        return merge(state, seen)

    return Observer(init, update, merge, bounds)


def refuse_other_width(state: Any, seen: Any) -> None:
    """Raise when a batch has not the features that the state was made for."""
    for name, have, got in zip(state._fields, state, seen, strict=True):
        if have.shape != got.shape:
            raise ValueError(
                f"the state's {name} has shape {have.shape}, but that of the batch "
                f"{got.shape}: call init with the shape of this activation (features "
                f"last), and vmap update over stacked states"
            )


def is_finite(state: Any) -> jax.Array:
    """Return whether neither NaN nor Inf was seen, one bool per (stacked) state.

    Every observer lets them through to a float array of its state. An empty state,
    which may hold a neutral infinity, is finite.

    Example:
        >>> from jaxq.observers import minmax
        >>> like = jax.ShapeDtypeStruct((1, 2), jnp.float32)
        >>> state = minmax().update(minmax().init(like), jnp.asarray([[1.0, jnp.nan]]))
        >>> bool(is_finite(state)), bool(is_finite(minmax().init(like)))
        (False, True)
    """
    finite = jnp.asarray(True)
    for leaf in state:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            own = tuple(range(state.tokens.ndim, leaf.ndim))
            finite = finite & jnp.all(jnp.isfinite(leaf), axis=own)
    return finite | (state.tokens == 0)


def honest(state: Any, low: jax.Array, high: jax.Array) -> Bounds:
    """Return the range, or NaN where the state has no token or saw NaN or Inf."""
    usable = is_finite(state) & (state.tokens > 0)
    nan = jnp.float32(jnp.nan)
    return jnp.where(usable, low, nan), jnp.where(usable, high, nan)


def refuse_other_than_integers(spec: QuantSpec, method: str) -> None:
    """Raise when ``method``, which assumes evenly spaced codes, meets other codes."""
    if not spec.number_format.is_integer:
        raise ValueError(
            f"{method} assumes evenly spaced codes, and those of {spec.format!r} are "
            f"not: use histogram_mse, which rounds to the codes themselves"
        )
