"""From words of packed codes to the operands of a tensor core, two or four at a time.

A 16-bit float whose exponent puts the last bit of its mantissa at 1 holds an integer in
its low bits: ``0x4300 | u`` is the bfloat16 128 + u, exactly, for u < 128 (the float16
``0x6400 | u`` is 1024 + u). So a shift and a `lop3` unpack two codes, and one fused
multiply-add takes the offset away: no conversion, no rounding.

Eight bits do not fit bfloat16's mantissa. Their sign goes where it doubles a second
number, to be subtracted: ``(0x4300 | u mod 128) − (0x4300 | sign · 128)``. A table of
16 numbers is looked up byte by byte with `prmt`. Floating point codes are moved to the
places of a float and multiplied by a power of two (exact, but codes of NaN and infinity
read as numbers beyond the largest: `jaxq.relayout` refuses them).
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from pallas_kernels.gpu.layout import Block
from pallas_kernels.gpu.words import (
    AND_OR,
    AND_XOR,
    NOT_AND_OR,
    SELECT,
    Machine,
    Word,
    twice,
)
from pallas_kernels.kernel import Coding

MAGIC = {"bfloat16": (0x4300, 128), "float16": (0x6400, 1024)}


@dataclasses.dataclass(frozen=True)
class Floats:
    """How codes become 16-bit floats, one plane of 32 rows after the other.

    Attributes:
        coding: of the weight.
        dtype: ``"bfloat16"`` or ``"float16"``.
        keep_offset: whether to leave ``value + offset`` as it is, because a zero point
            will be subtracted and can take `offset` along.
    """

    coding: Coding
    dtype: str
    keep_offset: bool = False

    @property
    def offset(self) -> int:
        """By how much too large ``keep_offset`` leaves the numbers."""
        if not self.keep_offset or self.coding.kind != "integer":
            return 0
        if self.coding.bits == 8 and self.dtype == "bfloat16":
            return 0 if self._signed_byte else -128 - self.coding.lowest
        return MAGIC[self.dtype][1] + (
            128 if self._signed_byte else -self.coding.lowest
        )

    @property
    def _signed_byte(self) -> bool:
        return self.coding.bits == 8 and self.coding.lowest == -128

    def slabs(self, planes: Sequence[int]) -> list[int]:
        """Return the slabs of the block that hold some planes."""
        block = Block(self.coding.bits)
        return sorted({f.slab for plane in planes for f in block.fields(plane)})

    def program(
        self, m: Machine, words: Sequence[Word], planes: Sequence[int]
    ) -> list[Word]:
        """Return the two numbers of each plane, from a word of each of `slabs`."""
        by_slab = dict(zip(self.slabs(planes), words, strict=True))
        if self.coding.kind == "table":
            table, dtype = self.coding.table, self.dtype
            found = {s: lookup(m, word, table, dtype) for s, word in by_slab.items()}
            fields = [Block(4).fields(plane)[0] for plane in planes]
            return [found[f.slab][f.shift // 4] for f in fields]
        one = self._integer if self.coding.kind == "integer" else self._float8
        if self.coding.kind == "integer" and self.coding.bits == 8:
            one = self._byte if self.dtype == "bfloat16" else self._half_byte
        return [one(m, by_slab, plane) for plane in planes]

    def _integer(self, m: Machine, words: dict[int, Word], plane: int) -> Word:
        """Merge the fields of a code under an exponent."""
        bits, magic = MAGIC[self.dtype]
        number: Word = twice(bits)
        for f in Block(self.coding.bits).fields(plane):
            mask = twice((2**f.width - 1) << f.low)
            word = m.shift(words[f.slab], f.shift - f.low)
            number = m.lop3(word, mask, number, AND_OR)
        if self.keep_offset:
            return number
        return m.fma2(number, 1.0, float(self.coding.lowest - magic), self.dtype)

    def _byte(self, m: Machine, words: dict[int, Word], plane: int) -> Word:
        """Return a signed byte, or an unsigned one less 128, plus what is missing."""
        (f,) = Block(8).fields(plane)
        word, bits = m.shift(words[f.slab], f.shift), MAGIC["bfloat16"][0]
        low = m.lop3(word, twice(0x7F), twice(bits), AND_OR)
        # −128, or −256 where the sign makes the exponent one larger
        sign = AND_OR if self._signed_byte else NOT_AND_OR
        high = m.lop3(word, twice(0x80), twice(bits | 0x8000), sign)
        number = m.fma2(low, 1.0, high, self.dtype)
        if self.keep_offset or self._signed_byte:
            return number
        return m.fma2(number, 1.0, 128.0 + self.coding.lowest, self.dtype)

    def _half_byte(self, m: Machine, words: dict[int, Word], plane: int) -> Word:
        """Merge a byte, its sign turned, under the exponent of a float16."""
        (f,) = Block(8).fields(plane)
        bits, magic = MAGIC["float16"]
        turn = 0x80 if self._signed_byte else 0
        word = m.shift(words[f.slab], f.shift)
        number = m.lop3(word, twice(0xFF), twice(bits | turn), AND_XOR)
        if self.keep_offset:
            return number
        return m.fma2(number, 1.0, float(self.coding.lowest - magic), self.dtype)

    def _float8(self, m: Machine, words: dict[int, Word], plane: int) -> Word:
        """Move sign, exponent and mantissa to their places; correct the exponent."""
        (f,) = Block(8).fields(plane)
        wide, narrow = jnp.finfo(self.dtype), jnp.finfo(self.coding.kind)
        place = wide.nmant - narrow.nmant
        sign = m.lop3(m.shift(words[f.slab], f.shift - 8), twice(0x8000), 0, AND_OR)
        word = m.shift(words[f.slab], f.shift - place)
        number = m.lop3(word, twice(0x7F << place), sign, AND_OR)
        factor = 2.0 ** int(narrow.minexp - wide.minexp)
        return number if factor == 1 else m.fma2(number, factor, -0.0, self.dtype)


def lookup(m: Machine, word: Word, table: tuple[float, ...], dtype: str) -> list[Word]:
    """Return the numbers of the codes in a word's 2 x 4 fields: one word per field.

    A `prmt` takes the four fields of one half as four indices into eight bytes. So the
    high and the low bytes of 16 numbers take two each, and a choice by the fields'
    highest bits, spread over bytes as the sign of four bytes that have it on top.
    """
    bits = np.asarray(table, jnp.dtype(dtype)).view(np.uint16)
    bytes_of = [(bits >> 8 * i).astype(np.uint8).view("<u4").tolist() for i in (0, 1)]
    raised = m.shift(word, -4)
    pairs = []
    for half, signs in ((word, 0x9D8C), (m.shift(word, 16), 0xBFAE)):
        index = m.lop3(half, 0x7777, 0, AND_OR)
        upper = m.prmt(word, raised, signs)
        low, high = (
            m.lop3(upper, m.prmt(c, d, index), m.prmt(a, b, index), SELECT)
            for a, b, c, d in bytes_of
        )
        pairs.append((m.prmt(low, high, 0x5140), m.prmt(low, high, 0x7362)))
    (first, third), (second, fourth) = pairs
    return [
        m.prmt(first, second, 0x5410),
        m.prmt(first, second, 0x7632),
        m.prmt(third, fourth, 0x5410),
        m.prmt(third, fourth, 0x7632),
    ]


@dataclasses.dataclass(frozen=True)
class Bytes:
    """How integer codes of 2 or 4 bits become int8, one field of every byte at a time.

    A result holds the bytes of a word in their order: see `layout.permuted`.

    Attributes:
        coding: of the weight.
        zeros: whether a word of zero points, less ``lowest``, comes as an operand.
    """

    coding: Coding
    zeros: bool = False

    def program(
        self, m: Machine, words: Sequence[Word], fields: Sequence[int]
    ) -> list[Word]:
        """Return four numbers per field, from a word (and one of zero points)."""
        bits, word = self.coding.bits, words[0]
        minus = words[1] if self.zeros else _four(-self.coding.lowest)
        mask, top = _four(2**bits - 1), _four(0x80)
        found = []
        for field in fields:
            # the highest bit keeps a byte from borrowing of the next
            raised = m.lop3(m.shift(word, bits * field), mask, top, AND_OR)
            found.append(m.lop3(m.sub(raised, minus), _four(0xFF), top, AND_XOR))
        return found


@dataclasses.dataclass(frozen=True)
class CacheFloats:
    """How four bytes of a cache become four 16-bit floats.

    A byte is put under the exponent of a float by one `prmt`; see the module.

    Attributes:
        bits: 8 (two's complement), or 4 (``value + 8``, two to a byte).
        dtype: ``"bfloat16"`` or ``"float16"``.
    """

    bits: int
    dtype: str

    def program(self, m: Machine, words: Sequence[Word], field: int) -> list[Word]:
        """Return two words of numbers, from field 0 or 1 of every byte."""
        (word,) = words
        if self.bits == 4:
            word = m.lop3(m.shift(word, 4 * field), _four(0x0F), 0, AND_OR)
        bits, magic = MAGIC[self.dtype]
        # bytes 0 and 1, then 2 and 3, each below the high byte of a float
        raised = [m.prmt(word, bits >> 8, pick) for pick in (0x4140, 0x4342)]
        if self.bits == 4:
            return [m.fma2(a, 1.0, -8.0 - magic, self.dtype) for a in raised]
        if self.dtype == "float16":
            turned = [m.lop3(a, _four(0xFF), twice(0x80), AND_XOR) for a in raised]
            return [m.fma2(a, 1.0, -128.0 - magic, self.dtype) for a in turned]
        low = [m.lop3(a, twice(0xFF7F), 0, AND_OR) for a in raised]
        minus = [m.lop3(a, twice(0xFF80), twice(0x8000), AND_XOR) for a in raised]
        pairs = zip(low, minus, strict=True)
        return [m.fma2(a, 1.0, b, self.dtype) for a, b in pairs]


def _four(byte: int) -> int:
    """Return the word with the same byte four times."""
    return byte * 0x01010101
