"""Rows of a packed table, without decoding the others."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxq import ops
from jaxq.qtensor import QTensor
from jaxq.quantize import quantize
from jaxq.spec import QuantSpec
from jaxq.views import ViewError
from tests import oracle


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def quantized(x, spec, axis, stacked=()):
    return quantize(x, spec, axis, stacked=stacked)


def bind(numbers):
    def run(a, indices, sizes):
        return lax.gather(a, indices, numbers, sizes, mode="clip")

    return run


def gather(w, indices, numbers, sizes):
    return ops.gather(w, indices, numbers, sizes, bind(numbers))


def rows_of(ndim):
    """The dimension numbers of ``table[indices]`` along axis 0."""
    return lax.GatherDimensionNumbers(
        offset_dims=tuple(range(1, ndim)),
        collapsed_slice_dims=(0,),
        start_index_map=(0,),
    )


INDICES = np.asarray([[3], [0], [3], [19]], np.int32)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int8"),
        QuantSpec("uint4", 16, symmetric=False, scale="bfloat16"),
        QuantSpec("int3", 12),
        QuantSpec("nf4", 16, scale=QuantSpec("dynamic8", 8, center=True)),
    ],
    ids=QuantSpec.describe,
)
def test_rows_of_an_embedding(spec, rng):
    w = quantized(rng.standard_normal((20, 48)).astype("f4"), spec, 1)
    got = jax.jit(lambda w, i: gather(w, i, rows_of(2), (1, 48)))(w, INDICES)
    assert isinstance(got, QTensor)
    assert got.shape == (4, 48)
    want = oracle.dequantize(w)[INDICES[:, 0]]
    np.testing.assert_array_equal(oracle.dequantize(got), want)


def test_extras_follow_and_shared_scales_are_repeated(rng):
    w = quantized(rng.standard_normal((20, 48)).astype("f4"), QuantSpec("int8"), 1)
    scale = rng.uniform(0.5, 2, (1, 48)).astype(np.float32)
    w = dataclasses.replace(
        w, input_scale=jnp.asarray(scale), offset=jnp.full((1, 1), 0.5, jnp.float32)
    )
    got = jax.jit(lambda w, i: gather(w, i, rows_of(2), (1, 48)))(w, INDICES)
    want = oracle.dequantize(w)[INDICES[:, 0]]
    np.testing.assert_array_equal(oracle.dequantize(got), want)


def test_one_layer_of_a_stack(rng):
    w = quantized(
        rng.standard_normal((20, 16, 6)).astype("f4"), QuantSpec("int4", 8), 1, (0,)
    )
    got = jax.jit(lambda w, i: gather(w, i, rows_of(3), (1, 16, 6)))(w, INDICES)
    assert got.axis == -2
    want = oracle.dequantize(w)[INDICES[:, 0]]
    np.testing.assert_array_equal(oracle.dequantize(got), want)


@pytest.mark.parametrize(
    ("axis", "block", "sizes", "message"),
    [
        (0, "channel", (1, 48), "axis 0, along which codes share scales"),
        (1, (16, 4), (1, 48), "axis 0, along which codes share scales"),
        (1, "channel", (1, 16), "takes 16 of 48 along axis 1"),
    ],
)
def test_what_it_declines(axis, block, sizes, message, rng):
    spec = QuantSpec("int8", block)
    w = quantized(rng.standard_normal((20, 48)).astype("f4"), spec, axis)
    with pytest.raises(ViewError, match=message):
        gather(w, INDICES, rows_of(2), sizes)
