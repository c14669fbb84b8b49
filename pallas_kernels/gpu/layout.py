"""GPU layout: 32 16-bit words per column and slab, so that a tile is one run of bytes.

A code is cut into planes of 8, 4, 2 and 1 bits as in `pallas_kernels.layouts`. A word
holds ``n = 16 / width`` fields, and a *slab* ``[N, 32]`` of words is 32·n rows of one
plane: field ``i`` of word ``t`` is row ``32 i + t``. ::

    4 bits: a block of 128 rows is 1 slab     word t = rows t | 32+t | 64+t | 96+t
    3 bits: a block of 512 rows is 3 slabs    two of 2-bit fields, one of 1-bit fields

So a field is 32 consecutive rows in the order of the activation, whatever the width:
groups of 32, 64 and 128 rows need no other layout. The last block is filled up with
zero codes, which meet zeros of the activation. Loaded as 32-bit registers, a tile
``[64, 32]`` of words lies exactly as a tensor core wants 32 of its columns.

Relaid codes are uint16 ``[..., slabs, 32 N]``; the same bits as before.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import layouts
from pallas_kernels.kernel import Coding, Layout

WORDS = 32  # words of a column in a slab, and rows of a field
WORD_BITS = 16


@dataclasses.dataclass(frozen=True)
class Field:
    """Where some bits of 32 rows of codes are.

    Attributes:
        slab: which of the block.
        shift: the lowest bit, in the words of the slab.
        width: how many bits.
        low: the lowest bit, in the code.
    """

    slab: int
    shift: int
    width: int
    low: int


@dataclasses.dataclass(frozen=True)
class Block:
    """The fewest rows that fill whole slabs.

    Attributes:
        bits: bits per code.
    """

    bits: int

    @property
    def rows(self) -> int:
        """Rows of a block: 64, 128, 256 or 512."""
        return WORDS * WORD_BITS // layouts.plane_widths(self.bits)[-1]

    @property
    def slabs(self) -> int:
        """Slabs of a block."""
        return self.rows * self.bits // (WORDS * WORD_BITS)

    @property
    def planes(self) -> int:
        """Runs of 32 rows in a block."""
        return self.rows // WORDS

    def fields(self, plane: int) -> tuple[Field, ...]:
        """Return where the codes of rows ``32 · plane ...`` are, low bits first."""
        found, first, low = [], 0, 0
        for width in layouts.plane_widths(self.bits):
            slab, place = divmod(plane, WORD_BITS // width)
            found.append(Field(first + slab, width * place, width, low))
            first += self.rows * width // (WORDS * WORD_BITS)
            low += width
        return tuple(found)


def filled(inner: int, bits: int) -> int:
    """Return K up to whole blocks."""
    rows = Block(bits).rows
    return -(-inner // rows) * rows


def declines(coding: Coding, inner: int, columns: int) -> str | None:
    """Return None: all codes can take this layout."""
    return None


def prepack(codes: jax.Array, coding: Coding) -> jax.Array:
    """Return planar bytes ``[..., K · bits / 8, N]`` as words ``[..., slabs, 32 N]``.

    Rows are filled up with zero codes to whole blocks.
    """
    lead, columns = codes.shape[:-2], codes.shape[-1]
    rows = layouts.unpack(codes, coding.bits, codes.ndim - 2, coding.pack)
    block, parts, low = Block(coding.bits), [], 0
    rows = jnp.pad(
        rows, [(0, 0)] * len(lead) + [(0, -rows.shape[-2] % block.rows), (0, 0)]
    )
    rows = rows.reshape(*lead, -1, block.rows, columns)
    for width in layouts.plane_widths(coding.bits):
        fields = ((rows >> low) & (2**width - 1)).astype(jnp.uint16)
        n = WORD_BITS // width
        fields = fields.reshape(*rows.shape[:-2], -1, n, WORDS, columns)
        shifts = jnp.arange(0, WORD_BITS, width, dtype=jnp.uint16)[:, None, None]
        # the fields share no bits: their sum is their union
        words = jnp.sum(fields << shifts, axis=-3, dtype=jnp.uint16)
        parts.append(jnp.swapaxes(words, -1, -2))
        low += width
    slabs = jnp.concatenate(parts, axis=-3)
    return slabs.reshape(*lead, -1, columns * WORDS)


def fields_of(words: jax.Array, coding: Coding) -> jax.Array:
    """Return the codes of relaid words in their order: uint8 ``[..., K, N]``."""
    lead, columns = words.shape[:-2], words.shape[-1] // WORDS
    block, first, low = Block(coding.bits), 0, 0
    slabs = words.reshape(*lead, -1, block.slabs, columns, WORDS)
    codes = jnp.zeros((*lead, slabs.shape[-4], block.rows, columns), jnp.uint8)
    for width in layouts.plane_widths(coding.bits):
        count = block.rows * width // (WORDS * WORD_BITS)
        part = jnp.swapaxes(slabs[..., first : first + count, :, :], -1, -2)
        shifts = jnp.arange(0, WORD_BITS, width, dtype=jnp.uint16)[:, None, None]
        field = (part[..., None, :, :] >> shifts) & jnp.uint16(2**width - 1)
        codes = codes | (field.astype(jnp.uint8).reshape(codes.shape) << low)
        first, low = first + count, low + width
    return codes.reshape(*lead, -1, columns)


def unpack(words: jax.Array, coding: Coding) -> jax.Array:
    """Invert `prepack`, but for rows that fill the last block: whole packing blocks."""
    codes = fields_of(words, coding)
    if coding.bits < 8:
        codes = codes[..., : codes.shape[-2] // coding.pack * coding.pack, :]
    return layouts.pack(codes, coding.bits, codes.ndim - 2, coding.pack)


def matrix(shape: tuple[int, ...], coding: Coding) -> tuple[int, int]:
    """Return the rows and columns of relaid codes, whole blocks of rows."""
    block = Block(coding.bits)
    return shape[-2] // block.slabs * block.rows, shape[-1] // WORDS


def permuted(x: jax.Array, bits: int) -> jax.Array:
    """Return ``x[M, K]`` with its channels in the order of the words' *bytes*.

    Products of 8-bit operands take four consecutive bytes of words as four channels.
    Field ``j`` of byte ``p`` of word ``t`` is row ``32 (j + p · 8 / bits) + t``.
    """
    n = 8 // bits
    parts = x.reshape(x.shape[0], -1, 2, n, WORDS)
    return parts.transpose(0, 1, 3, 4, 2).reshape(x.shape)


def words_of(codes: jax.Array, columns: int) -> jax.Array:
    """View relaid codes ``[..., slabs, 32 N]`` as ``[slabs of all, columns, 32]``.

    Missing columns are zeros; only then is something copied.
    """
    slabs = codes.reshape(-1, codes.shape[-1] // WORDS, WORDS)
    pad = columns - slabs.shape[1]
    return jnp.pad(slabs, ((0, 0), (0, pad), (0, 0))) if pad else slabs


LAYOUT = Layout("gpu", declines, prepack, unpack, matrix)
