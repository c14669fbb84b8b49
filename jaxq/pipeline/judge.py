"""Judge candidates for some weights by what the whole block makes of them."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.lift.program import Key
from jaxq.pipeline.store import Store, as_multiplied
from jaxq.pipeline.stream import Batch, Stream
from jaxq.qtensor import QTensor

# a few batches are enough to rank candidates
BATCHES = 4


@dataclasses.dataclass
class Judge:
    """The error of a block's output when some of its weights are replaced.

    All other weights of the block are float, and the float block sees the same input:
    what is judged is what the candidates do, not what came before them.

    Attributes:
        stream: the data at the group whose weights are judged.
        segments: how many segments lead to the end of the block.
        store: reads float weights.
    """

    stream: Stream
    segments: int
    store: Store

    def __call__(self, candidates: Mapping[Key, Any]) -> float:
        """Return ``Σ ‖y − ŷ‖² / ‖y‖²`` over the values that the block hands on."""

        def weight(key: Key) -> Any:
            found = candidates.get(key)
            if found is None:
                return self.store.float_weight(key)
            return as_multiplied(found) if isinstance(found, QTensor) else found

        moved = self._run(weight)
        pairs = zip(self._exact, moved, strict=True)
        return float(sum(_relative(a, b) for a, b in pairs))

    @functools.cached_property
    def _exact(self) -> list[list[jax.Array]]:
        return self._run(self.store.float_weight)

    def _run(self, weight: Any) -> list[list[jax.Array]]:
        stream = self.stream.take(BATCHES)
        for _ in range(self.segments):
            stream = stream.advance(weight)
        return [_counted(batch) for batch in stream.batches]


def _counted(batch: Batch) -> list[jax.Array]:
    """Return a batch's values, those of tokens that do not count as zeros."""
    mask = batch.mask
    if mask is None:
        return list(batch.values.values())
    return [
        jnp.where(mask.reshape(*mask.shape, *(1,) * (v.ndim - mask.ndim)), v, 0)
        if v.shape[: mask.ndim] == mask.shape
        else v
        for v in batch.values.values()
    ]


@jax.jit
def _relative(exact: list[jax.Array], moved: list[jax.Array]) -> jax.Array:
    """Return the squared error over the squared size, summed over float values."""
    total = jnp.float32(0)
    for a, b in zip(exact, moved, strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            size = jnp.sum(a * a)
            error = jnp.sum((a - b) ** 2)
            total = total + jnp.where(size > 0, error / size, jnp.float32(0))
    return total
