"""`dot_general` with a quantized side against NumPy in float64."""

import dataclasses
import functools
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxq import ops
from jaxq.formats import FORMATS
from jaxq.quantize import quantize
from jaxq.spec import QuantSpec
from tests import oracle

MATMUL = (((1,), (0,)), ((), ()))
DOUBLE = QuantSpec("dynamic8", 16, center=True)


def einsum_formula(lhs_ndim, rhs_ndim, numbers):
    """``lax.dot_general`` as an einsum: batch, free of lhs, free of rhs."""
    (lc, rc), (lb, rb) = numbers
    letters = iter(string.ascii_letters)
    left = [next(letters) for _ in range(lhs_ndim)]
    right = [next(letters) for _ in range(rhs_ndim)]
    for a, b in (*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)):
        right[b] = left[a]
    out = [left[i] for i in lb]
    out += [left[i] for i in range(lhs_ndim) if i not in (*lc, *lb)]
    out += [right[i] for i in range(rhs_ndim) if i not in (*rc, *rb)]
    return f"{''.join(left)},{''.join(right)}->{''.join(out)}"


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def quantized(x, spec, axis=None, stacked=()):
    return quantize(x, spec, axis, stacked=stacked)


@functools.partial(jax.jit, static_argnums=2)
def multiply(lhs, rhs, numbers):
    return ops.dot_general(lhs, rhs, numbers)[0]


def check(lhs, rhs, numbers, values=None, rtol=2e-5):
    """Compare with float64, relative to the sum of magnitudes."""
    values = multiply(lhs, rhs, numbers) if values is None else values
    floats = [
        np.asarray(a, np.float64) if isinstance(a, np.ndarray) else oracle.dequantize(a)
        for a in (lhs, rhs)
    ]
    formula = einsum_formula(floats[0].ndim, floats[1].ndim, numbers)
    want = np.einsum(formula, *floats)
    size = np.einsum(formula, *map(np.abs, floats))
    assert values.shape == want.shape
    assert np.all(np.abs(np.asarray(values) - want) <= rtol * size + 1e-30)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@jax.jit
def two_sizes(a, b, q):
    """One row and several: different kernels."""
    return tuple(ops.dot_general(x, q, MATMUL)[0] for x in (a, b))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name, rng):
    symmetric = not FORMATS[name].is_integer or FORMATS[name].bits % 2 == 0
    q = quantized(normal(rng, 96, 40), QuantSpec(name, 32, symmetric))
    rows = [normal(rng, n, 96) for n in (1, 20)]
    for x, y in zip(rows, two_sizes(*rows, q), strict=True):
        assert y.dtype == jnp.float32
        check(x, q, MATMUL, y)


@pytest.mark.parametrize(
    ("rows", "spec"),
    [
        (96, QuantSpec("int4", "tensor")),
        (96, QuantSpec("uint3", "channel", symmetric=False)),
        (50, QuantSpec("int4", 16)),  # a ragged last group
        (72, QuantSpec("uint4", 12, symmetric=False)),  # groups cut packed blocks
        (60, QuantSpec("uint8", 20, symmetric=False)),
        (60, QuantSpec("uint4", 20, symmetric=False)),  # padding adds a group
        (7, QuantSpec("uint5", "channel", symmetric=False)),
        (64, QuantSpec("int4", (16, 8))),
        (72, QuantSpec("fp8_e4m3", (16, 24))),  # ragged tiles on both sides
        (64, QuantSpec("nf4", 16, scale=DOUBLE)),
        (64, QuantSpec("fp4_e2m1", 16, scale=QuantSpec("fp8_e4m3", "tensor"))),
        (64, QuantSpec("fp4_e2m1", 32, scale="e8m0")),
        (64, QuantSpec("int8", 16, scale="bfloat16", center=True)),  # with an offset
        (64, QuantSpec("int4", 4)),  # groups below a byte's rows
        # more rows than one tile
        (1536, QuantSpec("uint4", 64, symmetric=False)),
        (1536, QuantSpec("int3", "channel")),
        (1536, QuantSpec("int4", 768)),
        (1560, QuantSpec("uint8", 24, symmetric=False)),
        (1500, QuantSpec("nf4", (100, 16))),
    ],
    ids=lambda v: v.describe() if isinstance(v, QuantSpec) else str(v),
)
def test_every_kind_of_block(rows, spec, rng):
    q = quantized(normal(rng, rows, 40) + 0.5, spec)
    inputs = [normal(rng, n, rows) for n in (1, 20)]
    for x, y in zip(inputs, two_sizes(*inputs, q), strict=True):
        check(x, q, MATMUL, y)


