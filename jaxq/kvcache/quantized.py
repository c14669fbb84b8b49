"""The cache of int8 or int4 codes, with a scale per token and head.

    k ≈ codes · scale,   scale = max |k| / 127; for int4 the signed maximum / −8

A token is rounded once, when it is appended, and never again; attention multiplies
the codes as they are (`jaxq.kvcache.attention`). Padding takes no slot: every row of a
batch fills its own slots from 0 on, so that one number per row says what counts, which
is all that a kernel has to know.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp

from jaxq.kvcache.positions import PADDING
from jaxq.ops import Choice
from jaxq.quantize import block_bounds, encode
from jaxq.scales import affine
from jaxq.spec import QuantSpec
from pallas_kernels import layouts
from pallas_kernels.target import Target

SLOTS = 64  # a cache has a multiple of so many: the least that a kernel cuts it into


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer's rotated keys, and values, as codes.

    Attributes:
        keys: `[batch, kv_heads, slots, head_dim]` of int8, or int4 on a TPU; elsewhere
            4 bits are uint8 `[..., head_dim / 2]`: channel `d` in the low half of a
            byte, channel `d + head_dim / 2` in the high one, each as `code + 8`.
        values: like `keys`.
        key_scales: `float32[batch, kv_heads, slots]`.
        value_scales: like `key_scales`.
        spec: how a token's head is rounded.
        target: the chip that attention runs on; None for the one this runs on.
        choices: which kernels attended to it, if that is to be told, else None; see
            `jaxq.kvcache.explain_cache`.
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array
    value_scales: jax.Array
    spec: QuantSpec = field(kw_only=True)
    target: Target | None = field(kw_only=True, default=None)
    choices: tuple[Choice, ...] | None = field(kw_only=True, default=None)

    @property
    def slots(self) -> int:
        """How many tokens fit."""
        return self.keys.shape[2]

    def write(self, keys: jax.Array, values: jax.Array, at: jax.Array) -> Self:
        """Return it with tokens added.

        Args:
            keys: `[batch, tokens, kv_heads, head_dim]`, floats.
            values: like `keys`.
            at: `int32[batch, tokens]`, the slot of each; those behind the last slot
                are dropped.
        """
        rows = jnp.arange(keys.shape[0], dtype=jnp.int32)[:, None]

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[rows, :, at].set(new.astype(old.dtype), mode="drop")

        codes, scales = round_heads(keys, self.spec, self.keys.dtype)
        kept, weights = round_heads(values, self.spec, self.values.dtype)
        return replace(
            self,
            keys=put(self.keys, codes),
            values=put(self.values, kept),
            key_scales=put(self.key_scales, scales),
            value_scales=put(self.value_scales, weights),
        )


jax.tree_util.register_dataclass(
    QuantizedLayer,
    ("keys", "values", "key_scales", "value_scales"),
    ("spec", "target", "choices"),
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedCache:
    """Keys and values of the tokens a model has seen, as codes.

    The tokens of a row are given in the order of their positions; padding, of negative
    position, may stand anywhere.

    Attributes:
        layers: one `QuantizedLayer` per decoder layer.
        positions: `int32[batch, slots]`; `PADDING` where a slot is empty.
        lengths: `int32[batch]`, how many slots of a row are filled.
    """

    layers: tuple[QuantizedLayer, ...]
    positions: jax.Array
    lengths: jax.Array

    @property
    def slots(self) -> int:
        """How many tokens fit."""
        return self.positions.shape[1]

    def next_positions(self, tokens: int) -> jax.Array:
        """Return where so many tokens go on, `int32[batch, tokens]`."""
        return self.lengths[:, None] + jnp.arange(tokens, dtype=jnp.int32)

    def append(self, positions: jax.Array) -> tuple[Self, jax.Array]:
        """Reserve slots for the tokens at `positions[batch, tokens]`, padding aside.

        The caller sees to it that they fit: tokens behind the last slot are dropped.

        Returns:
            The cache, and the slot of every token, `int32[batch, tokens]`.
        """
        positions = positions.astype(jnp.int32)
        real = positions >= 0
        order = jnp.cumsum(real, axis=1, dtype=jnp.int32)
        at = jnp.where(real, self.lengths[:, None] + order - 1, jnp.int32(self.slots))
        rows = jnp.arange(positions.shape[0], dtype=jnp.int32)[:, None]
        held = self.positions.at[rows, at].set(positions, mode="drop")
        lengths = jnp.minimum(self.lengths + order[:, -1], jnp.int32(self.slots))
        return replace(self, positions=held, lengths=lengths), at


def quantized_cache(
    config: Any, batch: int, slots: int, spec: QuantSpec, target: Target | None = None
) -> QuantizedCache:
    """Return an empty cache of codes; see `jaxq.kvcache.empty_cache`."""
    slots = -(-slots // SLOTS) * SLOTS
    native = (Target.here() if target is None else target).backend == "tpu"
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    dtype = jnp.int8 if spec.bits == 8 else jnp.int4
    if spec.bits == 4 and not native:
        if config.head_dim % 2:
            raise ValueError(
                f"head_dim is {config.head_dim}, and two codes of 4 bits share a byte: "
                "this model's cache can be float or int8"
            )
        shape, dtype = (*shape[:3], config.head_dim // 2), jnp.uint8

    def layer() -> QuantizedLayer:
        codes = [jnp.zeros(shape, dtype) for _ in range(2)]
        scales = [jnp.zeros(shape[:3], jnp.float32) for _ in range(2)]
        return QuantizedLayer(*codes, *scales, spec=spec, target=target)

    return QuantizedCache(
        tuple(layer() for _ in range(config.num_layers)),
        jnp.full((batch, slots), PADDING, jnp.int32),
        jnp.zeros(batch, jnp.int32),
    )


def round_heads(
    x: jax.Array, spec: QuantSpec, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Return codes and scales of heads `x[..., head_dim]`, rounded to nearest.

    Args:
        x: floats.
        spec: an integer format, symmetric.
        dtype: of the codes: int8, int4, or uint8 for two codes of 4 bits in a byte.

    Returns:
        Codes `[..., head_dim]` (half as wide when packed) and `float32[...]`.
    """
    block = (1,) * (x.ndim - 1) + (x.shape[-1],)
    low, high = block_bounds(x, block)
    scale, _ = affine(low, high, spec)
    codes = encode(x, scale, None, spec, block)  # code - lowest, or two's complement
    if dtype == jnp.uint8:
        codes = layouts.pack(codes, 4, x.ndim - 1, x.shape[-1])
    elif dtype == jnp.int4:
        codes = (codes.astype(jnp.int8) - jnp.int8(8)).astype(jnp.int4)
    else:
        codes = jax.lax.bitcast_convert_type(codes, jnp.int8)
    return codes, scale[..., 0]
