"""Programs on 32-bit registers, written once: run by jnp, or printed as PTX.

Unpacking is a handful of register instructions per weight, and decides how fast a
product with few rows is. What compilers make of shifts and masks on 16-bit lanes takes
half again as many, so they are written as PTX: a `lop3` masks and merges in one step, a
`prmt` looks four bytes up in a table of eight. The same program runs on uint32 arrays
with `Arrays`: that is how its every bit is tested without a GPU, and what interpreted
kernels run.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Word = Any  # an int (an immediate), or what the machine computes with

# Truth tables of lop3: what becomes of the bits of a, b, c
AND_OR = 0xEA  # (a & b) | c
AND_XOR = 0x6A  # (a & b) ^ c
NOT_AND_OR = 0xAE  # (~a & b) | c
SELECT = 0xCA  # a ? b : c

_HALVES = {"bfloat16": "bf16x2", "float16": "f16x2"}


class Machine(abc.ABC):
    """A register file with the instructions that unpacking needs."""

    @abc.abstractmethod
    def shift(self, a: Word, right: int) -> Word:
        """Return ``a >> right``, filling with zeros; to the left when negative."""

    @abc.abstractmethod
    def lop3(self, a: Word, b: Word, c: Word, table: int) -> Word:
        """Return the bitwise function of three words with a truth table."""

    @abc.abstractmethod
    def prmt(self, a: Word, b: Word, selector: Word) -> Word:
        """Return four of the eight bytes of ``a`` (0-3) and ``b`` (4-7).

        Four bits of the selector choose each; the highest asks for its sign instead.
        """

    @abc.abstractmethod
    def sub(self, a: Word, b: Word) -> Word:
        """Return ``a − b`` modulo 2^32."""

    @abc.abstractmethod
    def fma2(self, a: Word, b: float, c: Word | float, dtype: str) -> Word:
        """Return ``a · b + c`` on two halves of the dtype; b is a power of two."""


def pair(value: float, dtype: str) -> int:
    """Return the word with ``value`` in both halves."""
    bits = int(np.asarray(value, jnp.dtype(dtype)).view(np.uint16))
    return bits << 16 | bits


def twice(bits: int) -> int:
    """Return the word with the same 16 bits in both halves."""
    return bits << 16 | bits


class Arrays(Machine):
    """Words are uint32 arrays."""

    def shift(self, a: Word, right: int) -> Word:
        """Shift every word."""
        amount = np.uint32(abs(right))
        return _u32(a) >> amount if right >= 0 else _u32(a) << amount

    def lop3(self, a: Word, b: Word, c: Word, table: int) -> Word:
        """Or together the rows of the truth table that are 1."""
        words = [_u32(w) for w in (a, b, c)]
        total = jnp.zeros((), jnp.uint32)
        for row in range(8):
            if table >> row & 1:
                bits = [w if row >> (2 - i) & 1 else ~w for i, w in enumerate(words)]
                total = total | (bits[0] & bits[1] & bits[2])
        return total

    def prmt(self, a: Word, b: Word, selector: Word) -> Word:
        """Pick byte by byte."""
        sources = [_u32(a) >> np.uint32(8 * i) for i in range(4)]
        sources += [_u32(b) >> np.uint32(8 * i) for i in range(4)]
        sources = [source & np.uint32(255) for source in sources]
        selector, total = _u32(selector), jnp.zeros((), jnp.uint32)
        for place in range(4):
            nibble = (selector >> np.uint32(4 * place)) & np.uint32(15)
            byte = jnp.zeros((), jnp.uint32)
            for i, source in enumerate(sources):
                byte = jnp.where((nibble & 7) == i, source, byte)
            sign = jnp.where(byte >= 128, np.uint32(255), np.uint32(0))
            byte = jnp.where(nibble >= 8, sign, byte)
            total = total | (byte << np.uint32(8 * place))
        return total

    def sub(self, a: Word, b: Word) -> Word:
        """Subtract modulo 2^32."""
        return _u32(a) - _u32(b)

    def fma2(self, a: Word, b: float, c: Word | float, dtype: str) -> Word:
        """Compute in float32 (exact for what is unpacked), round once."""
        more = jnp.float32(c) if isinstance(c, float) else _times(c, 1.0, dtype)
        result = (_times(a, b, dtype) + more).astype(dtype)
        halves = lax.bitcast_convert_type(result, jnp.uint16)
        return lax.bitcast_convert_type(halves, jnp.uint32)


def _times(a: Word, power_of_two: float, dtype: str) -> jax.Array:
    """Return both halves, times a power of two, in float32 as a new last axis.

    By their bits, because XLA:CPU takes subnormal numbers for zeros; a GPU does not.
    """
    info = jnp.finfo(dtype)
    halves = lax.bitcast_convert_type(_u32(a), jnp.uint16).astype(jnp.int32)
    exponent = (halves & 0x7FFF) >> info.nmant
    digits = (halves & (2**info.nmant - 1)) + jnp.where(exponent > 0, 2**info.nmant, 0)
    power = jnp.maximum(exponent, 1) + int(info.minexp) - 1 - info.nmant
    power = power + int(np.log2(power_of_two))
    number = jnp.ldexp(digits.astype(jnp.float32), power)
    return jnp.where(halves >> 15 == 1, -number, number)


def _u32(a: Word) -> jax.Array:
    return jnp.asarray(np.uint32(a)) if isinstance(a, int) else a


class Ptx(Machine):
    """Words are names of registers; instructions are collected as text."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0

    def _emit(self, instruction: str, *operands: Word) -> str:
        """Append ``instruction result, operands`` and return the result's name."""
        name = f"r{self.count}"
        self.count += 1
        texts = [hex(a) if isinstance(a, int) else a for a in operands]
        self.lines.append(f"{instruction} {', '.join([name, *texts])};")
        return name

    def shift(self, a: Word, right: int) -> Word:
        """Emit shr, shl or nothing."""
        if right == 0:
            return a
        return self._emit("shr.b32" if right > 0 else "shl.b32", a, abs(right))

    def lop3(self, a: Word, b: Word, c: Word, table: int) -> Word:
        """Emit lop3."""
        return self._emit("lop3.b32", a, b, c, table)

    def prmt(self, a: Word, b: Word, selector: Word) -> Word:
        """Emit prmt."""
        return self._emit("prmt.b32", a, b, selector)

    def sub(self, a: Word, b: Word) -> Word:
        """Emit sub."""
        return self._emit("sub.u32", a, b)

    def fma2(self, a: Word, b: float, c: Word | float, dtype: str) -> Word:
        """Emit a fused multiply-add: of bfloat16, sm_80 has no other arithmetic."""
        factor = self._emit("mov.b32", pair(b, dtype))
        if isinstance(c, float):
            c = self._emit("mov.b32", pair(c, dtype))
        return self._emit(f"fma.rn.{_HALVES[dtype]}", a, factor, c)


Program = Callable[[Machine, Sequence[Word]], list[Word]]


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A program as inline assembly.

    Attributes:
        text: PTX, with ``$0`` ... for results, then operands.
        constraints: their kinds, as LLVM writes them.
        results: how many words it returns.
    """

    text: str
    constraints: str
    results: int


def assemble(program: Program, operands: int, results: int) -> Assembly:
    """Print a program.

    Example:
        >>> half = lambda m, words: [m.shift(words[0], 1)]
        >>> assemble(half, operands=1, results=1).text
        '{ .reg .b32 r<1>; shr.b32 r0, $1, 0x1; mov.b32 $0, r0; }'
    """
    machine = Ptx()
    out = program(machine, [f"${results + i}" for i in range(operands)])
    if len(out) != results:
        raise ValueError(f"the program returns {len(out)} words, not {results}")
    moves = [f"mov.b32 ${i}, {word};" for i, word in enumerate(out)]
    lines = [f".reg .b32 r<{max(machine.count, 1)}>;", *machine.lines, *moves]
    constraints = ",".join(["=r"] * results + ["r"] * operands)
    return Assembly("{ " + " ".join(lines) + " }", constraints, results)
