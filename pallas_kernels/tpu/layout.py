"""TPU layout: one array element per code, in a dtype that Mosaic converts itself.

A native int4 array takes half a byte per weight in memory, and needs fewer instructions
to unpack than bytes with two codes (1.4 to 2 times fewer, measured in bundles). So

    integers of 2 to 4 bits   int4, ``code − 2^(bits − 1)``
    integers of 5 to 8 bits   int8, the same
    fp8                       its own dtype
    fp4 (both kinds)          float8_e4m3fn, exactly: a factor of 1 or 12 and a cast
    nf4                       int8, ``⌊127 · number⌉``: rounded, by up to 1/254 of the
                              scale, because looking up 16 numbers takes seven times as
                              many instructions as loading twice the bytes

Every row is a bijection of codes, so `LAYOUT` can be undone bit for bit.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import layouts
from pallas_kernels.kernel import Coding, Layout

FACTORS = (1.0, 12.0)  # a table times one of these may be exact in float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a stored element reads: ``number = (element + shift) · factor``.

    Attributes:
        dtype: of the elements.
        shift: added to an element, an integer.
        factor: multiplied with it.
    """

    dtype: str
    shift: int = 0
    factor: float = 1.0


def stored(coding: Coding) -> Stored:
    """Return how codes are stored.

    Raises:
        ValueError: when they have no such form.
    """
    if (reason := declines(coding)) is not None:
        raise ValueError(f"{coding}: {reason}")
    if coding.kind == "integer":
        dtype = "int4" if coding.bits <= 4 else "int8"
        return Stored(dtype, coding.lowest + 2 ** (coding.bits - 1))
    if coding.kind != "table":
        return Stored(coding.kind)
    factor = _exact_factor(coding.table)
    if factor is not None:
        return Stored("float8_e4m3fn", factor=1 / factor)
    return Stored("int8", factor=float(np.max(np.abs(coding.table))) / 127)


def declines(coding: Coding, inner: int = 0, columns: int = 0) -> str | None:
    """Return why codes have no TPU form, or None."""
    if coding.kind != "table":
        return None
    if coding.bits > 4:
        return f"a table of {2**coding.bits} numbers has no exact form in 8 bits"
    if _exact_factor(coding.table) is None and len(set(_int8_table(coding))) < 16:
        return "two of the table's numbers are the same in int8"
    return None


def prepack(codes: jax.Array, coding: Coding) -> jax.Array:
    """Return planar bytes ``[..., K · bits / 8, N]`` as elements ``[..., K, N]``."""
    codes = layouts.unpack(codes, coding.bits, codes.ndim - 2, coding.pack)
    dtype = jnp.dtype(stored(coding).dtype)
    if coding.kind == "integer" and not _twos_complement(coding):
        middle = 2 ** (coding.bits - 1)
        return (codes.astype(jnp.int32) - middle).astype(dtype)
    if coding.kind == "table":
        elements = lax.bitcast_convert_type(jnp.asarray(_elements(coding)), dtype)
        return elements[codes.astype(jnp.int32)]
    return lax.bitcast_convert_type(codes, dtype)


def unpack(elements: jax.Array, coding: Coding) -> jax.Array:
    """Invert `prepack`."""
    if coding.kind == "integer" and not _twos_complement(coding):
        middle = 2 ** (coding.bits - 1)
        codes = (elements.astype(jnp.int32) + middle).astype(jnp.uint8)
    else:
        codes = lax.bitcast_convert_type(elements, jnp.uint8)
        if coding.kind == "table":
            back = np.zeros(256, np.uint8)
            back[_elements(coding)] = np.arange(2**coding.bits)
            codes = jnp.asarray(back)[codes.astype(jnp.int32)]
    return layouts.pack(codes, coding.bits, codes.ndim - 2, coding.pack)


def matrix(shape: tuple[int, ...], coding: Coding) -> tuple[int, int]:
    """Return the rows and columns of relaid codes: they are those of the array."""
    return shape[-2], shape[-1]


def _twos_complement(coding: Coding) -> bool:
    return coding.bits == 8 and coding.lowest == -128


def _exact_factor(table: tuple[float, ...]) -> float | None:
    """Return the factor that makes every number exact in float8, if there is one."""
    numbers = np.asarray(table, np.float32)
    for factor in FACTORS:
        scaled = numbers * np.float32(factor)
        eighth = scaled.astype(jnp.float8_e4m3fn).astype(np.float32)
        if np.allclose(eighth, scaled, rtol=1e-6, atol=0):
            return factor
    return None


def _int8_table(coding: Coding) -> list[int]:
    numbers = np.asarray(coding.table, np.float64)
    return np.round(numbers * 127 / np.max(np.abs(numbers))).astype(int).tolist()


def _elements(coding: Coding) -> np.ndarray:
    """Return the stored bytes of a table's numbers, in the order of their codes."""
    factor = _exact_factor(coding.table)
    if factor is None:
        return np.asarray(_int8_table(coding), np.int8).view(np.uint8)
    # −0 keeps its sign, so the two zeros of a floating point table stay apart
    scaled = np.asarray(coding.table, np.float32) * np.float32(factor)
    signs = np.signbit(np.asarray(coding.table, np.float32))
    eighth = np.abs(scaled).astype(jnp.float8_e4m3fn).view(np.uint8)
    return eighth | (signs.astype(np.uint8) << 7)


LAYOUT = Layout("tpu", declines, prepack, unpack, matrix)
