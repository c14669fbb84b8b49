"""What every Mosaic GPU kernel here needs: transforms, layouts, unpacked registers.

In interpret mode some things do not exist (register operands of `wgmma`, inline
assembly, casts of layouts). Each has its plain twin here, so that a kernel reads the
same either way; the unpacking program itself is the same (see `words`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.words import Arrays, Program, assemble

# takes a body with a carry, which its annotations do not know
pipeline: Any = plgpu.emit_pipeline_warp_specialized

ROWS = 64  # rows of the accumulator of a warpgroup's matrix product
PARAMS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
)
# per row, and per column, of an accumulator
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def swizzled(bits: int, swizzle: int = 128) -> tuple[Any, ...]:
    """Return the transforms of a tile in shared memory, as tensor cores want it."""
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))
    return tiling, plgpu.SwizzleTransform(swizzle)


def transposed(ref: Any) -> Any:
    """Return the transposed view of a 2-D reference, on every JAX."""
    if jax.__version_info__ < (0, 11):
        return plgpu.transpose_ref(ref, (1, 0))
    return ref.T


def stacked(a: jax.Array, layer: jax.Array | None) -> jax.Array:
    """Merge a stack's first two axes (a view); a single matrix stays as it is."""
    return a if layer is None else a.reshape(-1, *a.shape[2:])


def per_group(
    values: jax.Array, layer: jax.Array | None, inner: int, group: int
) -> jax.Array:
    """Merge stacked ``[groups, N]`` (`stacked`), with zeros for groups of mere filling.

    Args:
        values: scales or zero points; a single group stands for all of K.
        layer: None where there is no stack.
        inner: K of the relaid codes.
        group: rows per scale.
    """
    missing = inner // group - values.shape[-2]
    if values.shape[-2] > 1 and missing > 0:
        lead = [(0, 0)] * (values.ndim - 2)
        values = jnp.pad(values, [*lead, (0, missing), (0, 0)])
    return stacked(values, layer)


def wide(values: jax.Array, have: int, columns: int) -> jax.Array:
    """Return ``[groups, N]`` with a shared column repeated, and zeros up to columns."""
    values = jnp.broadcast_to(values, (values.shape[0], have))
    return jnp.pad(values, ((0, 0), (0, columns - have))) if columns > have else values


