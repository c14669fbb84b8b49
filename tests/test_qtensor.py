"""A `QTensor` is a pytree that tells the truth about its numbers and its bytes."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxq.formats import FORMATS
from jaxq.qtensor import QTensor, is_qtensor
from jaxq.quantize import quantize
from jaxq.spec import QuantSpec
from tests import oracle

BLOCKS = ("tensor", "channel", "token", 32, (16, 8))
NESTED = QuantSpec("uint8", 16, symmetric=False)
DOUBLE = QuantSpec("dynamic8", 32, center=True)
SCALES = ("float32", "bfloat16", "float16", "e4m3", "e8m0", NESTED, DOUBLE)
# Every format; blocks, scale dtypes and symmetry take turns.
ROWS = [
    (name, BLOCKS[i % 5], SCALES[i % 7], i % 2 == 0) for i, name in enumerate(FORMATS)
]
SMALL = QuantSpec("uint4", 16, symmetric=False)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def compiled(x, spec, axis=None, stacked=()):
    return quantize(x, spec, axis, stacked=stacked)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def round_trip(x, spec, axis=None, stacked=()):
    q = quantize(x, spec, axis, stacked=stacked)
    return q, q.dequantize()


def row_spec(name, block, scale, symmetric):
    symmetric = symmetric or scale == "e8m0" or not FORMATS[name].is_integer
    return QuantSpec(name, block, symmetric, scale=scale)


def same_bits(a, b):
    leaves = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


def bytes_of(shape, spec, block):
    """The stored bytes from first principles: codes, scales, zero points."""
    grid = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    codes = np.prod(shape) * spec.bits / 8
    size = {"float32": 4, "bfloat16": 2, "float16": 2, "e4m3": 1, "e8m0": 1}
    zeros = 0 if spec.symmetric else np.prod(grid)
    return codes + zeros + np.prod(grid) * size[spec.scale]


# -------------------------------------------------------- conformance over the tables


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda r: f"{r[0]}-{r[1]}-{r[2] if isinstance(r[2], str) else 'q'}"
)
def test_every_format_block_and_scale(row):
    spec = row_spec(*row)
    shape = (64, 24)
    rng = np.random.default_rng(zlib.crc32(repr(row).encode()))
    x = rng.standard_normal(shape).astype(np.float32)
    if spec.symmetric and spec.number_format.lowest == 0:
        x = np.abs(x)
    q, got = round_trip(x, spec)
    # what it stands for is (code − zero) · scale, exactly, in float32
    np.testing.assert_array_equal(got, oracle.dequantize(q).astype(np.float32))
    # and it stands for x: the coarsest format here has the step of the largest number
    assert np.abs(got - x).max() <= 0.55 * np.abs(x).max()
    # shapes, dtypes and bytes
    assert q.shape == shape
    assert q.size == x.size
    assert q.codes.nbytes == x.size * spec.bits // 8
    if isinstance(spec.scale, str):
        assert q.nbytes == bytes_of(shape, spec, q.blocks)
    assert q.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(q))
    assert q.bits_per_weight == q.nbytes * 8 / x.size
    abstract = jax.eval_shape(lambda x: quantize(x, spec), x)
    assert jax.tree.structure(abstract) == jax.tree.structure(q)
    assert abstract.nbytes == q.nbytes
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(q), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize(
    "row",
    ROWS[2::6],
    ids=lambda r: f"{r[0]}-{r[1]}-{r[2] if isinstance(r[2], str) else 'q'}",
)
def test_compiled_equals_eager_bit_for_bit_and_compiles_once(row, rng):
    spec = row_spec(*row)
    x = jnp.asarray(rng.standard_normal((64, 24)), jnp.float32)
    traces = 0

    @jax.jit
    def run(x):
        nonlocal traces
        traces += 1
        q = quantize(x, spec)
        return q, q.dequantize()

    eager = quantize(x, spec)
    q, values = run(x)
    np.testing.assert_array_equal(values, eager.dequantize())
    assert same_bits(q.codes, eager.codes)
    assert same_bits((q.scales, q.zeros), (eager.scales, eager.zeros))
    run(x + 1)
    assert traces == 1


# ---------------------------------------------------------------- shapes of all kinds


@pytest.mark.parametrize(
    ("shape", "spec", "axis", "stacked"),
    [
        ((50, 6), QuantSpec("int3", 16), 0, ()),  # ragged group, ragged bytes
        ((50, 6), QuantSpec("uint4", 12, symmetric=False), 0, ()),  # group cuts bytes
        ((7, 5), QuantSpec("uint5", "channel", symmetric=False), 0, ()),
        ((20, 30), QuantSpec("int4", (16, 16)), 0, ()),  # ragged tiles
        ((20, 30), QuantSpec("int4", (16, 16)), 1, ()),
        ((13,), QuantSpec("nf4", 4), None, ()),
        ((2, 24, 5), QuantSpec("int4", 10), 1, (0,)),
        ((3, 4, 10, 5), QuantSpec("int6", 20), (1, 2), (0,)),
        ((6, 5, 4), QuantSpec("int4", 8), (0, 2), ()),
        ((40, 6), QuantSpec("nf4", 8, scale=DOUBLE), 0, ()),
        ((1, 6), QuantSpec("int4"), 0, ()),
        ((1,), QuantSpec("int2"), 0, ()),
    ],
    ids=str,
)
def test_ragged_shapes_and_several_axes(shape, spec, axis, stacked, rng):
    x = rng.standard_normal(shape).astype(np.float32)
    q, got = round_trip(x, spec, axis, stacked)
    assert q.shape == shape
    want = oracle.dequantize(q)
    np.testing.assert_array_equal(got, want.astype(np.float32))
    # each block was rounded with its own scale
    step = np.abs(oracle.spread(oracle.scale_values(q), q.blocks, shape))
    if spec.number_format.is_integer:
        assert np.all(np.abs(want - x) <= step * 1.001)
    # padding stays below one group and one byte
    assert q.codes.nbytes * 8 <= spec.bits * (x.size / shape[q.axis]) * (
        shape[q.axis] + max(q.padding, 7)
    )


def test_all_optional_fields_enter_the_sum(rng):
    x = jnp.asarray(rng.standard_normal((32, 6)), jnp.float32)
    q = compiled(x, QuantSpec("nf4", 16, center=True))
    assert q.offset.shape == (1, 1)
    factor = jnp.asarray(rng.uniform(0.5, 2, (32, 1)), jnp.float32)
    q = dataclasses.replace(q, input_scale=factor)
    got = jax.jit(QTensor.dequantize)(q)
    np.testing.assert_allclose(got, oracle.dequantize(q), rtol=1e-6)
    assert q.nbytes == 32 * 6 // 2 + 2 * 6 * 4 + 4 + 32 * 4


# -------------------------------------------------------------------- transformations


@pytest.fixture(scope="module")
def small():
    x = np.random.default_rng(1).standard_normal((32, 8)).astype(np.float32)
    return compiled(x, SMALL)


@pytest.fixture(scope="module")
def stack():
    x = np.random.default_rng(2).standard_normal((3, 32, 8)).astype(np.float32)
    spec = QuantSpec("nf4", 16, scale=QuantSpec("dynamic8", 8, center=True))
    return compiled(x, spec, 1, (0,))


def test_through_jit_tree_map_and_flattening(small):
    out = jax.jit(lambda q: q)(small)
    assert isinstance(out, QTensor)
    assert jax.tree.structure(out) == jax.tree.structure(small)
    assert same_bits(out, small)
    same = jax.tree.map(lambda a: a + 0, small)
    assert same.spec == small.spec
    leaves, tree = jax.tree.flatten({"w": small})
    assert same_bits(jax.tree.unflatten(tree, leaves)["w"], small)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(small)]
    assert paths == [".codes", ".scales", ".zeros"]


def test_as_a_leaf(small):
    tree = {"a": small, "b": [1.0, small]}
    found = jax.tree.leaves(tree, is_leaf=is_qtensor)
    assert [is_qtensor(leaf) for leaf in found] == [True, False, True]
    assert not is_qtensor(small.codes)


def test_closed_over_by_jit(small):
    want = oracle.dequantize(small).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(lambda: small.dequantize())(), want)


def test_vmap_adds_and_takes_axes(stack):
    want = oracle.dequantize(stack).astype(np.float32)
    got = jax.jit(jax.vmap(QTensor.dequantize))(stack)
    np.testing.assert_array_equal(got, want)
    shapes = []
    jax.eval_shape(jax.vmap(lambda q: shapes.append((q.shape, q.blocks)) or 0), stack)
    assert shapes == [((32, 8), (16, 1))]


def test_vmapped_quantize_is_a_stack(rng):
    x = jnp.asarray(rng.standard_normal((3, 32, 8)), jnp.float32)
    q = jax.jit(jax.vmap(lambda x: quantize(x, SMALL)))(x)
    assert q.shape == (3, 32, 8)
    assert q.blocks == (1, 16, 1)
    assert same_bits(q, compiled(x, SMALL, 1, (0,)))
    want = oracle.dequantize(q).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(QTensor.dequantize)(q), want)
    tiles = jax.jit(jax.vmap(lambda x: quantize(x, QuantSpec("int8", (16, 4)))))(x)
    assert tiles.blocks == (1, 16, 4)


def test_scan_takes_layers_one_by_one(stack):
    def layer(carry, q):
        assert q.shape == (32, 8)
        return carry + 1, q.dequantize()

    count, layers = jax.jit(lambda s: lax.scan(layer, 0, s))(stack)
    assert count == 3
    np.testing.assert_array_equal(layers, oracle.dequantize(stack).astype(np.float32))


def test_scan_stacks_layers(rng):
    x = jnp.asarray(rng.standard_normal((3, 32, 8)), jnp.float32)
    _, q = lax.scan(lambda c, x: (c, quantize(x, SMALL)), None, x)
    assert q.shape == (3, 32, 8)
    assert same_bits(q, compiled(x, SMALL, 1, (0,)))


def test_gradients_of_the_float_leaves(small, rng):
    weight = jnp.asarray(rng.standard_normal((32, 8)), jnp.float32)

    def loss(q):
        return jnp.sum(q.dequantize() * weight)

    gradient = jax.jit(jax.grad(loss, allow_int=True))(small)
    assert gradient.codes.dtype == jax.dtypes.float0
    codes = oracle.dequantize(small) / oracle.spread(
        oracle.scale_values(small), small.blocks, small.shape
    )
    want = (codes * np.asarray(weight)).reshape(2, 16, 8).sum(1)
    np.testing.assert_allclose(gradient.scales, want, rtol=1e-4, atol=1e-5)


def test_eval_shape_gives_everything_but_numbers(small):
    abstract = jax.eval_shape(lambda q: q, small)
    assert isinstance(abstract.codes, jax.ShapeDtypeStruct)
    assert abstract.shape == (32, 8)
    assert abstract.nbytes == small.nbytes
    assert repr(abstract) == repr(small)


def test_device_put_and_sharding(small):
    mesh = jax.make_mesh((8,), ("x",))
    spread = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    moved = jax.device_put(small, spread)
    assert moved.codes.sharding == spread
    assert moved.scales.sharding == spread
    want = oracle.dequantize(small).astype(np.float32)
    got = jax.jit(QTensor.dequantize)(moved)
    assert got.sharding.is_equivalent_to(spread, 2)
    np.testing.assert_array_equal(got, want)


def test_checkpoint_and_custom_derivatives_take_it(small):
    def apply(x, q):
        return x @ q.dequantize()

    x = jnp.ones((2, 32), jnp.float32)
    plain, saved = (jax.jit(jax.grad(lambda x, f=f: f(x, small).sum())) for f in
                    (apply, jax.checkpoint(apply)))  # fmt: skip
    np.testing.assert_array_equal(plain(x), saved(x))


def test_equality_of_structure_is_that_of_the_spec(small):
    other = dataclasses.replace(small, spec=QuantSpec("uint4", 16, symmetric=False))
    assert jax.tree.structure(other) == jax.tree.structure(small)
    other = dataclasses.replace(small, dtype=jnp.dtype("bfloat16"))
    assert jax.tree.structure(other) != jax.tree.structure(small)


# --------------------------------------------------------------------------- words


def test_repr_is_one_line(small):
    assert repr(small) == (
        "QTensor(32x8 float32 as uint4 g16 asymmetric, float32 scales; "
        "6.500 bits/weight, 208 bytes)"
    )
    activation = dataclasses.replace(small, activation=QuantSpec("int8", "token"))
    assert "int8 token, float32 scales input;" in repr(activation)
    # trees hold odd things in the place of arrays for a while; repr must not raise
    assert "QTensor(" in repr(jax.tree.map(lambda _: None, small))
    assert "QTensor(" in repr(jax.tree.map(lambda _: "P('x')", small))
