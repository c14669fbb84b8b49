"""The patches of a convolution, against windows cut out by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxq.ops import Patches

# name: (lhs, rhs), dimension numbers, and what differs from a plain convolution
CASES = {
    "1d": ((2, 5, 9), (4, 5, 3), ("NCH", "OIH", "NCH"), {}),
    "1d-strided": ((2, 9, 5), (4, 5, 6), ("NHC", "HIO", "NHC"), {"strides": (2,)}),
    "1d-causal": (
        (2, 9, 3),
        (3, 3, 4),
        ("NHC", "HIO", "NHC"),
        {"padding": [(4, 0)], "rhs_dilation": (2,)},
    ),
    "same": (
        (2, 5, 7, 4),
        (3, 3, 4, 6),
        ("NHWC", "HWIO", "NHWC"),
        {"padding": "SAME", "strides": (1, 2)},
    ),
    "nchw": (
        (2, 4, 6, 5),
        (6, 4, 2, 3),
        ("NCHW", "OIHW", "NCHW"),
        {"padding": [(1, 2), (0, 3)]},
    ),
    "odd-order": ((4, 6, 2, 5), (3, 6, 2, 4), ("CHNW", "WOHI", "NHCW"), {}),
    "groups": (
        (3, 6, 5, 8),
        (3, 2, 2, 12),
        ("NHWC", "HWIO", "NHWC"),
        {"feature_group_count": 4, "padding": "SAME"},
    ),
    "depthwise": (
        (2, 6, 5, 3),
        (3, 3, 1, 6),
        ("NHWC", "HWIO", "NHWC"),
        {"feature_group_count": 3, "strides": (2, 2), "padding": "SAME"},
    ),
    "transposed": (
        (2, 4, 4, 3),
        (3, 3, 3, 5),
        ("NHWC", "HWIO", "NHWC"),
        {"lhs_dilation": (2, 3), "padding": [(2, 2), (1, 3)]},
    ),
    "cropped": (
        (2, 8, 7, 2),
        (2, 2, 2, 3),
        ("NHWC", "HWIO", "NHWC"),
        {"padding": [(-1, 2), (1, -2)], "rhs_dilation": (3, 2)},
    ),
    "3d": (
        (2, 4, 5, 3, 2),
        (2, 3, 2, 2, 4),
        ("NDHWC", "DHWIO", "NDHWC"),
        {"strides": (1, 2, 1), "padding": "SAME", "rhs_dilation": (1, 1, 2)},
    ),
    "patch-embedding": (
        (2, 8, 8, 3),
        (4, 4, 3, 5),
        ("NHWC", "HWIO", "NHWC"),
        {"strides": (4, 4), "padding": "VALID"},
    ),
    "pointwise": ((2, 3, 3, 6), (1, 1, 6, 4), ("NHWC", "HWIO", "NHWC"), {}),
}


def convolution(name):
    """Operands, the convolution as a function of them, and what its equation says."""
    lhs, rhs, numbers, more = CASES[name]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=lhs), jnp.float32)
    w = jnp.asarray(rng.normal(size=rhs), jnp.float32)
    more = dict(more)
    strides = more.pop("strides", (1,) * (len(lhs) - 2))
    padding = more.pop("padding", "VALID")

    def run(x, w):
        return lax.conv_general_dilated(
            x, w, strides, padding, dimension_numbers=numbers, **more
        )

    return x, w, run, jax.make_jaxpr(run)(x, w).eqns[0].params


def by_hand(x, w, params):
    """``[G, rows, K]`` in float64: every window is cut out of the padded activation."""
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    x = np.asarray(x, np.float64).transpose(numbers.lhs_spec)
    _, channel, *spatial = numbers.rhs_spec
    window = [w.shape[a] for a in spatial]
    for axis, holes in enumerate(params["lhs_dilation"], 2):
        shape = list(x.shape)
        shape[axis] = (shape[axis] - 1) * holes + 1
        wide = np.zeros(shape)
        wide[tuple([slice(None)] * axis + [slice(None, None, holes)])] = x
        x = wide
    for axis, (lo, hi) in enumerate(params["padding"], 2):
        pad = [(0, 0)] * x.ndim
        pad[axis] = (max(lo, 0), max(hi, 0))
        x = np.pad(x, pad)
        cut = slice(max(-lo, 0), x.shape[axis] - max(-hi, 0))
        x = x[tuple([slice(None)] * axis + [cut])]
    spans = [
        (n - 1) * d + 1 for n, d in zip(window, params["rhs_dilation"], strict=True)
    ]
    starts = [
        range(0, n - span + 1, stride)
        for n, span, stride in zip(
            x.shape[2:], spans, params["window_strides"], strict=True
        )
    ]
    stored = np.argsort(np.argsort([channel, *spatial]))
    rows = []
    for sample in x:
        for corner in itertools.product(*starts):
            cuts = zip(corner, spans, params["rhs_dilation"], strict=True)
            patch = sample[(slice(None), *(slice(c, c + n, d) for c, n, d in cuts))]
            parts = np.split(patch, groups)
            rows.append([p.transpose(np.argsort(stored)).ravel() for p in parts])
    return np.stack(rows, 1)


@pytest.mark.parametrize("name", CASES)
def test_rows_are_the_windows_and_the_convolution_is_their_product(name):
    x, w, run, params = convolution(name)
    patches = Patches.of(params, w.shape)
    want = by_hand(x, w, params)
    rows = np.asarray(patches.rows(x), np.float64)
    rows = rows[None] if patches.groups == 1 else rows
    np.testing.assert_array_equal(rows, want)

    out, *inner = params["dimension_numbers"].rhs_spec
    kernel = np.asarray(w, np.float64).transpose((*sorted(inner), out))
    kernel = kernel.reshape(want.shape[-1], patches.groups, -1)
    y = np.einsum("gnk,kgo->ngo", want, kernel)
    y = y.reshape(x.shape[patches.axes[0]], *patches.outputs(x.shape), -1)
    spec = params["dimension_numbers"].out_spec
    got = np.asarray(run(x, w)).transpose((spec[0], *spec[2:], spec[1]))
    np.testing.assert_allclose(got, y, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["1d", "1d-causal", "groups"])
@pytest.mark.parametrize("piece", [1, 40, 3000])
def test_pieces_add_up_to_the_whole(name, piece):
    """One line at a time, lines that overlap at the end, and samples that do."""
    x, w, _, params = convolution(name)
    patches = Patches.of(params, w.shape)
    shape = (x.shape[patches.axes[0]], *patches.outputs(x.shape))
    counts = np.random.default_rng(1).random(shape) < 0.7

    def add(total, counts, rows):
        kept = jnp.where(counts[:, None], rows, 0)
        return total + jnp.einsum("...nk,...nl->...kl", kept, kept)

    lead = (patches.groups,) if patches.groups > 1 else ()
    width = patches.width(x.shape)
    zero = jnp.zeros((*lead, width, width))
    fold = jax.jit(lambda x, c: patches.fold(add, zero, [x], c, piece))
    want = by_hand(x, w, params)[:, counts.ravel()]
    want = np.einsum("gnk,gnl->gkl", want, want)
    got = np.asarray(fold(x, counts)).reshape(want.shape)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