# left shape, right shape, dimension numbers: what models and einsum really write
NUMBERS = {
    "einsum with the weight on the left": ((64, 12), (3, 64), (((0,), (1,)), ((), ()))),
    "one vector": ((64,), (64, 12), (((0,), (0,)), ((), ()))),
    "batch of sequences": ((2, 3, 64), (64, 12), (((2,), (0,)), ((), ()))),
    "heads out": ((2, 64), (64, 4, 6), (((1,), (0,)), ((), ()))),
    "heads in": ((2, 4, 16), (4, 16, 6), (((1, 2), (0, 1)), ((), ()))),
    "reordered": ((2, 16, 4), (4, 16, 6), (((2, 1), (0, 1)), ((), ()))),
    "rhs order reversed": ((2, 16, 4), (4, 16, 6), (((1, 2), (1, 0)), ((), ()))),
    "weight transposed": ((2, 64), (12, 64), (((1,), (1,)), ((), ()))),
    "contracted in the middle": ((2, 16), (3, 16, 5), (((1,), (1,)), ((), ()))),
    "around a free axis": ((2, 8, 16), (8, 5, 16), (((1, 2), (0, 2)), ((), ()))),
    "experts": ((3, 2, 32), (3, 32, 6), (((2,), (1,)), ((0,), (0,)))),
    "experts, tokens first": ((2, 3, 32), (3, 32, 6), (((2,), (1,)), ((1,), (0,)))),
    "batch axis last": ((3, 2, 32), (32, 6, 3), (((2,), (0,)), ((0,), (2,)))),
    "two batch axes": ((2, 3, 4, 16), (3, 2, 16, 5), (((3,), (2,)), ((0, 1), (1, 0)))),
    "nothing free": ((64,), (64,), (((0,), (0,)), ((), ()))),
}  # fmt: skip


@pytest.mark.parametrize("case", NUMBERS)
def test_dimension_numbers(case, rng):
    left, right, numbers = NUMBERS[case]
    (lc, rc), (lb, rb) = numbers
    on_left = "on the left" in case
    shape, axis, batch = (left, lc, lb) if on_left else (right, rc, rb)
    spec = QuantSpec("uint4", 16, symmetric=False)
    w = quantized(normal(rng, *shape), spec, axis, batch)
    x = normal(rng, *(right if on_left else left))
    operands = (w, x) if on_left else (x, w)
    check(*operands, numbers)
    # none of these needs the weight in floats
    choices = []
    jax.eval_shape(
        lambda *a: choices.append(ops.dot_general(*a, numbers)[1]), *operands
    )
    assert choices[0].kernel != "dequantize", choices[0]


def random_case(rng):
    """Any operands, any labels: batch, contracted, free of either side."""
    counts = [int(rng.integers(low, 3)) for low in (0, 1, 0, 0)]
    kinds = [kind for kind, n in zip("bkxw", counts, strict=True) for _ in range(n)]
    labels = [(kind, i, int(rng.choice([1, 2, 3, 8]))) for i, kind in enumerate(kinds)]
    x = [label for label in labels if label[0] in "bkx"]
    w = [label for label in labels if label[0] in "bkw"]
    x, w = ([side[i] for i in rng.permutation(len(side))] for side in (x, w))
    numbers = []
    for kind in "kb":
        shared = [label for label in x if label[0] == kind]
        shared = [shared[i] for i in rng.permutation(len(shared))]
        numbers.append((tuple(map(x.index, shared)), tuple(map(w.index, shared))))
    return [n for *_, n in x], [n for *_, n in w], tuple(numbers)


