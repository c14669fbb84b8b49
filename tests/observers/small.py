"""Every observer at a small size, its functions compiled once, and data to see."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.observers import OBSERVERS

SIZES = {
    "percentile": {"percent": 90.0, "bins": 256},
    "histogram_mse": {"bins": 256},
    "histogram_kl": {"bins": 256},
    "reservoir": {"capacity": 7},
}
# What depends on how tokens are cut into batches.
BATCHWISE = ("moving_average", "reservoir")
K = 6
SHAPE = (8, 5, K)
LIKE = jax.ShapeDtypeStruct(SHAPE, jnp.float32)


@functools.cache
def small(name):
    return OBSERVERS[name](**SIZES.get(name, {}))


@functools.cache
def init(name):
    return small(name).init(LIKE)


TRACES = collections.Counter()


@functools.cache
def update(name):
    """The compiled update, with a mask, which counts how often it is traced."""

    def counted(state, x, mask):
        TRACES[name] += 1
        return small(name).update(state, x, mask)

    return jax.jit(counted)


@functools.cache
def merge(name):
    return jax.jit(small(name).merge)


def see(observer, *arrays):
    """The state of a few batches, one after the other."""
    state = observer.init(jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32))
    step = jax.jit(observer.update)
    for x in arrays:
        state = step(state, jnp.asarray(x))
    return jax.device_get(state)


def find(observer, state, spec):
    """The range, low and high, as numbers."""
    low, high = jax.jit(observer.bounds, static_argnums=1)(state, spec)
    return float(low), float(high)


def batch(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(SHAPE) * scale * np.exp(rng.standard_normal(K))
    x[0, 0, :2] = 0
    return jnp.asarray(x, jnp.float32)


def same(a, b):
    """Equal in every bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b):
    """Equal up to the order of float32 sums of a few hundred terms."""
    assert jax.tree.map(lambda x: (x.shape, x.dtype), a) == jax.tree.map(
        lambda x: (x.shape, x.dtype), b
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b
    )
