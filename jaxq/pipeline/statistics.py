"""What calibration learns of the activation that a group's weights meet."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxq.explicit_axes import replicated
from jaxq.lift.program import Meeting
from jaxq.observers.gram import cross_gram, gram
from jaxq.observers.magnitude import magnitude
from jaxq.pipeline.rows import Layout, fold_patches, to_rows
from jaxq.pipeline.stream import Stream
from jaxq.solvers.base import Statistics


class Seen(NamedTuple):
    """Sums over batches, each with a leading axis where weights are stacked.

    Attributes:
        gram: ``Σ x xᵀ`` and the tokens.
        magnitude: ``Σ |x|``.
        low: the smallest value of each channel, ``float32[K]``.
        high: the largest.
        drift: ``Σ (x_float − x) xᵀ``, or None.
    """

    gram: Any
    magnitude: Any
    low: jax.Array
    high: jax.Array
    drift: jax.Array | None

    @property
    def tokens(self) -> jax.Array:
        """How many tokens were seen, per stacked weight."""
        return self.gram.tokens

    @property
    def absmax(self) -> jax.Array:
        """The largest magnitude of each channel; 0 where no token came."""
        largest = jnp.maximum(jnp.abs(self.low), jnp.abs(self.high))
        return jnp.where(self.tokens[..., None] > 0, largest, jnp.float32(0))

    def statistics(self) -> Statistics:
        """Return what solvers take."""
        return Statistics(
            self.gram.total,
            self.tokens,
            self.drift,
            self.magnitude.total,
            self.absmax,
        )


def observe(stream: Stream, place: int, floats: Stream | None) -> tuple[Seen, int]:
    """Run the statistics of one activation over all batches.

    Args:
        stream: the data, at the group of the activation.
        place: the number of a meeting with it.
        floats: the float model's data at the same place, for the drift; or None.

    Returns:
        The sums, and the number of the first batch that holds NaN or Inf, or -1.
    """
    meeting = stream.program.groups[stream.stage - 1].meetings[place]
    layout = Layout.of(meeting.product)
    ahead: Iterator[Any] = iter(()) if floats is None else floats.activations(place)
    total, finite = None, []
    for x, mask, sizes in stream.activations(place):
        reference = next(ahead)[0] if floats is not None else None
        if total is None:
            total = empty(x, layout, floats is not None)
        total, fine = _update(
            total, x, layout=layout, mask=mask, sizes=sizes, reference=reference
        )
        finite.append(fine)
    if total is None:
        raise ValueError(
            "calibration has no batch: give at least one tuple of the function's "
            "other arguments"
        )
    bad = [i for i, fine in enumerate(finite) if not bool(fine)]
    return total, bad[0] if bad else -1


def empty(x: jax.Array, layout: Layout, drift: bool) -> Seen:
    """Return the statistics of no data."""
    width, stack = layout.width(x.shape), layout.stack(x.shape)
    like = jax.ShapeDtypeStruct((1, width), jnp.float32)

    def stacked(state: Any) -> Any:
        return jax.tree.map(
            lambda a: jnp.broadcast_to(a, (*stack, *a.shape)).copy(), state
        )

    return Seen(
        stacked(gram().init(like)),
        stacked(magnitude().init(like)),
        jnp.full((*stack, width), jnp.inf, jnp.float32),
        jnp.full((*stack, width), -jnp.inf, jnp.float32),
        jnp.zeros((*stack, width, width), jnp.float32) if drift else None,
    )


def updated(
    total: Seen,
    x: jax.Array,
    layout: Layout,
    mask: jax.Array | None,
    sizes: jax.Array | None,
    reference: jax.Array | None,
) -> tuple[Seen, jax.Array]:
    """Add one batch, and say whether it is finite."""
    run = functools.partial(_updated, layout)
    return replicated(run, total, x, mask, sizes, reference)


def _updated(
    layout: Layout,
    total: Seen,
    x: jax.Array,
    mask: jax.Array | None,
    sizes: jax.Array | None,
    reference: jax.Array | None,
) -> tuple[Seen, jax.Array]:
    if layout.patches is not None:
        return _with_patches(total, x, layout, mask, reference)
    rows, counts = to_rows(x, layout, mask, sizes)
    ahead = None
    # tokens sorted by expert are in another order in the float model, where some go to
    # other experts: rows that are no pairs would say nothing of the drift
    if reference is not None and not layout.groups:
        ahead, _ = to_rows(reference, layout, mask, sizes)
    if not layout.stacked:
        return _update_one(total, rows, counts, ahead)
    parts = (total, rows, counts, ahead)
    total, fine = jax.lax.map(lambda part: _update_one(*part), parts)
    return total, jnp.all(fine)


_update = functools.partial(jax.jit, static_argnames="layout", donate_argnames="total")(
    updated
)


def _with_patches(
    total: Seen,
    x: jax.Array,
    layout: Layout,
    mask: jax.Array | None,
    reference: jax.Array | None,
) -> tuple[Seen, jax.Array]:
    """Add the patches of one batch; each feature group's to its own statistics."""

    def add(
        state: tuple[Seen, jax.Array],
        counts: jax.Array | None,
        rows: jax.Array,
        ahead: jax.Array | None = None,
    ) -> tuple[Seen, jax.Array]:
        update = _update_one
        if layout.stacked:
            some = None if ahead is None else 0
            update = jax.vmap(_update_one, in_axes=(0, 0, None, some))
        seen, fine = update(state[0], rows, counts, ahead)
        return seen, state[1] & jnp.all(fine)

    arrays = [a for a in (x, reference) if a is not None]
    return fold_patches(layout, add, (total, jnp.asarray(True)), arrays, mask)


