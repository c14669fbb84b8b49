"""`Block`: what all parts of all models share: how they multiply and how they score.

Nothing here knows of quantization: the layers are `nn.Dense` and `nn.Embed`, and
`jaxq.quantized(model.apply)` finds their weights in the traced function.
"""

from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

Part = TypeVar("Part", bound="Block")


def wide_dot(
    x: jax.Array,
    w: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`lax.dot_general` with a float32 result, whatever the operands.

    Saying so matters on a CPU, too: XLA's bfloat16 matmul with a float32 result is six
    times faster than the one with a bfloat16 result.
    """
    del preferred_element_type
    return jax.lax.dot_general(
        x, w, dimension_numbers, precision, preferred_element_type=jnp.float32
    )


def rounded_dot(x: jax.Array, w: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """`wide_dot`, rounded once, to the dtype of `x`."""
    return wide_dot(x, w, *args, **options).astype(x.dtype)


class Block(nn.Module):
    """A model, or a part of one.

    Attributes:
        config: the model's shape.
        dtype: what matmuls compute in; None is the dtype of the parameters. Norms,
            rotations and the softmax are float32 in any case.
        dot_general: the projections' matmul, for training with another gradient.
        layer: the number of the layer that this is a part of.
    """

    config: Any
    dtype: Any = None
    dot_general: Any = rounded_dot
    layer: int = 0

    def part(self, kind: type[Part], name: str, layer: int | None = None) -> Part:
        """Return a part of this part; of the same layer, if no other is given."""
        layer = self.layer if layer is None else layer
        return kind(self.config, self.dtype, self.dot_general, layer, name=name)

    def dense(self, features: int, name: str, bias: bool = False) -> nn.Dense:
        """Return a projection."""
        return nn.Dense(
            features,
            use_bias=bias,
            dtype=self.dtype,
            dot_general=self.dot_general,
            kernel_init=nn.initializers.normal(self.config.init_scale),
            name=name,
        )

    def table(self, rows: int, width: int, name: str) -> nn.Embed:
        """Return a table of embeddings."""
        return nn.Embed(
            rows,
            width,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(self.config.init_scale),
            name=name,
        )

    def logits(self, x: jax.Array, embed: nn.Embed, name: str = "lm_head") -> jax.Array:
        """Return float32 logits: rounded to bfloat16, many would be equal.

        Args:
            x: `[B, T, width]`.
            embed: the table that is the head, too, where `config.tied`.
            name: of the head, where it is not.
        """
        if self.config.tied:
            table = embed.embedding.astype(x.dtype)
            return wide_dot(x, table, (((x.ndim - 1,), (1,)), ((), ())))
        head = nn.Dense(
            self.config.vocab_size,
            use_bias=False,
            dtype=self.dtype,
            dot_general=wide_dot,
            kernel_init=nn.initializers.normal(self.config.init_scale),
            name=name,
        )
        return head(x)
