"""The layout of binary-coded weights for look-ups: whole matrices of signs.

Bit i of all codes first, ``[..., q · K / 8, N]`` from plane 0 to plane q − 1: bit j of
byte s of a plane is the sign of row 8 s + j. A byte is thus what a table of the sums of
eight activations is looked up with (`pallas_kernels.gpu.lookup_product`,
`pallas_kernels.xla.binary_lut_dot`).
"""

import jax
import jax.numpy as jnp

from pallas_kernels import layouts
from pallas_kernels.kernel import Coding, Layout


def declines(coding: Coding, rows: int, columns: int) -> str | None:
    """Return why codes cannot lie so, or None."""
    del columns
    if coding.kind != "integer" or coding.lowest != 0:
        return "its codes are no unsigned integers"
    return f"{rows} rows do not fill bytes" if rows % 8 else None


def prepack(planar: jax.Array, coding: Coding) -> jax.Array:
    """Return planar bytes ``[..., K · q / 8, N]`` as planes of signs."""
    bits, axis = coding.bits, planar.ndim - 2
    codes = layouts.unpack(planar, bits, axis, coding.pack)
    eights = codes.reshape(*codes.shape[:-2], -1, 8, codes.shape[-1])
    planes = [
        _join((eights >> i) & jnp.uint8(1), jnp.arange(8, dtype=jnp.uint8), -2)
        for i in range(bits)
    ]
    return jnp.concatenate(planes, axis=-2)


def unpack(planes: jax.Array, coding: Coding) -> jax.Array:
    """Invert `prepack`."""
    bits, columns = coding.bits, planes.shape[-1]
    planes = planes.reshape(*planes.shape[:-2], bits, -1, 1, columns)
    places = jnp.arange(8, dtype=jnp.uint8)[:, None]
    signs = (planes >> places) & jnp.uint8(1)
    codes = _join(signs, jnp.arange(bits, dtype=jnp.uint8), -4)
    codes = codes.reshape(*codes.shape[:-3], -1, columns)
    return layouts.pack(codes, bits, codes.ndim - 2, coding.pack)


def matrix(shape: tuple[int, ...], coding: Coding) -> tuple[int, int]:
    """Return the rows and columns of relaid codes."""
    return shape[-2] * 8 // coding.bits, shape[-1]


def _join(bits: jax.Array, places: jax.Array, axis: int) -> jax.Array:
    """Return bytes whose bits lie along an axis, at these places."""
    places = places.reshape(-1, *(1,) * (-axis - 1))
    # no two share a place: the sum is their union
    return jnp.sum(bits << places, axis=axis, dtype=jnp.uint8)


LAYOUT = Layout("lookup", declines, prepack, unpack, matrix)
