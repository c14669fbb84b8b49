"""What a tree of parameters weighs, as stored."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.qtensor import is_qtensor


def parameter_count(params: Any) -> int:
    """Return the number of weights; a quantized tensor counts by its logical shape."""
    leaves = jax.tree.leaves(params, is_leaf=is_qtensor)
    return sum(math.prod(leaf.shape) for leaf in leaves)


def stored_bytes(params: Any) -> int:
    """Return the bytes of all arrays: codes, scales, zeros, and what stayed float."""
    leaves = jax.tree.leaves(params)
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in leaves)


def bits_per_weight(params: Any) -> float:
    """Return stored bits per weight over the whole tree, float leaves included.

    Example:
        >>> bits_per_weight({"w": jnp.zeros((4, 4), jnp.bfloat16)})
        16.0
    """
    return stored_bytes(params) * 8 / max(parameter_count(params), 1)
