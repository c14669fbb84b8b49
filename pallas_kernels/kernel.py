"""What a kernel is: the facts it decides on, the arrays it takes, how it is listed.

One kernel is one module ``pallas_kernels/<backend>/<name>.py`` with

- the public function, arrays in and an array out;
- a frozen ``Tile`` and the literal ``TILES``, of which the first that fits is used;
- ``reference``, the same product in plain `jax.numpy` and float32;
- ``CASES``, the literal list that tests and benchmarks share;
- ``KERNEL``, its row for `pallas_kernels.table`.

A backend's weight layout is a `Layout`, in ``pallas_kernels/<backend>/layout.py``: a
bijection of the canonical planar bytes of `pallas_kernels.layouts`. Only codes are laid
out anew; scales and zero points stay ``[groups, N]``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.target import GENERATIONS


@dataclasses.dataclass(frozen=True)
class Coding:
    """What codes stand for, and how their planar form is packed.

    Attributes:
        kind: ``"integer"``, ``"float8_e4m3fn"``, ``"float8_e5m2"`` or ``"table"``.
        bits: bits per code.
        pack: rows per packing block (see `pallas_kernels.layouts`).
        lowest: the smallest integer. A code below 8 bits, or of an unsigned format,
            stands for ``code + lowest``; 8 bits with ``lowest = -128`` are two's
            complement.
        table: the numbers of the codes, for ``"table"``.
    """

    kind: str
    bits: int
    pack: int
    lowest: int = 0
    table: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Problem:
    """The plain facts of a product ``x[M, K] @ ((w[K, N] − zero) · scale)``.

    Attributes:
        rows: M.
        inner: K.
        columns: N.
        dtype: of ``x``: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        out_dtype: of the result.
        coding: of the weight.
        group: rows per scale; ``inner`` when a column has one scale.
        zeros: whether there are zero points.
        activation: what ``x`` is rounded to, per row, before it is multiplied:
            ``"int8"``, ``"float8_e4m3fn"``; None when it stays float.
        layers: how many weights are stacked in front, or None for a single one.
        precise: whether more than the hardware's fast precision is asked for.
    """

    rows: int
    inner: int
    columns: int
    dtype: str
    out_dtype: str
    coding: Coding
    group: int
    zeros: bool = False
    activation: str | None = None
    layers: int | None = None
    precise: bool = False


@dataclasses.dataclass(frozen=True)
class Operands:
    """The arrays of a `Problem`.

    Attributes:
        x: ``[M, K]``, float.
        codes: the weight in the kernel's layout, ``[L, ...]`` when stacked.
        scales: float32, bfloat16 or float16 ``[groups, N]``, ``[L, groups, N]`` when
            stacked; groups and N may be 1: shared.
        zeros: integer zero points, shaped like ``scales``, in the numbers of the codes
            (``value − zero``), or None.
        x_scale: float32 ``[M, 1]``, the scale of ``x`` for an ``activation``.
        layer: int32 scalar, which of the stacked weights to take; None for one weight.
    """

    x: jax.Array
    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array | None = None
    x_scale: jax.Array | None = None
    layer: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class TileRow:
    """A row of ``TILES``: where a tile is used.

    Attributes:
        generation: ``"v5e"``, ``"sm_90"`` ...; ``"*"`` for any.
        rows: up to how many rows of ``x``.
        tile: the kernel's own ``Tile``.
    """

    generation: str
    rows: int
    tile: Any

    def fits(self, generation: str, rows: int) -> bool:
        """Whether the row is for that chip and as many rows."""
        return self.generation in ("*", generation) and rows <= self.rows


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel as the table lists it.

    Attributes:
        name: ``"tpu.weight_only_decode"``; shown by `jaxq.explain`.
        backend: ``"tpu"`` or ``"gpu"``.
        generations: the chips it is for: `pallas_kernels.target.generations`.
        layout: the name of the `Layout` its codes must have.
        declines: the reason it does not take a problem, or None.
        run: ``run(problem, operands, tile, interpret)``, the product ``[M, N]``;
            ``interpret`` is what `jax.experimental.pallas.pallas_call` takes.
        tiles: the tiles to choose from; the autotuner tries them all.
    """

    name: str
    backend: str
    generations: tuple[str, ...]
    layout: str
    declines: Callable[[Problem], str | None]
    run: Callable[[Problem, Operands, Any, Any], jax.Array]
    tiles: tuple[TileRow, ...]

    def refuses(self, problem: Problem, generation: str) -> str | None:
        """Return why the kernel does not take a problem on a chip, or None."""
        if generation not in self.generations:
            return f"not for {generation}"
        rounds = (problem.activation or "").startswith("float8")
        if rounds and not GENERATIONS[generation].fp8:
            return f"{generation} does not multiply fp8 by fp8"
        return self.declines(problem)

    def tile(self, problem: Problem, generation: str) -> Any:
        """Return the first tile that fits."""
        fits = (row for row in self.tiles if row.fits(generation, problem.rows))
        row = next(fits, None)
        if row is None:
            raise ValueError(
                f"{self.name} has no tile for {problem.rows} rows on {generation}: "
                f"add a TileRow to its TILES"
            )
        return row.tile


def tuning_key(kernel: Kernel, p: Problem) -> str:
    """Return what a tuned tile is filed under: all that its speed depends on.

    Rows are rounded up to a power of two.
    """
    coding = p.coding
    rows = 1 << max(p.rows - 1, 0).bit_length()
    zeros = " zeros" if p.zeros else ""
    return (
        f"{kernel.name} {rows}x{p.inner}x{p.columns} {p.dtype} "
        f"{coding.kind}{coding.bits} g{p.group}{zeros} {p.activation or 'float'}"
    )


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a backend wants codes to lie; a bijection, bit for bit.

    Leading axes (layers, experts) are kept. No rank changes: what is ``[..., a, b]``
    stays so.

    Attributes:
        name: ``"tpu"`` ...; the ``layout`` of a relaid `QTensor`.
        declines: why codes cannot take this layout, or None.
        prepack: from planar bytes ``[..., K · bits / 8, N]``.
        unpack: back to them.
        matrix: from the shape of relaid codes to ``(K, N)``, K with its planar padding.
    """

    name: str
    declines: Callable[[Coding, int, int], str | None]
    prepack: Callable[[jax.Array, Coding], jax.Array]
    unpack: Callable[[jax.Array, Coding], jax.Array]
    matrix: Callable[[tuple[int, ...], Coding], tuple[int, int]]