@pytest.mark.parametrize("seed", range(8))
def test_random_dimension_numbers(seed):
    rng = np.random.default_rng(seed)
    x_shape, w_shape, ((xc, wc), (xb, wb)) = random_case(rng)
    spec = QuantSpec("int4", rng.choice(["tensor", "channel"]).item())
    if seed % 2:
        spec = QuantSpec("uint6", 4, symmetric=False)
    stacked = wb if seed % 3 else ()
    w = quantized(normal(rng, *w_shape), spec, wc, stacked)
    x = normal(rng, *x_shape)
    if seed % 4 < 2:
        check(x, w, ((xc, wc), (xb, wb)))
    else:
        check(w, x, ((wc, xc), (wb, xb)))


def test_both_sides_quantized(rng):
    spec = QuantSpec("int8")
    a, b = quantized(normal(rng, 5, 32), spec, 1), quantized(normal(rng, 32, 6), spec)
    check(a, b, MATMUL)


def test_a_weight_packed_along_another_axis_is_right_and_says_so(rng):
    q = quantized(normal(rng, 32, 48), QuantSpec("int4", 16), 1)
    x = normal(rng, 3, 32)
    check(x, q, MATMUL)
    _, choice = ops.dot_general(jnp.asarray(x), q, MATMUL)
    assert choice.kernel == "dequantize"
    assert "packed axis is not contracted" in choice.declined[0][1]


@pytest.mark.parametrize("shape", [(64, 12), (4, 16, 12)], ids=str)
def test_the_input_scale_moves_to_the_activation(shape, rng):
    axes = tuple(range(len(shape) - 1))
    w = quantized(normal(rng, *shape), QuantSpec("int4", 16), axes)
    scale = rng.uniform(0.1, 3, (*shape[:-1], 1)).astype(np.float32)
    w = dataclasses.replace(w, input_scale=jnp.asarray(scale))
    x = normal(rng, 3, *shape[:-1])
    numbers = ((tuple(a + 1 for a in axes), axes), ((), ()))
    check(x, w, numbers)


def test_experts_with_an_input_scale_for_all(rng):
    w = quantized(normal(rng, 3, 32, 6), QuantSpec("int4", 16), 1, (0,))
    scale = rng.uniform(0.1, 3, (1, 32, 1)).astype(np.float32)
    w = dataclasses.replace(w, input_scale=jnp.asarray(scale))
    check(normal(rng, 3, 2, 32), w, (((2,), (1,)), ((0,), (0,))))


def test_no_rows(rng):
    q = quantized(normal(rng, 32, 6), QuantSpec("int4"))
    assert multiply(np.zeros((0, 32), np.float32), q, MATMUL).shape == (0, 6)


@pytest.mark.parametrize("rows", [1, 33])
def test_the_result_has_the_dtype_asked_for(rows, rng):
    q = quantized(normal(rng, 64, 6), QuantSpec("int8"))
    x = normal(rng, rows, 64)
    narrow = jnp.asarray(x, jnp.bfloat16)
    w16 = dataclasses.replace(q, dtype=jnp.dtype("bfloat16"))
    got, _ = ops.dot_general(narrow, w16, MATMUL)
    assert got.dtype == jnp.bfloat16
    wide, _ = ops.dot_general(narrow, w16, MATMUL, None, jnp.float32)
    assert wide.dtype == jnp.float32
    # bfloat16 operands, float32 sums
    check(np.asarray(narrow, np.float32), q, MATMUL, wide, rtol=2.0**-8)


def test_under_vmap_and_scan(rng):
    spec = QuantSpec("uint4", 16, symmetric=False)
    w = quantized(normal(rng, 3, 32, 6), spec, 1, (0,))
    x = normal(rng, 3, 2, 32)

    def one(x, w):
        return ops.dot_general(x, w, MATMUL)[0]

    numbers = (((2,), (1,)), ((0,), (0,)))
    check(x, w, numbers, jax.jit(jax.vmap(one))(x, w))
    scanned = jax.jit(lambda x, w: lax.scan(lambda c, a: (c, one(*a)), 0, (x, w))[1])
    check(x, w, numbers, scanned(x, w))
