"""`explain_cache`: which kernel attends to a cache, layer by layer, and its bytes."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.kvcache.quantized import QuantizedCache
from jaxq.kvcache.table import Cache, cache_bytes
from jaxq.ops import Choice

FLOATS = Choice("xla.attention")  # what attends to a cache of floats, on every chip


@dataclasses.dataclass(frozen=True)
class CacheExplanation:
    """What a step of a model does with a cache.

    Attributes:
        choices: per layer, the kernel that attends and what those before it said.
        nbytes: of all layers' keys, values and scales.
    """

    choices: tuple[Choice, ...]
    nbytes: int

    def __iter__(self) -> Iterator[Choice]:
        """Iterate over the layers."""
        return iter(self.choices)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.choices)

    def __str__(self) -> str:
        """Return a line per run of layers that do the same, and the bytes."""
        lines, first = [], 0
        for choice, run in itertools.groupby(self.choices):
            last = first + len(list(run)) - 1
            name = f"layer {first}" if last == first else f"layers {first}-{last}"
            why = "; ".join(f"{kernel}: {reason}" for kernel, reason in choice.declined)
            lines.append(f"{name} -> {choice.kernel}" + (f"   ({why})" if why else ""))
            first = last + 1
        return "\n".join([*lines, f"{self.nbytes:,} bytes"])


def explain_cache(
    apply: Callable[..., Any], params: Any, cache: Cache, tokens: int = 1
) -> CacheExplanation:
    """Say which kernel each layer attends with when tokens are added to a cache.

    Nothing is computed: the model is traced on abstract values.

    Args:
        apply: `apply(params, tokens, positions, cache) -> (logits, cache)`.
        params: its first argument.
        cache: real or abstract.
        tokens: how many are added to each row.
    """
    nbytes = cache_bytes(cache)
    if not isinstance(cache, QuantizedCache):
        return CacheExplanation((FLOATS,) * len(cache.layers), nbytes)
    noting = tuple(dataclasses.replace(layer, choices=()) for layer in cache.layers)
    rows = cache.positions.shape[0]
    places = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    started = dataclasses.replace(cache, layers=noting)
    _, after = jax.eval_shape(apply, params, places, places, started)
    return CacheExplanation(
        tuple(layer.choices[0] for layer in after.layers if layer.choices), nbytes
    )