@dataclasses.dataclass(frozen=True)
class Mode:
    """Whether a kernel is compiled, or interpreted on a CPU.

    Attributes:
        interpret: what `plgpu.kernel` takes: None, or ``InterpretGPUParams``.
    """

    interpret: Any = None

    def cast(self, value: jax.Array, layout: Any) -> jax.Array:
        """Say how a value lies in registers."""
        return value if self.interpret else plgpu.layout_cast(value, layout)

    def per_row(self, ref: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Load one value per row and repeat it along columns."""
        value = self.cast(ref[...], PER_ROW).astype(dtype)
        return lax.broadcast_in_dim(value, shape, (0,))

    def per_column(self, ref: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Load one value per column and repeat it along rows."""
        value = self.cast(ref[...], PER_COLUMN).astype(dtype)
        return lax.broadcast_in_dim(value, shape, (1,))

    def release(self) -> None:
        """Before a buffer is filled anew.

        From 0.11 on the interpreter wants a fence between ordinary reads and the copy
        that follows; the barrier in between serves compiled kernels, as it does in the
        pipelines that come with JAX.
        """
        if self.interpret:
            plgpu.commit_smem()

    def also(self, copies: Any, wait: Callable[[], None]) -> None:
        """Have the warpgroup that copies wait, too, at the very end.

        The interpreter wants every warpgroup to see what comes through a barrier; one
        that waited earlier would wait for the others, and hide that they do not.
        """
        if self.interpret:
            pl.when(copies)(wait)

    def unpacked(
        self, program: Program, words: Sequence[jax.Array], shape: "Unpacked"
    ) -> list[jax.Array]:
        """Run a program on words ``[64, 32]``, and put its results together."""
        run = by_arrays if self.interpret else _by_registers
        return run(program, words, shape)

    def transposed_store(self, ref: Any, value: jax.Array) -> None:
        """Store the transpose of 16-bit numbers ``[64, m]``."""
        if self.interpret:
            ref[...] = value.T
        else:
            cast = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
            transposed(ref)[...] = cast

    def accumulated(
        self, shape: tuple[int, int], dtype: Any, write: Callable[..., None]
    ) -> Callable[..., None]:
        """Return a pipeline's context: a sum in registers from its start to its end.

        A step gets it as its carry, adds to `sum_of` that, and returns the same.
        """

        def compiled(run: Any) -> None:
            def scope(total: Any) -> None:
                run(total)
                write(total[...])

            pl.run_scoped(scope, plgpu.ACC(shape, dtype))

        interpreted = lambda run: write(run(jnp.zeros(shape, dtype)))
        return interpreted if self.interpret else compiled

    def sum_of(self, carry: Any) -> Any:
        """Return what `multiply` can add to."""
        return Sum(carry) if self.interpret else carry

    def carry_of(self, total: Any) -> Any:
        """Return a step's carry."""
        return total.value if self.interpret else total

    def carried(self, shape: tuple[int, ...], write: Callable[..., None]) -> Any:
        """Return a pipeline's context: a float32 sum that each step returns anew."""

        def compute(run: Any) -> None:
            zero = jnp.zeros(shape, jnp.float32)
            write(run(self.cast(zero, plgpu.Layout.WGMMA)))

        return compute

    def partial(
        self, shape: tuple[int, int], dtype: Any, accumulate: Callable[[Any], None]
    ) -> jax.Array:
        """Return what ``accumulate`` adds to a sum that starts at zero."""

        def compiled(total: Any) -> jax.Array:
            accumulate(total)
            return total[...]

        if not self.interpret:
            return pl.run_scoped(compiled, plgpu.ACC(shape, dtype))
        found = Sum(jnp.zeros(shape, dtype))
        accumulate(found)
        return found.value

    def write(
        self, buffer: Any, value: jax.Array, out: Any, rows: Any, columns: Any
    ) -> None:
        """Write a tile ``[columns, rows]`` to the result, or to its transpose.

        16-bit numbers are transposed on their way through shared memory.
        """
        flip = value.dtype.itemsize == 2
        if flip:
            self.transposed_store(buffer, value)
        else:
            buffer[...] = value
        plgpu.commit_smem()
        target = out.at[rows, columns] if flip else out.at[columns, rows]
        plgpu.copy_smem_to_gmem(buffer, target)
        plgpu.wait_smem_to_gmem(0)

    def multiply(
        self, total: Any, left: Any, right: Any, in_flight: int | None
    ) -> None:
        """Add ``left @ right.T`` to a sum; wait until only so many products run."""
        if self.interpret:
            left = left if isinstance(left, jax.Array) else left[...]
            sides = (((1,), (1,)), ((), ()))
            kind = total.dtype
            total[...] += lax.dot_general(
                left, right[...], sides, preferred_element_type=kind
            )
        else:
            plgpu.wgmma(total, left, transposed(right))
            if in_flight is not None:
                plgpu.wgmma_wait(in_flight)

    def unpacked_bytes(
        self, program: Program, words: jax.Array, zeros: jax.Array | None
    ) -> jax.Array:
        """Run a program on bytes ``[64, 64]`` (and zero points like them): int8."""
        operands = [words] if zeros is None else [words, zeros]
        if not self.interpret:
            return _bytes_by_registers(program, operands)
        rows, length = words.shape
        fours = [
            lax.bitcast_convert_type(a.reshape(rows, length // 4, 4), jnp.uint32)
            for a in operands
        ]
        (found,) = program(Arrays(), fours)
        return lax.bitcast_convert_type(found, jnp.int8).reshape(rows, length)


class Sum:
    """An accumulator that is a value: what `Mode.multiply` adds to when interpreted."""

    def __init__(self, value: jax.Array):
        self.value = value
        self.dtype = value.dtype

    def __getitem__(self, _: Any) -> jax.Array:
        return self.value

    def __setitem__(self, _: Any, value: jax.Array) -> None:
        self.value = value


@dataclasses.dataclass(frozen=True)
class Unpacked:
    """What becomes of the words that a program returns.

    Attributes:
        dtype: of the 16-bit floats in them.
        arrays: how many ``[64, 32 · planes]`` to make.
        planes: results in each.
    """

    dtype: str
    arrays: int
    planes: int


def by_arrays(
    program: Program, words: Sequence[jax.Array], shape: Unpacked
) -> list[jax.Array]:
    """Run a program on words in plain jnp, two 16-bit numbers at a time."""
    rows, length = words[0].shape
    pairs = [
        lax.bitcast_convert_type(w.reshape(rows, length // 2, 2), jnp.uint32)
        for w in words
    ]
    found = [
        lax.bitcast_convert_type(
            lax.bitcast_convert_type(word, jnp.uint16), jnp.dtype(shape.dtype)
        ).reshape(rows, length)
        for word in program(Arrays(), pairs)
    ]
    starts = range(0, len(found), shape.planes)
    return [jnp.concatenate(found[i : i + shape.planes], axis=1) for i in starts]


def _by_registers(
    program: Program, words: Sequence[jax.Array], shape: Unpacked
) -> list[jax.Array]:
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    count = shape.arrays * shape.planes
    assembly = assemble(program, len(words), count)
    size = words[0].shape[0], words[0].shape[1] * shape.planes
    result = plgpu.ShapeDtypeStruct(
        size, jnp.dtype(shape.dtype), layout=plgpu.Layout.WGMMA
    )

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,) * len(words),
        return_type=(result,) * shape.arrays,
    )
    def run(_: Any, *arrays: Any) -> Any:
        word = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), utils.dtype_to_ir_type(jnp.dtype(shape.dtype)))
        planes = [np.empty_like(arrays[0].registers) for _ in range(count)]
        for place in np.ndindex(arrays[0].registers.shape):
            operands = [utils.bitcast(a.registers[place], word) for a in arrays]
            found = _inline(llvm, ir, word, operands, assembly)
            for plane, value in zip(planes, found, strict=True):
                plane[place] = utils.bitcast(value, pair)
        starts = range(0, count, shape.planes)
        return tuple(
            mgpu.FragmentedArray(
                _registers=np.concatenate(planes[i : i + shape.planes], axis=1),
                _layout=arrays[0].layout,
                _is_signed=None,
            )
            for i in starts
        )

    return list(run(*words))


def _bytes_by_registers(program: Program, operands: list[jax.Array]) -> jax.Array:
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    layout = plgpu.Layout.WGMMA_8BIT
    assembly = assemble(program, len(operands), 1)

    @plgpu.inline_mgpu(
        arg_types=(layout,) * len(operands),
        return_type=plgpu.ShapeDtypeStruct(operands[0].shape, jnp.int8, layout=layout),
    )
    def run(_: Any, *arrays: Any) -> Any:
        word = ir.IntegerType.get_signless(32)
        four = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        registers = np.empty_like(arrays[0].registers)
        for place in np.ndindex(registers.shape):
            words = [utils.bitcast(a.registers[place], word) for a in arrays]
            (found,) = _inline(llvm, ir, word, words, assembly)
            registers[place] = utils.bitcast(found, four)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=arrays[0].layout, _is_signed=True
        )

    return run(*operands)


def _inline(llvm: Any, ir: Any, word: Any, operands: Any, assembly: Any) -> list[Any]:
    """Emit inline assembly and return its results."""
    text, constraints, results = assembly.text, assembly.constraints, assembly.results
    if results == 1:
        return [llvm.inline_asm(word, operands, text, constraints)]
    struct = ir.Type.parse(f"!llvm.struct<({', '.join(['i32'] * results)})>")
    found = llvm.inline_asm(struct, operands, text, constraints)
    return [llvm.extractvalue(word, found, [i]) for i in range(results)]
