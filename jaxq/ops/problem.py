"""What a product is, and what a kernel of the dispatch table offers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxq.ops.activation import static_or_dynamic
from jaxq.qtensor import QTensor

SMALL_ROWS = 4  # up to here, converting tiles to bfloat16 costs more than it saves


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product ``x[M, K] @ w[K, N]`` in the form every kernel takes.

    Attributes:
        x: the activation, float.
        w: the weight; packed along K, its input scale already applied to ``x``.
        precision: as in `jax.lax.dot_general`.
        layer: with a stack of weights ``w[L, K, N]``, which of them; else None.
        out_dtype: what the result will be cast to; a kernel may write it at once.
    """

    x: jax.Array
    w: QTensor
    precision: lax.PrecisionLike = None
    layer: jax.Array | None = None
    out_dtype: DTypeLike = jnp.float32

    @property
    def compute_dtype(self) -> DTypeLike:
        """The operand dtype: float32, or bfloat16 for some rows of bfloat16."""
        some = self.x.shape[0] > SMALL_ROWS
        return self.x.dtype if some and self.x.dtype == jnp.bfloat16 else jnp.float32

    def arrays(self, dtype: DTypeLike) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Return codes, and per column float32 scales and zeros in ``dtype``."""
        zeros = self.w.zeros
        return (
            self.w.codes,
            self.per_column(self.w.scale_values()),
            None if zeros is None else self.per_column(zeros.astype(dtype)),
        )

    @property
    def packing(self) -> dict[str, Any]:
        """How the kernels' codes are packed and grouped."""
        return {
            "bits": self.w.spec.bits,
            "pack": self.w.pack,
            "group": self.w.blocks[0],
        }

    def quantized_activation(self) -> QTensor:
        """Return ``x`` quantized as the weight asks.

        Raises:
            ValueError: when the weight leaves activations float.
        """
        if self.w.activation is None:
            raise ValueError(f"{self.w!r} leaves its activations float")
        return static_or_dynamic(self.x, self.w, self.w.activation)

    def per_column(self, values: jax.Array) -> jax.Array:
        """Spread one value per block over columns: ``[groups, N]``."""
        columns, block = self.w.shape[1], self.w.blocks[1]
        if values.shape[1] == columns:
            return values
        if values.shape[1] == 1:
            return jnp.broadcast_to(values, (values.shape[0], columns))
        return jnp.repeat(values, block, axis=1)[:, :columns]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Attributes:
        name: shown by `jaxq.explain`.
        backends: where it may run.
        declines: the reason it does not take a problem, or None.
        run: the float32 product ``[M, N]``.
        derivative: the kernel whose derivative stands in for its own, if any.
        accelerated: whether it takes stacks and relaid codes, and has no derivative.
    """

    name: str
    backends: tuple[str, ...]
    declines: Callable[[Problem], str | None]
    run: Callable[[Problem], jax.Array]
    derivative: Callable[[Problem], jax.Array] | None = None
    accelerated: bool = False


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which kernel took a problem, and what the ones before it said."""

    kernel: str
    declined: tuple[tuple[str, str], ...] = ()
