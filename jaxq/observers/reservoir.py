"""A uniformly random sample of the rows of an activation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.observers.base import Observer, refuse_other_width
from jaxq.observers.rows import Rows, observe, width

# Fixed, since keys are stored as their bits: the words of a key depend on its kind.
_KEY = "threefry2x32"
_LAST = 0xFFFFFFFF


class Reservoir(NamedTuple):
    """A sample of rows, and how many tokens it is a sample of.

    Attributes:
        samples: ``float32[capacity, K]``, by ascending priority; free places are zeros.
        priority: ``uint32[capacity, 2]``, the random number (high and low word) by
            which a row was drawn; all bits set in free places.
        key: ``uint32[2]``, the random key, which stays as it is.
        largest: ``max |x|`` over all rows, drawn or not, float32: NaN or Inf shows.
        tokens: rows seen, int32.
    """

    samples: jax.Array
    priority: jax.Array
    key: jax.Array
    largest: jax.Array
    tokens: jax.Array

    @property
    def valid(self) -> jax.Array:
        """Which places of the sample are taken, ``bool[capacity]``."""
        capacity = self.priority.shape[-2]
        return jnp.arange(capacity) < self.tokens[..., None]


def reservoir(capacity: int = 512, seed: int = 0) -> Observer:
    """Return the observer that keeps a uniformly random sample of rows.

    Every row draws a random priority, and the ``capacity`` smallest stay: every set of
    rows is equally likely, and the sample of two samples is the sample of all their
    rows, in any order and grouping (bottom-k sampling, Cohen and Kaplan 2007).
    Priorities come of the key, of the batch's contents and of the row's place among the
    rows that count: batches, shards and layers draw independently from one key, and the
    same run draws the same rows. Only a batch seen twice, bit for bit, draws the same
    numbers twice.

    Args:
        capacity: how many rows are kept.
        seed: of the random key.

    Raises:
        ValueError: when ``capacity`` is below 1.

    Example:
        >>> observer = reservoir(capacity=3)
        >>> x = jnp.arange(10.0)[:, None]
        >>> state = observer.update(observer.init(x), x)
        >>> len(set(state.samples[:, 0].tolist())), int(state.tokens)
        (3, 10)
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity} must be at least 1 row; 512 is usual")

    def init(like: jax.ShapeDtypeStruct) -> Reservoir:
        return Reservoir(
            samples=jnp.zeros((capacity, width(like)), jnp.float32),
            priority=jnp.full((capacity, 2), _LAST, jnp.uint32),
            key=jax.random.key_data(jax.random.key(seed, impl=_KEY)),
            largest=jnp.zeros((), jnp.float32),
            tokens=jnp.zeros((), jnp.int32),
        )

    def see(rows: Rows, key: jax.Array) -> Reservoir:
        flat = rows.values.reshape(-1, rows.values.shape[-1])
        keep = rows.keep.reshape(-1)
        samples, priority = _first(flat, _priorities(flat, keep, key), capacity)
        largest = jnp.max(jnp.abs(flat), initial=jnp.float32(0))
        return Reservoir(samples, priority, key, largest, rows.tokens)

    def update(
        state: Reservoir, x: jax.Array, mask: jax.Array | None = None
    ) -> Reservoir:
        seen = observe(see, x, mask, state.key)
        refuse_other_width(state, seen)
        return merge(state, seen)

    def merge(a: Reservoir, b: Reservoir) -> Reservoir:
        samples = jnp.concatenate([a.samples, b.samples])
        priority = jnp.concatenate([a.priority, b.priority])
        samples, priority = _first(samples, priority, capacity)
        largest = jnp.maximum(a.largest, b.largest)
        key = jnp.maximum(a.key, b.key)
        return Reservoir(samples, priority, key, largest, a.tokens + b.tokens)

    return Observer(init, update, merge)


def _priorities(flat: jax.Array, keep: jax.Array, key: jax.Array) -> jax.Array:
    """Return 64 random bits per row, ``uint32[rows, 2]``; the last for those masked."""
    place = jnp.cumsum(keep.astype(jnp.int32)) - 1
    own = jax.random.fold_in(
        jax.random.wrap_key_data(key, impl=_KEY), _digest(flat, keep, place)
    )

    def draw(place: jax.Array) -> jax.Array:
        return jax.random.bits(jax.random.fold_in(own, place), (2,), jnp.uint32)

    return jnp.where(keep[:, None], jax.vmap(draw)(place), jnp.uint32(_LAST))


def _digest(flat: jax.Array, keep: jax.Array, place: jax.Array) -> jax.Array:
    """Return 32 bits that depend on every bit of the batch, and on no padding.

    A sum modulo 2^32 of words times odd numbers: the same in any order of summation.
    """
    bits = lax.bitcast_convert_type(flat, jnp.uint32)
    columns = flat.shape[1]
    index = place[:, None] * columns + jnp.arange(columns, dtype=jnp.int32)
    odd = 2 * index.astype(jnp.uint32) + 1
    # The high bits of floats are alike: mix them down first.
    mixed = (bits ^ (bits >> 15)) * jnp.uint32(0x85EBCA6B)
    return jnp.sum(
        jnp.where(keep[:, None], mixed * odd, jnp.uint32(0)), dtype=jnp.uint32
    )


def _first(
    samples: jax.Array, priority: jax.Array, capacity: int
) -> tuple[jax.Array, jax.Array]:
    """Return the ``capacity`` rows of smallest priority, in its order."""
    short = max(capacity - samples.shape[0], 0)
    samples = jnp.pad(samples, ((0, short), (0, 0)))
    priority = jnp.pad(
        priority, ((0, short), (0, 0)), constant_values=jnp.uint32(_LAST)
    )
    place = jnp.arange(samples.shape[0], dtype=jnp.int32)
    high, low, place = lax.sort((priority[:, 0], priority[:, 1], place), num_keys=2)
    chosen = place[:capacity]
    priority = jnp.stack([high[:capacity], low[:capacity]], axis=1)
    return samples[chosen], priority
