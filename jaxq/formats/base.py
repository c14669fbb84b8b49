"""What every number format offers: a code for a number, and the number of a code."""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.kernel import Coding


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

    def coding(self, pack: int) -> Coding:
        """Return what a kernel must know of codes packed in blocks of ``pack`` rows."""
        numbers = self.decode(jnp.arange(2**self.bits, dtype=jnp.uint8))
        table = tuple(jax.device_get(numbers).tolist())
        return Coding("table", self.bits, pack, table=table)

    @property
    def is_integer(self) -> bool:
        """Whether the numbers are consecutive integers (zero points make sense)."""
        return False
