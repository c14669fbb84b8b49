"""Static activation scales: one number per weight, found on calibration data."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.observers import OBSERVERS
from jaxq.pipeline.reparametrize import Change
from jaxq.pipeline.rows import Layout, fold_patches, to_rows
from jaxq.pipeline.solve import Task
from jaxq.pipeline.stream import Stream
from jaxq.qtensor import QTensor
from jaxq.scales import static_affine
from jaxq.spec import QuantSpec


def static_activation(
    q: QTensor, task: Task, change: Change, stream: Stream, place: int
) -> QTensor:
    """Return the weight with its activation's static scale, if its rule has one.

    Args:
        q: the solved weight.
        task: what the recipe says of it.
        change: what transforms do to the activation.
        stream: the data at the weight's group.
        place: the number of the meeting in the group.
    """
    rule = task.rule
    if not rule.static or rule.activation is None:
        return q
    name = rule.static if isinstance(rule.static, str) else "minmax"
    meeting = stream.program.groups[stream.stage - 1].meetings[place]
    layout = Layout.of(meeting.product)
    state = None
    for x, mask, sizes in stream.activations(place):
        state = _update(state, x, change, layout, name, mask, sizes)
    own = layout.stacked and layout.patches is None
    scale, zero = _scale(state, name, rule.activation, own)
    shape = [n if a in task.stacked else 1 for a, n in enumerate(task.weight.shape)]

    def fit(values: jax.Array) -> jax.Array:
        one = values.reshape(-1)
        many = one if one.size > 1 else jnp.broadcast_to(one, (math.prod(shape),))
        return many.reshape(shape)

    return dataclasses.replace(
        q,
        activation_scale=fit(scale),
        activation_zero=None if zero is None else fit(zero),
    )


@functools.partial(jax.jit, static_argnames=("layout", "name"))
def _update(
    state: Any,
    x: jax.Array,
    change: Change,
    layout: Layout,
    name: str,
    mask: jax.Array | None,
    sizes: jax.Array | None,
) -> Any:
    """Add one batch to the observer's state."""
    observer = OBSERVERS[name]()
    if layout.patches is not None:
        return _update_patches(state, x, change, layout, name, mask)
    rows, counts = to_rows(x, layout, mask, sizes)
    rows = change.activation(rows.astype(jnp.float32))
    if not layout.stacked:
        state = (
            observer.init(jax.ShapeDtypeStruct(rows.shape, rows.dtype))
            if state is None
            else state
        )
        return observer.update(state, rows, counts)
    if state is None:
        one = observer.init(jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype))
        spread = lambda a: jnp.broadcast_to(a, (len(rows), *a.shape))
        state = jax.tree.map(spread, one)
    counts = jnp.ones(rows.shape[:-1], bool) if counts is None else counts
    return jax.vmap(observer.update)(state, rows, counts)


def _update_patches(
    state: Any,
    x: jax.Array,
    change: Change,
    layout: Layout,
    name: str,
    mask: jax.Array | None,
) -> Any:
    """Add the patches of one batch: one range for all feature groups."""
    observer = OBSERVERS[name]()
    width, groups = layout.width(x.shape), math.prod(layout.stack(x.shape))
    if state is None:
        state = observer.init(jax.ShapeDtypeStruct((1, width), jnp.float32))

    def add(state: Any, counts: jax.Array | None, rows: jax.Array) -> Any:
        rows = change.activation(rows.astype(jnp.float32)).reshape(-1, width)
        return observer.update(
            state, rows, None if counts is None else jnp.tile(counts, groups)
        )

    return fold_patches(layout, add, state, [x], mask)


@functools.partial(jax.jit, static_argnames=("name", "spec", "stacked"))
def _scale(
    state: Any, name: str, spec: QuantSpec, stacked: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Return scale and zero point; an idle expert gets those of the widest other."""
    observer = OBSERVERS[name]()
    assert observer.bounds is not None

    def bounds(state: Any) -> tuple[jax.Array, jax.Array]:
        return observer.bounds(state, spec)  # type: ignore[misc]

    low, high = jax.vmap(bounds)(state) if stacked else bounds(state)
    low = jnp.where(jnp.isnan(low), jnp.nanmin(low), low)
    high = jnp.where(jnp.isnan(high), jnp.nanmax(high), high)
    return static_affine(low, high, spec)
