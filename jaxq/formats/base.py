"""What every number format offers: a code for a number, and the number of a code."""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Format(abc.ABC):
    """How a stored code of ``bits`` bits maps to a number.

    Numbers are in *code units*, before the scale: an int4 code is -8..7, an nf4 code
    -1..1. ``encode`` rounds to the nearest representable number and saturates.

    Attributes:
        name: the key in `jaxq.formats.FORMATS`.
        bits: bits per stored code, 1..8.
    """

    name: str
    bits: int

    @property
    @abc.abstractmethod
    def lowest(self) -> float:
        """The smallest representable number."""

    @property
    @abc.abstractmethod
    def highest(self) -> float:
        """The largest representable number."""

    @abc.abstractmethod
    def encode(self, x: jax.Array) -> jax.Array:
        """Return the uint8 codes of float numbers ``x``, nearest and saturating."""

    @abc.abstractmethod
    def decode(self, codes: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Return the numbers of uint8 ``codes``, exactly, in ``dtype``."""

    @property
    def is_integer(self) -> bool:
        """Whether the numbers are consecutive integers (zero points make sense)."""
        return False
