"""The dispatch table: which kernel multiplies, and why the others declined."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxq.formats.codebook import CodebookFormat
from jaxq.ops.activation import quantized_input, split_outliers, static_or_dynamic
from jaxq.ops.derivative import Product, borrow_derivative
from jaxq.ops.outliers import outlier_product
from jaxq.qtensor import QTensor
from jaxq.spec import QuantSpec
from pallas_kernels.xla import fused_dot, integer_dot, integer_tiled_dot, tiled_dot
from pallas_kernels.xla.fused_dot import sum_block

# Measured with benchmarks/linear.py on x86 with AMX, 4096 x 4096.
FEW_ROWS = 2  # up to here, decoding for every row costs less than writing floats
SMALL_ROWS = 4  # up to here, converting tiles to bfloat16 costs more than it saves
MANY_ROWS = 256  # up to here, tiles of int8 stay in the cache; beyond, it is all one


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product ``x[M, K] @ w[K, N]`` in the form every kernel takes.

    Attributes:
        x: the activation, float.
        w: the weight; packed along K, its input scale already applied to ``x``.
        precision: as in `jax.lax.dot_general`.
    """

    x: jax.Array
    w: QTensor
    precision: lax.PrecisionLike = None

    @property
    def compute_dtype(self) -> DTypeLike:
        """The operand dtype: float32, or bfloat16 for some rows of bfloat16."""
        some = self.x.shape[0] > SMALL_ROWS
        return self.x.dtype if some and self.x.dtype == jnp.bfloat16 else jnp.float32

    def arrays(self, dtype: DTypeLike) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Return codes, and per column float32 scales and zeros in ``dtype``."""
        zeros = self.w.zeros
        return (
            self.w.codes,
            self.per_column(self.w.scale_values()),
            None if zeros is None else self.per_column(zeros.astype(dtype)),
        )

    @property
    def packing(self) -> dict[str, Any]:
        """How the kernels' codes are packed and grouped."""
        return {
            "bits": self.w.spec.bits,
            "pack": self.w.pack,
            "group": self.w.blocks[0],
        }

    def quantized_activation(self) -> QTensor:
        """Return ``x`` quantized as the weight asks.

        Raises:
            ValueError: when the weight leaves activations float.
        """
        if self.w.activation is None:
            raise ValueError(f"{self.w!r} leaves its activations float")
        return static_or_dynamic(self.x, self.w, self.w.activation)

    def per_column(self, values: jax.Array) -> jax.Array:
        """Spread one value per block over columns: ``[groups, N]``."""
        columns, block = self.w.shape[1], self.w.blocks[1]
        if values.shape[1] == columns:
            return values
        if values.shape[1] == 1:
            return jnp.broadcast_to(values, (values.shape[0], columns))
        return jnp.repeat(values, block, axis=1)[:, :columns]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Attributes:
        name: shown by `jaxq.explain`.
        backends: where it may run.
        declines: the reason it does not take a problem, or None.
        run: the float32 product ``[M, N]``.
        derivative: the kernel whose derivative stands in for its own, if any.
    """

    name: str
    backends: tuple[str, ...]
    declines: Callable[[Problem], str | None]
    run: Callable[[Problem], jax.Array]
    derivative: Callable[[Problem], jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which kernel took a problem, and what the ones before it said."""

    kernel: str
    declined: tuple[tuple[str, str], ...] = ()


def _needs_planar(p: Problem) -> str | None:
    if p.w.axis % p.w.ndim != 0:
        return "the weight is packed along an axis that is not contracted"
    if p.w.layout != "planar":
        return f"the codes are in layout {p.w.layout!r}"
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
        return f"the activation is {act.describe()}, not int8 per token or tensor"
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


def _run_dequantize(p: Problem) -> jax.Array:
    x = quantized_input(p.x, p.w).astype(p.compute_dtype)
    w = p.w.dequantize(p.compute_dtype)
    return jnp.matmul(x, w, precision=p.precision, preferred_element_type=jnp.float32)


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
    Kernel("xla.dequantize_dot", _ANY, lambda _: None, _run_dequantize),
)


def choose(p: Problem) -> tuple[Kernel, Choice]:
    """Return the first kernel of the table that takes the problem, and the record."""
    backend = jax.default_backend()
    declined: list[tuple[str, str]] = []
    for kernel in KERNELS:
        elsewhere = None if backend in kernel.backends else f"not for {backend}"
        reason = elsewhere or kernel.declines(p)
        if reason is None:
            return kernel, Choice(kernel.name, tuple(declined))
        declined.append((kernel.name, reason))
    raise RuntimeError("the last kernel of the table must take every problem")


def multiply(p: Problem) -> tuple[jax.Array, Choice]:
    """Run the chosen kernel: float32 ``[M, N]`` and the record of the choice."""
    kernel, choice = choose(p)
    w = dataclasses.replace(p.w, name=None)
    return _product(p.x, w, kernel, p.precision), choice


@functools.partial(jax.jit, static_argnums=(2, 3))
def _product(
    x: jax.Array, w: QTensor, kernel: Kernel, precision: lax.PrecisionLike
) -> jax.Array:
    """Run a kernel; jitted, so that equal layers of a model are traced once."""

    def of(run: Callable[[Problem], jax.Array]) -> Product:
        return lambda x, w: run(Problem(x, w, precision))

    if kernel.derivative is None:
        return of(kernel.run)(x, w)
    return borrow_derivative(of(kernel.run), of(kernel.derivative), x, w)
