"""The dispatch table: which kernel multiplies, and why the others declined."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxq.formats.codebook import CodebookFormat
from jaxq.layer import Layer
from jaxq.ops.accelerated import accelerated
from jaxq.ops.activation import quantized_input, split_outliers
from jaxq.ops.derivative import borrow_derivative
from jaxq.ops.lookup import LOOKUPS, lookups, run_dequantized
from jaxq.ops.outliers import outlier_product
from jaxq.ops.parallel import left_to_the_compiler
from jaxq.ops.problem import Choice, Kernel, Problem
from jaxq.qtensor import QTensor
from jaxq.relayout import PLANAR, relayout
from jaxq.spec import QuantSpec
from pallas_kernels.target import Target
from pallas_kernels.xla import fused_dot, integer_dot, integer_tiled_dot, tiled_dot
from pallas_kernels.xla.fused_dot import sum_block

# Measured with benchmarks/linear.py on x86 with AMX, 4096 x 4096.
FEW_ROWS = 2  # up to here, decoding for every row costs less than writing floats
MANY_ROWS = 256  # up to here, tiles of int8 stay in the cache; beyond, it is all one


def _needs_planar(p: Problem) -> str | None:
    if p.w.axis % p.w.ndim != 0:
        return "the weight is packed along an axis that is not contracted"
    if p.w.spec.binary:
        return "every bit of the weight has a scale of its own"
    return "the weight has an offset" if p.w.offset is not None else None


def _needs_few_rows(p: Problem) -> str | None:
    if not 0 < p.x.shape[0] <= FEW_ROWS:
        return f"{p.x.shape[0]} rows: decoding once for all of them is faster"
    fmt, (bits, pack, group) = p.w.spec.number_format, p.packing.values()
    if bits > 4 and isinstance(fmt, CodebookFormat):
        return f"looking up a table of {2**bits} numbers does not vectorize"
    rows = p.w.codes.shape[0] * 8 // bits
    if group < rows and group % sum_block(rows, bits, pack, group):
        return f"groups of {group} cut packed blocks"
    return _needs_planar(p)


def _needs_integers(p: Problem) -> str | None:
    act = p.w.activation
    if act is None:
        return "the activation stays float"
    if act.outliers is not None:
        return "the activation keeps outliers in float"
    return _needs_integer_operands(p, act)


def _needs_outliers(p: Problem) -> str | None:
    act = p.w.activation
    if act is None:
        return "the activation stays float"
    if act.outliers is None:
        return "the activation keeps no outliers in float"
    return _needs_integer_operands(p, act)


def _needs_integer_operands(p: Problem, act: QuantSpec) -> str | None:
    rows = act.block in ("token", "channel", "tensor")
    if act.format != "int8" or not (rows and act.symmetric) or act.center:
        return (
            f"the activation is {act.describe()}, not int8 per token or tensor: it is "
            f"rounded and multiplied as floats"
        )
    fmt = p.w.spec.number_format
    if not fmt.is_integer:
        return f"the weight is {fmt.name}, not an integer"
    if fmt.name == "uint8" or (fmt.bits == 8 and p.w.zeros is not None):
        return f"{fmt.name} codes less a zero point do not fit int8"
    group = p.w.blocks[0]
    if fmt.bits < 8 and group < p.w.shape[0] and group % 8:
        return f"groups of {group} cut packed bytes"
    return _needs_planar(p)


def _needs_whole_int8(p: Problem) -> str | None:
    return _prefers_tiles(p) or _needs_integers(p)


def _prefers_tiles(p: Problem) -> str | None:
    if p.w.spec.format != "int8":
        return "the weight is not int8"
    if p.w.blocks[0] < p.w.shape[0]:
        return "the weight has several scales per column"
    if p.x.shape[0] <= MANY_ROWS:
        return f"{p.x.shape[0]} rows: a walk over tiles is faster"
    return None


def _run_fused(p: Problem) -> jax.Array:
    decode = p.w.spec.number_format.decode
    if _needs_integers(p) is not None:
        x = quantized_input(p.x, p.w)
        return fused_dot(x, *p.arrays(jnp.float32), **p.packing, decode=decode)
    # sums of a few products of small integers are exact in float32
    q = p.quantized_activation()
    x = q.code_values()
    y = fused_dot(x, *p.arrays(jnp.float32), **p.packing, decode=decode)
    return y * q.scale_values()


def _run_whole_int8(p: Problem) -> jax.Array:
    return _whole_int8(p, p.quantized_activation())


def _whole_int8(p: Problem, q: QTensor) -> jax.Array:
    w = lax.bitcast_convert_type(p.w.codes, jnp.int8)
    x = lax.bitcast_convert_type(q.codes, jnp.int8)
    total = integer_dot(x, w).astype(jnp.float32)
    return total * q.scale_values() * p.per_column(p.w.scale_values())


def _run_integer_tiles(p: Problem) -> jax.Array:
    return _integer_tiles(p, p.quantized_activation())


def _integer_tiles(p: Problem, q: QTensor) -> jax.Array:
    fmt = p.w.spec.number_format
    total = integer_tiled_dot(
        lax.bitcast_convert_type(q.codes, jnp.int8),
        *p.arrays(jnp.int8),
        **p.packing,
        decode=lambda codes: fmt.decode(codes, jnp.int8),
    )
    return total * q.scale_values()


def _run_outliers(p: Problem) -> jax.Array:
    if p.w.activation is None:
        raise ValueError(f"{p.w!r} leaves its activations float")
    part, columns = split_outliers(p.x, p.w, p.w.activation)
    regular = (_whole_int8 if _prefers_tiles(p) is None else _integer_tiles)(p, part)
    plain = dataclasses.replace(p.w, activation=None)

    def whole(x: jax.Array) -> jax.Array:
        return _run_tiles(Problem(x, plain, p.precision))

    return regular + outlier_product(p.x, plain, columns[0], whole, p.precision)


def _run_tiles(p: Problem) -> jax.Array:
    return tiled_dot(
        quantized_input(p.x, p.w),
        *p.arrays(jnp.float32),
        **p.packing,
        decode=p.w.spec.number_format.decode,
        compute=p.compute_dtype,
        precision=p.precision,
    )


_ANY = ("cpu", "gpu", "tpu")

# In order of preference. The last takes everything.
KERNELS: tuple[Kernel, ...] = (
    Kernel("xla.fused_dot", _ANY, _needs_few_rows, _run_fused, _run_tiles),
    Kernel("xla.mixed_int8_dot", _ANY, _needs_outliers, _run_outliers, _run_tiles),
    Kernel("xla.int8_dot", _ANY, _needs_whole_int8, _run_whole_int8, _run_tiles),
    Kernel(
        "xla.integer_tiled_dot", _ANY, _needs_integers, _run_integer_tiles, _run_tiles
    ),
    Kernel("xla.tiled_dot", _ANY, _needs_planar, _run_tiles),
    *LOOKUPS,
    Kernel("xla.dequantize_dot", _ANY, lambda _: None, run_dequantized),
)


def choose(p: Problem, target: Target) -> tuple[Kernel, Choice]:
    """Return the first kernel that takes the problem, and the record.

    The chip's own kernels are asked first. Those of the table take a single matrix in
    the canonical layout: `planar_problem`.
    """
    declined: list[tuple[str, str]] = []
    special = lookups(target) if p.w.spec.binary else ()
    for kernel in (*accelerated(target), *special):
        reason = kernel.declines(p)
        if reason is None:
            return kernel, Choice(kernel.name, tuple(declined))
        declined.append((kernel.name, reason))
    shapes = jax.eval_shape(lambda x, w, i: planar_arrays(x, w, i), p.x, p.w, p.layer)
    plain = dataclasses.replace(p, x=shapes[0], w=shapes[1], layer=None)
    for kernel in KERNELS:
        elsewhere = target.backend not in kernel.backends
        reason = f"not for {target.backend}" if elsewhere else kernel.declines(plain)
        if reason is None:
            return kernel, Choice(kernel.name, tuple(declined))
        declined.append((kernel.name, reason))
    raise RuntimeError("the last kernel of the table must take every problem")


def planar_arrays(
    x: jax.Array, w: QTensor, layer: jax.Array | None
) -> tuple[jax.Array, QTensor]:
    """Return a problem's operands as the kernels in plain XLA take them.

    Relaid codes are packed again: a copy of the packed bytes, never of floats.
    """
    w = w if layer is None else Layer(w, layer).taken()
    return x, relayout(w, PLANAR)


def multiply(p: Problem, target: Target | None = None) -> tuple[jax.Array, Choice]:
    """Run the chosen kernel: ``[M, N]`` in float32 or the dtype asked for.

    Args:
        p: the product.
        target: the chip to choose for; by default the one this will run on.

    Returns:
        The product, and the record of the choice.
    """
    kernel, choice = choose(p, Target.here() if target is None else target)
    w = dataclasses.replace(p.w, name=None)
    return _product(p.x, (w, p.layer), kernel, p.precision, p.out_dtype), choice


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _product(
    x: jax.Array,
    weight: tuple[QTensor, jax.Array | None],
    kernel: Kernel,
    precision: lax.PrecisionLike,
    out_dtype: DTypeLike,
) -> jax.Array:
    """Run a kernel; jitted, so that equal layers of a model are traced once."""

    def problem(x: jax.Array, w: QTensor, layer: jax.Array | None = None) -> Problem:
        return Problem(x, w, precision, layer, out_dtype)

    def lend(x: jax.Array, weight: Any) -> jax.Array:
        lender = kernel.derivative or _run_tiles
        return lender(problem(*planar_arrays(x, *weight)))

    if kernel.accelerated:
        # a derivative that is asked for is that of the product in plain XLA
        run = lambda x, weight: kernel.run(problem(x, *weight)).astype(out_dtype)
        return borrow_derivative(run, lend, x, weight)
    run = lambda x, weight: kernel.run(problem(*planar_arrays(x, *weight)))
    if kernel.derivative is None:
        return left_to_the_compiler(run, x, weight)
    borrowed = functools.partial(borrow_derivative, run, lend)
    return left_to_the_compiler(borrowed, x, weight)
