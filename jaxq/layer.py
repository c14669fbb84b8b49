"""`Layer`: one tensor of a stack, by an index that is not applied yet."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import register_dataclass
from jax.typing import DTypeLike

from jaxq.qtensor import QTensor
from jaxq.views import index_axis


@functools.partial(
    register_dataclass, data_fields=["stack", "index"], meta_fields=["kept"]
)
@dataclasses.dataclass(frozen=True)
class Layer:
    """The tensor ``stack[index]``.

    A kernel takes the whole stack and the index, so that a scan over layers copies no
    weight. Whoever has no kernel applies the index: `taken`.

    Attributes:
        stack: ``[L, K, N]``.
        index: int32 scalar, in 0..L-1.
        kept: whether the axis that was indexed is still there, of length 1.
    """

    stack: QTensor
    index: jax.Array
    kept: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return (1,) * self.kept + self.stack.shape[1:]

    @property
    def ndim(self) -> int:
        """The rank."""
        return len(self.shape)

    @property
    def dtype(self) -> DTypeLike:
        """The dtype of the tensor that it stands for."""
        return self.stack.dtype

    def taken(self) -> QTensor:
        """Return the tensor, copied out of the stack."""
        if self.kept:
            slice_ = lax.dynamic_slice_in_dim
            return index_axis(self.stack, 0, lambda a, i: slice_(a, self.index, 1, i))
        return jax.tree.map(self.of, self.stack)

    def of(self, a: jax.Array) -> jax.Array:
        """Return one of the stack's arrays at the index; one that is shared, whole."""
        if a.shape[0] == 1:
            return a[0]
        return lax.dynamic_index_in_dim(a, self.index, keepdims=False)


def layer_of(stack: QTensor, index: jax.Array, kept: bool = False) -> Layer | None:
    """Return ``stack[index]`` as a `Layer`, if a kernel might take it as one.

    Args:
        stack: any tensor.
        index: of its first axis; clipped, as a dynamic slice does it.
        kept: whether that axis stays, of length 1.
    """
    if stack.layout == "planar" or stack.ndim != 3 or stack.blocks[0] > 1:
        return None
    index = jnp.clip(jnp.asarray(index, jnp.int32), 0, stack.shape[0] - 1)
    return Layer(stack, index, kept)