def _update_one(
    total: Seen, rows: jax.Array, counts: jax.Array | None, ahead: jax.Array | None
) -> tuple[Seen, jax.Array]:
    """Add one batch of one weight's rows."""
    values = rows.astype(jnp.float32)
    keep = jnp.ones((len(rows), 1), bool) if counts is None else counts[:, None]
    infinite = jnp.float32(jnp.inf)
    low = jnp.min(jnp.where(keep, values, infinite), axis=0)
    high = jnp.max(jnp.where(keep, values, -infinite), axis=0)
    fine = jnp.all(jnp.isfinite(jnp.where(keep, values, jnp.float32(0))))
    drift = total.drift
    if drift is not None and ahead is not None:
        drift = drift + cross_gram(ahead, rows, counts)
    return (
        Seen(
            gram().update(total.gram, rows, counts),
            magnitude().update(total.magnitude, rows, counts),
            jnp.minimum(total.low, low),
            jnp.maximum(total.high, high),
            drift,
        ),
        fine,
    )


def merge(a: Seen, b: Seen) -> Seen:
    """Return the sums over both."""
    return Seen(
        gram().merge(a.gram, b.gram),
        magnitude().merge(a.magnitude, b.magnitude),
        jnp.minimum(a.low, b.low),
        jnp.maximum(a.high, b.high),
        None if a.drift is None or b.drift is None else a.drift + b.drift,
    )


def check(seen: Seen, bad: int, meetings: Sequence[Meeting], batches: int) -> None:
    """Raise when what was seen cannot calibrate anything.

    Raises:
        ValueError: on NaN or Inf, on no token at all, and on a constant activation.
    """
    names = " and ".join(repr(str(m.key)) for m in meetings[:3])
    if bad >= 0:
        dtype = meetings[0].product.use.activation
        half = dtype is not None and dtype.dtype == jnp.float16
        hint = "; float16 overflows beyond 65504: run the model in bfloat16 or float32"
        raise ValueError(
            f"the activation that {names} meets holds NaN or Inf in calibration batch "
            f"{bad} of {batches} (counted from 0): repair that batch or the model"
            + (hint if half else "")
        )
    tokens = int(jnp.sum(seen.tokens))
    if tokens == 0:
        raise ValueError(
            f"no token of the calibration data reached {names}: give data that uses "
            f"it, or keep it out of calibration with a rule like "
            f"Rule('<path>', spec, solver='rtn')"
        )
    if tokens > 1 and not seen.tokens.ndim and bool(jnp.all(seen.low == seen.high)):
        raise ValueError(
            f"the activation that {names} meets is the same for all {tokens:,} tokens "
            f"of the calibration data, so nothing can be learned from it: give varied "
            f"data, or keep it out with a rule like Rule('<path>', spec, solver='rtn')"
        )
