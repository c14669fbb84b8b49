"""Attention over a quantized cache, interpreted, against float32."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu import decode_attention as kernel


@pytest.mark.parametrize(
    ("case", "tile"),
    [
        *((case, kernel.Tile(32, 4)) for case in kernel.CASES[:-1]),
        *((case, kernel.Tile()) for case in kernel.CASES[:3]),
        # this one's bias is seen in tests/kvcache, too
        pytest.param(kernel.CASES[-1], kernel.Tile(32, 4), marks=pytest.mark.slow),
    ],
    ids=lambda x: x.name if isinstance(x, kernel.Case) else str(x.tokens),
)
def test_decode_attention_is_the_reference(case, tile):
    arrays, options = case.arrays(), case.options()
    y = kernel.decode_attention(*arrays, **options, tile=tile, interpret=True)
    expected = np.asarray(kernel.reference(*arrays, **options))
    assert y.shape == expected.shape
    # queries and probabilities are rounded to bfloat16
    error = np.abs(np.asarray(y, np.float32) - expected)
    assert np.max(error) <= 2.0**-7 * np.max(np.abs(expected))


def test_decode_attention_reads_nothing_but_what_counts():
    case = kernel.CASES[0]
    q, keys, values, key_scales, value_scales, _ = case.arrays()
    starts = jnp.asarray([20, 64], jnp.int32)
    lengths = jnp.asarray([37, 130], jnp.int32)
    place = jnp.arange(case.tokens)
    inside = (place >= starts[:, None]) & (place < lengths[:, None])
    inside = inside[:, None]
    outputs = [
        kernel.decode_attention(
            *(q, keys, values),
            jnp.where(inside, key_scales, beyond),
            jnp.where(inside, value_scales, beyond),
            lengths,
            starts=starts,
            bits=8,
            tile=kernel.Tile(32, 4),
            interpret=True,
        )
        for beyond in (0.0, 1e4)
    ]
    np.testing.assert_array_equal(*outputs)


def test_decode_attention_refuses_other_codes():
    with pytest.raises(ValueError, match="bits=3: a cache has codes of 4 or 8 bits"):
        kernel.decode_attention(*kernel.CASES[0].arrays(), bits=3)
