"""The patches of a convolution: rows of the matrix product that it is."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# a piece of the patches, in elements: 32 MB of float32
PIECE = 2**23


@dataclasses.dataclass(frozen=True)
class Patches:
    """Which elements of an activation each output of a convolution sums over.

    A convolution is ``rows @ kernel``, with ``K = channels / groups · Π window``: a row
    of ``K`` elements for every output position, each feature group its own, times the
    kernel of its group as a matrix ``[K, outputs / groups]``.

    Attributes:
        axes: the activation's axes: batch, channel, and the spatial ones.
        window: the kernel's lengths along the spatial axes.
        strides: how far the window moves.
        padding: zeros before and behind each spatial axis; negative ones cut off.
        holes: zeros between the elements of each axis (``lhs_dilation`` − 1).
        dilation: how far apart the window's elements lie (``rhs_dilation``).
        groups: ``feature_group_count``.
        order: what each contracted axis of the kernel as it is stored runs over: 0 for
            channels, i for the i-th spatial axis.
        flipped: whether the convolution takes the stored kernel from its end, per
            spatial axis.
    """

    axes: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    holes: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    order: tuple[int, ...]
    flipped: tuple[bool, ...]

    @classmethod
    def of(
        cls,
        params: dict[str, Any],
        kernel: Sequence[int],
        order: Sequence[int] | None = None,
        flipped: Sequence[bool] = (),
    ) -> "Patches":
        """Return the patches of a ``conv_general_dilated`` equation.

        Args:
            params: the equation's parameters.
            kernel: the shape of its kernel.
            order: as above; by default that of the kernel's own axes.
            flipped: as above; by default nowhere.
        """
        numbers = params["dimension_numbers"]
        _, *inner = numbers.rhs_spec
        if order is None:
            order = sorted(range(len(inner)), key=inner.__getitem__)
        rank = len(inner) - 1
        return cls(
            tuple(numbers.lhs_spec),
            tuple(kernel[a] for a in inner[1:]),
            tuple(params["window_strides"]),
            tuple((int(lo), int(hi)) for lo, hi in params["padding"]),
            tuple(n - 1 for n in params["lhs_dilation"]),
            tuple(params["rhs_dilation"]),
            params["feature_group_count"],
            tuple(order),
            tuple(flipped) or (False,) * rank,
        )

    def outputs(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the lengths of the output along the spatial axes."""
        out = []
        for i, axis in enumerate(self.axes[2:]):
            length = shape[axis]
            length += max(length - 1, 0) * self.holes[i] + sum(self.padding[i])
            span = (self.window[i] - 1) * self.dilation[i] + 1
            out.append(max((length - span) // self.strides[i] + 1, 0))
        return tuple(out)

    def middles(self, shape: Sequence[int], axis: int) -> jax.Array:
        """Return where on a spatial axis the middle of each output's window lies."""
        place = jnp.arange(self.outputs(shape)[axis]) * self.strides[axis]
        place = place + (self.window[axis] - 1) // 2 * self.dilation[axis]
        place = (place - self.padding[axis][0]) // (self.holes[axis] + 1)
        return jnp.clip(place, 0, shape[self.axes[2 + axis]] - 1)

    def width(self, shape: Sequence[int]) -> int:
        """Return ``K``, the elements of a patch, for an activation of a shape."""
        return shape[self.axes[1]] // self.groups * math.prod(self.window)

    def rows(self, x: jax.Array) -> jax.Array:
        """Return all patches of an activation: ``[rows, K]``, or ``[G, rows, K]``.

        Rows are in the order of samples and of output positions; elements in that of
        the stored kernel's contracted axes, ascending.

        Example:
            >>> import numpy as np
            >>> conv = lambda x, w: lax.conv_general_dilated(x, w, (1,), [(1, 1)])
            >>> x, w = jnp.arange(4.0)[None, None], jnp.ones((1, 1, 3))
            >>> params = jax.make_jaxpr(conv)(x, w).eqns[0].params
            >>> print(np.asarray(Patches.of(params, w.shape).rows(x), int))
            [[0 0 1]
             [0 1 2]
             [1 2 3]
             [2 3 0]]
        """
        size = (x.shape[self.axes[0]], *(self.outputs(x.shape) or (1,))[:1])
        return self._cut(self._padded(x), (0, 0), size, x.shape)

    def fold(
        self,
        add: Callable[..., Any],
        state: Any,
        arrays: Sequence[jax.Array],
        counts: jax.Array | None = None,
        piece: int = PIECE,
    ) -> Any:
        """Return ``add(state, counts, *rows)`` of all patches, a piece at a time.

        What is in memory is the activation with its zeros, and ``piece`` elements.

        Args:
            add: a pure function from (state, ``bool[rows]`` or None, and the rows of
                each array as `rows` gives them) to the next state.
            state: the first one.
            arrays: activations of one shape.
            counts: which patches count, ``bool[batch, *outputs]``; None: all.
            piece: the most elements at a time, if one line of outputs has no more.
        """
        shape = arrays[0].shape
        samples, out = shape[self.axes[0]], self.outputs(shape)
        if 0 in (samples, *out):
            return state
        lines = out[0] if out else 1
        line = math.prod(out[1:]) * self.width(shape) * self.groups
        take = max(min(samples, piece // max(lines * line, 1)), 1)
        high = lines if lines * line <= piece else max(piece // max(line, 1), 1)
        padded = [self._padded(x) for x in arrays]
        if take >= samples and high >= lines:
            whole = (samples, lines)
            rows = [self._cut(x, (0, 0), whole, shape) for x in padded]
            return add(state, None if counts is None else counts.reshape(-1), *rows)
        across = -(-lines // high)

        def step(i: jax.Array, state: Any) -> Any:
            wanted = (i // across * take, i % across * high)
            # the last piece begins early enough to be whole; what was seen is left out
            first = (
                jnp.minimum(wanted[0], samples - take),
                jnp.minimum(wanted[1], lines - high),
            )
            rows = [self._cut(x, first, (take, high), shape) for x in padded]
            new = (first[0] + jnp.arange(take) >= wanted[0])[:, None]
            new = new & (first[1] + jnp.arange(high) >= wanted[1])
            new = new.reshape(new.shape + (1,) * max(len(out) - 1, 0))
            new = jnp.broadcast_to(new, (take, high, *out[1:]))
            if counts is not None:
                every = counts.reshape(samples, lines, *out[1:])
                at = (*first, *(0,) * (every.ndim - 2))
                new = new & lax.dynamic_slice(every, at, new.shape)
            return add(state, new.reshape(-1), *rows)

        return lax.fori_loop(0, -(-samples // take) * across, step, state)

    def _padded(self, x: jax.Array) -> jax.Array:
        """Return ``[batch, *spatial, channel]`` with all zeros in their places."""
        batch, channel, *spatial = self.axes
        pairs = zip(self.padding, self.holes, strict=True)
        zeros = [(lo, hi, n) for (lo, hi), n in pairs]
        x = x.transpose((batch, *spatial, channel))
        return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *zeros, (0, 0, 0)])

    def _cut(
        self,
        x: jax.Array,
        first: tuple[Any, Any],
        size: Sequence[int],
        shape: Sequence[int],
    ) -> jax.Array:
        """Return the patches of some samples and of some lines of the first axis.

        Args:
            x: what `_padded` returns.
            first: the first sample and the first line.
            size: how many of both.
            shape: of the activation.
        """
        out, rank = list(self.outputs(shape)), len(self.window)
        samples, lines = size
        if samples < x.shape[0]:
            x = lax.dynamic_slice_in_dim(x, first[0], samples, 0)
        if rank and lines < out[0]:
            span = (lines - 1) * self.strides[0]
            span += (self.window[0] - 1) * self.dilation[0] + 1
            x = lax.dynamic_slice_in_dim(x, first[1] * self.strides[0], span, 1)
            out[0] = lines
        x = x.reshape(*x.shape[:-1], self.groups, x.shape[-1] // self.groups)
        for axis in range(rank):
            x = self._along(x, axis, out[axis])
        # samples, (outputs, window) of every axis, groups, channels
        window = {0: 2 * rank + 2} | {i + 1: 2 * i + 2 for i in range(rank)}
        positions = [2 * i + 1 for i in range(rank)]
        inner = [window[i] for i in self.order]
        x = x.transpose((2 * rank + 1, 0, *positions, *inner))
        x = x.reshape(self.groups, samples * math.prod(out), self.width(shape))
        return x if self.groups > 1 else x[0]

    def _along(self, x: jax.Array, axis: int, count: int) -> jax.Array:
        """Return ``x`` with a spatial axis as two: outputs, and what each one reads."""
        place, stride = 2 * axis + 1, self.strides[axis]
        offsets = [i * self.dilation[axis] for i in range(self.window[axis])]
        # strided slices: gathers are slow, on TPUs above all
        parts = [
            lax.slice_in_dim(x, i, i + (count - 1) * stride + 1, stride, place)
            for i in (offsets[::-1] if self.flipped[axis] else offsets)
        ]
        return jnp.stack(parts, place + 1)
