"""How a product with a packed weight is cut into thread blocks and steps."""

import dataclasses
import math
from typing import Any

import jax

from pallas_kernels.gpu.layout import WORDS, Block, filled, matrix
from pallas_kernels.kernel import Coding, Problem

COLUMNS = 64  # of a weight, per warpgroup: the rows of its accumulator
SHARED = 225_000  # bytes of a thread block, for buffers
EIGHT = 8  # rows of a product come by eights up to 32, beyond by sixteens


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The static sizes of one product.

    Attributes:
        coding: of the weight.
        inner: K of the weight.
        columns: N, whole warpgroups of them.
        group: rows per scale; K when a column has one.
        groups: scales per column.
        rows: rows of the activation per thread block.
        row_tiles: how many of those.
        warpgroups: that compute.
        each: columns per warpgroup.
        step: rows of the weight per step.
        splits: parts of K.
        stages: buffers.
    """

    coding: Coding
    inner: int
    columns: int
    group: int
    groups: int
    rows: int
    row_tiles: int
    warpgroups: int
    each: int
    step: int
    splits: int
    stages: int

    @classmethod
    def of(
        cls,
        rows: int,
        codes: jax.Array,
        groups: int,
        coding: Coding,
        group: int,
        tile: Any,
        sizes: tuple[int, int],
    ) -> "Geometry":
        """Fit a tile to ``x[rows, K]`` and relaid codes.

        Args:
            rows: of the activation.
            codes: relaid.
            groups: scales per column.
            coding: of the weight.
            group: rows per scale.
            tile: the kernel's.
            sizes: bytes of a number of the activation, and of the result.

        Raises:
            ValueError: when groups do not divide K, or are not of 32 · 2^n rows.
        """
        inner, columns = matrix(codes.shape, coding)
        group = inner if groups == 1 else group
        if (reason := cannot_group(inner, group)) is not None:
            raise ValueError(reason)
        step = _step(inner, Block(coding.bits).rows, group, tile.inner)
        per_block = min(tile.rows, up(rows, EIGHT if rows <= 4 * EIGHT else 2 * EIGHT))
        splits = math.gcd(inner // step, tile.splits)
        columns = up(columns, COLUMNS)
        each = math.gcd(columns, tile.columns)
        counts = range(1, tile.warpgroups + 1)
        warpgroups = max(n for n in counts if columns // each % n == 0)
        count = -(-rows // per_block)
        loaded = step * (coding.bits * each * warpgroups // 8 + sizes[0] * per_block)
        written = sizes[1] * COLUMNS * warpgroups * per_block
        fit = (SHARED - written) // (loaded + 16 * each * warpgroups)
        stages = min(tile.stages, inner // step // splits, fit)
        return cls(
            coding=coding,
            inner=inner,
            columns=columns,
            group=group,
            groups=inner // group,
            rows=per_block,
            row_tiles=count,
            warpgroups=warpgroups,
            each=each,
            step=step,
            splits=splits,
            stages=max(stages, 1),
        )

    @property
    def padded_rows(self) -> int:
        """Rows of the activation, whole thread blocks of them."""
        return self.rows * self.row_tiles

    @property
    def tile_columns(self) -> int:
        """Columns per thread block."""
        return self.each * self.warpgroups

    @property
    def column_tiles(self) -> int:
        """Thread blocks along N."""
        return self.columns // self.tile_columns

    @property
    def steps(self) -> int:
        """Steps of a thread block."""
        return self.inner // self.step // self.splits

    @property
    def slabs(self) -> int:
        """Slabs of words per step."""
        block = Block(self.coding.bits)
        return self.step // block.rows * block.slabs

    @property
    def scales(self) -> int:
        """Scales of a column per step."""
        return max(self.step // self.group, 1)

    @property
    def run(self) -> int:
        """Rows of a step that share a scale."""
        return min(self.group, self.step)

    @property
    def operand(self) -> int:
        """Rows of a weight in one operand of a tensor core."""
        return min(self.run, 2 * WORDS)

    def step_of(self, layer: Any, split: Any, i: Any) -> Any:
        """Return which of all steps of a stack this one is."""
        return layer * (self.inner // self.step) + split * self.steps + i

    def scales_of(self, layer: Any, split: Any, i: Any) -> Any:
        """Return which block of `scales` belongs to a step."""
        if self.groups == 1:
            return layer + 0 * i  # the pipeline wants indices that depend on its grid
        if self.group <= self.step:
            return self.step_of(layer, split, i)
        return self.step_of(layer, split, i) // (self.group // self.step)


def cannot_group(inner: int, group: int) -> str | None:
    """Return why groups do not fit these kernels, or None."""
    if group >= inner:
        return None
    if inner % group:
        return f"groups of {group} do not divide {inner} rows"
    if group % WORDS or (group // WORDS) & (group // WORDS - 1):
        return f"groups of {group} are not 32 · 2^n rows"
    return None


def cannot_cut(p: Problem) -> str | None:
    """Return why the groups of a problem do not fit these kernels, or None."""
    if p.group >= p.inner:
        return None
    return cannot_group(filled(p.inner, p.coding.bits), p.group)


def up(n: int, unit: int) -> int:
    """Round up to whole units."""
    return -(-n // unit) * unit


def _step(inner: int, block: int, group: int, wanted: int) -> int:
    """Return the rows of a step: whole blocks that cut no group unevenly."""
    step = block
    while step < wanted and inner % (2 * step) == 0:
        if group < inner and group > step and group % (2 * step):
            break
        step *= 2
    return step
