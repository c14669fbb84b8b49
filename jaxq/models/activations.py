"""The activation functions of feed-forward layers, by Hugging Face's names."""

from collections.abc import Callable
from functools import partial

import jax

_GELU = partial(jax.nn.gelu, approximate=False)  # x Φ(x)
_GELU_TANH = partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _GELU,
    "gelu_fast": _GELU_TANH,
    "gelu_new": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}
