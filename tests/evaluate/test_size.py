"""Sizes against counting by hand."""

import jax.numpy as jnp

from jaxq.evaluate import bits_per_weight, parameter_count, stored_bytes
from jaxq.quantize import quantize
from jaxq.spec import QuantSpec


def test_sizes_count_everything_that_is_stored():
    params = {
        "q": quantize(jnp.ones((128, 32)), QuantSpec("int4", 64, scale="bfloat16")),
        "bias": jnp.zeros(32, jnp.bfloat16),
    }
    codes, scales, bias = 128 * 32 // 2, 2 * 32 * 2, 32 * 2
    assert stored_bytes(params) == codes + scales + bias
    assert parameter_count(params) == 128 * 32 + 32
    assert bits_per_weight(params) == 8 * (codes + scales + bias) / (128 * 32 + 32)
