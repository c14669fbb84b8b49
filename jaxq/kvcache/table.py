"""Which caches there are, and how one is made."""

import math
from typing import Any

import jax

from jaxq.kvcache.floating import KVCache, float_cache
from jaxq.kvcache.quantized import QuantizedCache, quantized_cache
from jaxq.names import lookup
from jaxq.spec import QuantSpec
from pallas_kernels.target import Target

Cache = KVCache | QuantizedCache

FLOAT = "float"
# name -> how a token's head is rounded; None keeps floats
CACHES: dict[str, QuantSpec | None] = {
    FLOAT: None,
    "int8": QuantSpec("int8", block="token"),
    # signed scales: all 16 codes, a tenth and more less divergence (kv_cache.md)
    "int4": QuantSpec("int4", block="token", grid="full"),
}


def empty_cache(
    config: Any,
    batch: int,
    slots: int,
    dtype: Any,
    kind: str = FLOAT,
    target: Target | None = None,
) -> Cache:
    """Return a cache with room for `slots` tokens in each of `batch` rows.

    Args:
        config: of the model: `num_layers`, `num_kv_heads` and `head_dim` are read.
        batch: rows.
        slots: tokens per row; of a cache of floats, padding included.
        dtype: of keys and values, where they stay floats.
        kind: a key of `CACHES`.
        target: the chip that attention to codes runs on; by default this one.

    Raises:
        UnknownNameError: there is no cache of that kind; the known ones are named.
        ValueError: the model's heads cannot be packed so.
    """
    spec = lookup(CACHES, kind, "cache")
    if spec is None:
        return float_cache(config, batch, slots, dtype)
    return quantized_cache(config, batch, slots, spec, target)


def cache_bytes(cache: Cache) -> int:
    """Return the stored bytes of all layers: codes or floats, and scales.

    Takes real caches and abstract ones (`jax.eval_shape`).
    """
    return sum(
        math.prod(a.shape) * (4 if a.dtype == "int4" else 8 * a.dtype.itemsize) // 8
        for a in jax.tree.leaves(cache.layers)
    )
