"""The left operands of a step's matrix products: unpacked weights in registers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu.geometry import Geometry
from pallas_kernels.gpu.layout import WORDS, Block
from pallas_kernels.gpu.mosaic import PER_ROW, Mode, Unpacked
from pallas_kernels.gpu.unpack import Floats


def operands(
    g: Geometry, floats: Floats, mode: Mode, words: Any, zeros: list[Any], here: Any
) -> Callable[[int], jax.Array]:
    """Return a function to the operands of a step: exact numbers, one after the other.

    Args:
        g: the sizes; an operand has ``g.operand`` rows of the weight.
        floats: how to unpack.
        mode: compiled or interpreted.
        words: the step's slabs, in shared memory.
        zeros: none, or the step's zero points.
        here: this warpgroup's columns of the tile.
    """
    block = Block(g.coding.bits)
    planes = g.operand // WORDS
    # looking up a table takes all four fields of a word at once
    chunk = 4 if g.coding.kind == "table" else planes
    made: dict[int, jax.Array] = {}
    load = functools.cache(lambda slab: words[slab, here])

    @functools.cache
    def zero(group: int) -> jax.Array:
        value = mode.cast(zeros[0][group, here], PER_ROW).astype(jnp.float32)
        value = (value + jnp.float32(floats.offset)).astype(floats.dtype)
        return lax.broadcast_in_dim(value, (g.each, g.operand), (0,))

    def operand(j: int) -> jax.Array:
        number, first = divmod(j * planes // chunk * chunk, block.planes)
        if j not in made:
            which = range(first, first + chunk)
            start = number * block.slabs
            slabs = [load(start + slab) for slab in floats.slabs(which)]
            program = functools.partial(_run_planes, floats, which)
            shape = Unpacked(floats.dtype, chunk // planes, planes)
            found = mode.unpacked(program, slabs, shape)
            made.update(enumerate(found, (number * block.planes + first) // planes))
        return made[j] - zero(j * g.operand // g.run) if zeros else made[j]

    return operand


def _run_planes(floats: Floats, planes: Any, m: Any, words: Any) -> Any:
    return floats.program(m, words, planes)
