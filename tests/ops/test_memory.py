"""No product writes a float copy of the weight: what the compiler says it allocates."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxq import ops
from jaxq.quantize import quantize
from jaxq.spec import QuantSpec

MATMUL = (((1,), (0,)), ((), ()))
SIZE = 2048
TOKEN = QuantSpec("int8", "token")
KINDS = {
    "w8": (QuantSpec("int8"), None),
    "w4": (QuantSpec("uint4", 64, symmetric=False), None),
    "w3": (QuantSpec("int3", 64), None),
    "nf4": (QuantSpec("nf4", 64), None),
    "fp8": (QuantSpec("fp8_e4m3", (128, 128)), None),
    "w8a8": (QuantSpec("int8"), TOKEN),
    "w4a8": (QuantSpec("int4", 64), TOKEN),
    "w8a8 outliers": (QuantSpec("int8"), QuantSpec("int8", "token", outliers=6.0)),
    "w4a8 outliers": (QuantSpec("int4", 64), QuantSpec("int8", "token", outliers=6.0)),
}


def abstract(kind, rows):
    spec, activation = KINDS[kind]
    w = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)
    q = jax.eval_shape(lambda w: quantize(w, spec), w)
    q = dataclasses.replace(q, activation=activation)
    return jax.ShapeDtypeStruct((rows, SIZE), jnp.float32), q


def temporary_bytes(fn, *args):
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def product(x, q):
    return ops.dot_general(x, q, MATMUL)[0]


def input_gradient(x, q):
    return jax.grad(lambda x: jnp.sum(product(x, q) ** 2))(x)


@pytest.mark.parametrize(
    ("fn", "rows"),
    [(product, 1), (product, 64), (input_gradient, 64)],
    ids=["one row", "many rows", "backward"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_no_float_copy_of_the_weight(fn, kind, rows):
    x, q = abstract(kind, rows)
    # the float32 weight has 16 MiB; a tile of at most 512 rows has 4, its gradient too
    assert temporary_bytes(fn, x, q) < 0.7 * 4 * SIZE * SIZE


def test_the_measure_sees_a_copy():
    x, q = abstract("w4", 64)
    copied = temporary_bytes(lambda x, q: x @ q.dequantize(), x, q)
    assert copied >= 4 * SIZE * SIZE
