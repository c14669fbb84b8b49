"""A view of a `QTensor` is the same view of its numbers, or a `ViewError`: never wrong.

Views only move data, so they are traced (cheap) and replayed with NumPy: thousands of
shapes are tried without compiling anything.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from jax import lax

from jaxq import views
from jaxq.qtensor import QTensor
from jaxq.quantize import Blocking, padded_length, quantize
from jaxq.spec import QuantSpec
from jaxq.views import ViewError
from pallas_kernels import layouts
from tests import oracle


def _slice(x, start_indices, limit_indices, strides):
    steps = strides or (1,) * x.ndim
    where = zip(start_indices, limit_indices, steps, strict=True)
    return x[tuple(slice(*part) for part in where)]


NUMPY = {
    "transpose": lambda x, permutation: np.transpose(x, permutation),
    "reshape": lambda x, new_sizes, **_: x.reshape(new_sizes),
    "slice": _slice,
    "rev": lambda x, dimensions: np.flip(x, dimensions),
    "convert_element_type": lambda x, new_dtype, **_: x.astype(new_dtype),
    "copy": lambda x: x,
}


def evaluate(jaxpr, consts, *args):
    """Run a jaxpr of data movements with NumPy."""
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= dict(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        values = [v.val if hasattr(v, "val") else known[v] for v in eqn.invars]
        name = eqn.primitive.name
        if name in ("jit", "pjit"):
            inner = eqn.params["jaxpr"]
            outs = evaluate(inner.jaxpr, inner.consts, *values)
        else:
            outs = [NUMPY[name](*values, **eqn.params)]
        known |= dict(zip(eqn.outvars, outs, strict=True))
    return [known[v] for v in jaxpr.outvars]


def viewed(fn, q: QTensor) -> QTensor:
    """``fn(q)`` with NumPy arrays."""
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(q)
    leaves = evaluate(closed.jaxpr, closed.consts, *jax.tree.leaves(q))
    out = jax.tree.unflatten(jax.tree.structure(shape), leaves)
    for leaf, want in zip(leaves, jax.tree.leaves(shape), strict=True):
        assert leaf.shape == want.shape
    return out


# ------------------------------------------------------------------- random tensors

SIZES = st.sampled_from([1, 1, 2, 3, 4, 8, 16, 24, 32])


@st.composite
def qtensors(draw):
    """Any tensor that quantize could make, with random codes, scales and extras."""
    shape = tuple(draw(st.lists(SIZES, min_size=1, max_size=4)))
    assume(math.prod(shape) <= 1 << 13)
    ndim = len(shape)
    roles = draw(
        st.lists(st.sampled_from("kkns"), min_size=ndim, max_size=ndim).filter(
            lambda roles: "k" in roles
        )
    )
    contracting = tuple(i for i in range(ndim) if roles[i] == "k")
    stacked = tuple(i for i in range(ndim) if roles[i] == "s")
    blocks = ["tensor", "channel", "token", 2, 3, 8, 16]
    blocks += [(8, 2), (4, 8)] if "n" in roles else []
    spec = QuantSpec(
        f"uint{draw(st.integers(2, 8))}",
        draw(st.sampled_from(blocks)),
        symmetric=draw(st.booleans()),
        scale=draw(st.sampled_from(["float32", "float32", "float16"])),
    )
    where = Blocking.of(spec, shape, contracting, stacked)
    axis = contracting[-1]
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    padded = padded_length(shape[axis], where.block[axis], spec.bits)
    codes = list(shape)
    codes[axis] = padded * spec.bits // 8
    grid = [-(-n // b) for n, b in zip(shape, where.block, strict=True)]
    offset = input_scale = input_index = rows = None
    if draw(st.integers(0, 3)) == 0:
        offset = rng.standard_normal((1,) * ndim).astype(np.float32)
    if draw(st.integers(0, 2)) == 0:
        full = [n if i in contracting else 1 for i, n in enumerate(shape)]
        input_scale = rng.uniform(0.5, 2, full).astype(np.float32)
    if len(contracting) == 1 and draw(st.integers(0, 2)) == 0:
        rows = draw(st.integers(1, 8))
        picks = (axis, *(i for i in stacked if draw(st.booleans())))
        full = [n if i in picks else 1 for i, n in enumerate(shape)]
        input_index = rng.integers(0, rows, full, dtype=np.int32)
    scales = rng.uniform(0.5, 2, grid).astype(spec.scale)
    zeros = rng.integers(0, 2**spec.bits, grid, dtype=np.uint8)
    return QTensor(
        rng.integers(0, 256, codes, dtype=np.uint8),
        scales,
        None if spec.symmetric else zeros,
        offset,
        input_scale,
        input_index,
        rows=rows,
        spec=spec,
        axis=axis - ndim,
        pack=layouts.pack_block(padded, spec.bits, where.block[axis]),
        padding=padded - shape[axis],
        block=where.block,
        dtype=np.dtype("float32"),
    )


def random_transpose(draw, q):
    order = draw(st.permutations(range(q.ndim)))
    return lambda q: views.transpose(q, order), lambda x: np.transpose(x, order)


def random_reshape(draw, q):
    """Merge some neighbours, split some axes, sprinkle ones."""
    shape, i = [], 0
    while i < q.ndim:
        run = draw(st.integers(1, min(3, q.ndim - i)))
        length, i = math.prod(q.shape[i : i + run]), i + run
        factor = draw(
            st.sampled_from([d for d in range(1, length + 1) if length % d == 0])
        )
        kind = draw(st.integers(0, 3))
        shape += [[length], [length], [factor, length // factor], [1, length]][kind]
    return lambda q: views.reshape(q, shape), lambda x: x.reshape(shape)


def random_slice(draw, q):
    axis = draw(st.integers(0, q.ndim - 1))
    length = q.shape[axis]
    unit = draw(st.sampled_from([1, q.blocks[axis], 8, 16]))
    start = draw(st.integers(0, (length - 1) // unit)) * unit
    size = draw(st.integers(1, -(-(length - start) // unit))) * unit
    size = min(size, length - start)
    cut = (slice(None),) * axis + (slice(start, start + size),)
    return lambda q: views.slice_axis(q, axis, start, size), lambda x: x[cut]


def random_index(draw, q):
    axis = draw(st.integers(0, q.ndim - 1))

    def reverse(a, axis):
        return lax.rev(a, (axis,))

    return lambda q: views.index_axis(q, axis, reverse), lambda x: np.flip(x, axis)


MOVES = [random_transpose, random_reshape, random_reshape, random_slice, random_index]


@settings(max_examples=400)
@given(q=qtensors(), data=st.data())
def test_a_chain_of_views_is_the_same_chain_of_the_numbers(q, data):
    want = oracle.dequantize(q)
    for _ in range(data.draw(st.integers(1, 3))):
        move = data.draw(st.sampled_from(MOVES))
        on_codes, on_numbers = move(data.draw, q)
        try:
            q = viewed(on_codes, q)
        except ViewError as reason:
            event(f"{move.__name__}: {reason}"[:40])
            return
        event(f"{move.__name__}: done")
        want = on_numbers(want)
        assert q.shape == want.shape
        np.testing.assert_allclose(oracle.dequantize(q), want, rtol=1e-6)


@settings(max_examples=100)
@given(q=qtensors(), data=st.data())
def test_a_transposition_is_never_refused_and_undone(q, data):
    order = data.draw(st.permutations(range(q.ndim)))
    there = viewed(lambda q: views.transpose(q, order), q)
    back = viewed(lambda q: views.transpose(q, np.argsort(order).tolist()), there)
    assert jax.tree.structure(back) == jax.tree.structure(q)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(q), strict=True)
    )


# ---------------------------------------- what models need and must never be refused


def make(shape, spec, axis, stacked=(), extras=False):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    q = jax.jit(lambda x: quantize(x, spec, axis, stacked=stacked))(x)
    if extras:
        axes = (axis,) if isinstance(axis, int) else axis
        scale = np.linspace(0.5, 2, math.prod(shape[a] for a in axes))
        full = [n if i in axes else 1 for i, n in enumerate(shape)]
        q = dataclasses.replace(q, input_scale=scale.reshape(full).astype(np.float32))
    return jax.tree.map(np.asarray, q)


G32 = QuantSpec("uint4", 32, symmetric=False, scale="bfloat16")
W8 = QuantSpec("int8")


@pytest.mark.parametrize(
    ("q", "shape"),
    [
        # heads split off, and merged into, the free axes
        (make((64, 24), G32, 0), (64, 4, 6)),
        (make((64, 4, 6), G32, 0), (64, 24)),
        (make((64, 24), W8, 0), (64, 4, 6)),
        # the contracted axes of an output projection merged, and split again
        (make((4, 32, 6), G32, (0, 1)), (128, 6)),
        (make((128, 6), G32, 0), (4, 32, 6)),
        (make((4, 16, 6), G32, (0, 1)), (64, 6)),
        (make((4, 16, 6), W8, (0, 1), extras=True), (64, 6)),
        (make((3, 5, 6), W8, (0, 1)), (15, 6)),
        # a stack of layers or experts
        (make((2, 64, 6), G32, 1, (0,), extras=True), (2, 64, 2, 3)),
        (make((2, 3, 64, 6), G32, 2, (0, 1)), (6, 64, 6)),
        (make((1, 64, 6), G32, 1, (0,)), (64, 6)),
        (make((64, 6), QuantSpec("int8", "tensor"), 0), (64, 2, 3)),
        (make((64, 8), QuantSpec("int4", (32, 4)), 0), (64, 2, 4)),
        # ones anywhere
        (make((50, 6), QuantSpec("int3", 16), 0), (1, 50, 1, 6, 1)),
        (make((64, 6), G32, 0, extras=True), (64, 1, 6)),
    ],
    ids=lambda v: "x".join(map(str, v.shape if isinstance(v, QTensor) else v)),
)
def test_reshapes_that_models_need(q, shape):
    out = viewed(lambda q: views.reshape(q, shape), q)
    assert out.shape == shape
    want = oracle.dequantize(q).reshape(shape)
    np.testing.assert_array_equal(oracle.dequantize(out), want)


@pytest.mark.parametrize(
    ("q", "axis", "start", "size"),
    [
        (make((64, 24), G32, 0), 1, 5, 9),  # q, k and v of a fused projection
        (make((64, 24), W8, 0, extras=True), 1, 8, 16),
        (make((64, 24), G32, 0, extras=True), 0, 32, 32),
        (make((64, 24), W8, 0, extras=True), 0, 16, 32),
        (make((128, 24), QuantSpec("int8", "tensor"), 0), 0, 3, 70),
        (make((3, 64, 6), G32, 1, (0,)), 0, 1, 2),
        (make((64, 24), QuantSpec("int4", (32, 8)), 0), 1, 8, 8),
        (make((64, 20), QuantSpec("int4", (32, 8)), 0), 1, 16, 4),
    ],
    ids=str,
)
def test_slices_that_models_need(q, axis, start, size):
    out = viewed(lambda q: views.slice_axis(q, axis, start, size), q)
    want = np.take(oracle.dequantize(q), range(start, start + size), axis)
    np.testing.assert_array_equal(oracle.dequantize(out), want)


def test_nested_scales_follow_the_view(rng):
    spec = QuantSpec("nf4", 16, scale=QuantSpec("dynamic8", 8, center=True))
    x = jnp.asarray(rng.standard_normal((2, 32, 12)), jnp.float32)
    q = jax.jit(lambda x: quantize(x, spec, 1, stacked=(0,)))(x)
    want = oracle.dequantize(q)
    turned = jax.jit(lambda q: views.transpose(q, (2, 0, 1)))(q)
    assert isinstance(turned.scales, QTensor)
    np.testing.assert_array_equal(oracle.dequantize(turned), want.transpose(2, 0, 1))
    out = jax.jit(lambda q: views.reshape(q, (2, 32, 3, 4)))(q)
    np.testing.assert_array_equal(oracle.dequantize(out), want.reshape(2, 32, 3, 4))
    out = jax.jit(lambda q: views.slice_axis(q, 2, 3, 5))(q)
    np.testing.assert_array_equal(oracle.dequantize(out), want[:, :, 3:8])

    def last(a, axis):
        return lax.dynamic_slice_in_dim(a, 1, 1, axis)

    out = jax.jit(lambda q: views.index_axis(q, 0, last))(q)
    np.testing.assert_array_equal(oracle.dequantize(out), want[1:])


def test_astype():
    q = make((64, 4), G32, 0)
    narrow = views.astype(q, jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    assert narrow.codes is q.codes
    with pytest.raises(ViewError, match="int32, which is not a float"):
        views.astype(q, jnp.int32)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (lambda q: views.slice_axis(q, 0, 5, 30), "slice 5:35 cuts a block of 32"),
        (lambda q: views.slice_axis(q, 0, 0, 16), "slice 0:16 cuts a block of 32"),
        (lambda q: views.reshape(q, (16, 8, 6)), "split"),
        (lambda q: views.reshape(q, (256, 3)), "pack|merge|regroup"),
        (lambda q: views.index_axis(q, 0, lambda a, _: a), "packed axis"),
    ],
    ids=["start", "end", "split", "regroup", "index"],
)
def test_refusals_say_why(view, message):
    with pytest.raises(ViewError, match=message):
        view(make((128, 6), G32, 0))


def test_axis_groups():
    pair = lambda *args: list(views.axis_groups(*args))
    assert pair((6, 4), (24,)) == [((0, 1), (0,))]
    assert pair((24,), (6, 4)) == [((0,), (0, 1))]
    assert pair((2, 3, 4), (6, 4)) == [((0, 1), (0,)), ((2,), (1,))]
    assert pair((4, 6), (6, 4)) == [((0, 1), (0, 1))]
