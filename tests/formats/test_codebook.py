import hashlib
from statistics import NormalDist

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxq.formats import FORMATS
from jaxq.formats.codebook import CodebookFormat, dynamic_map

CODEBOOKS = [f for f in FORMATS.values() if isinstance(f, CodebookFormat)]
EVERY = pytest.mark.parametrize("fmt", CODEBOOKS, ids=lambda f: f.name)


def encoded_values(name, x):
    fmt = FORMATS[name]
    x = np.asarray(x, np.float32)
    return np.asarray(jax.jit(lambda x: fmt.decode(fmt.encode(x)))(x))


@EVERY
def test_decode_is_the_table_and_encode_inverts_it(fmt):
    table = np.asarray(fmt.table, np.float32)
    assert len(table) == 2**fmt.bits
    assert (fmt.lowest, fmt.highest) == (table.min(), table.max())
    codes = jnp.arange(2**fmt.bits, dtype=jnp.uint8)
    values = jax.jit(fmt.decode)(codes)
    np.testing.assert_array_equal(values, table)
    # equal numbers (+0, -0) have one code; the numbers agree
    back = np.asarray(jax.jit(fmt.encode)(values))
    np.testing.assert_array_equal(table[back], table)


@EVERY
def test_encode_finds_the_nearest_number(fmt, rng):
    x = np.concatenate([rng.uniform(-1.2, 1.2, 3000), rng.standard_normal(1000) * 4])
    x = np.concatenate([x, rng.standard_normal(1000) * 1e-4]).astype(np.float32)
    x *= fmt.highest
    table = np.asarray(fmt.table, np.float64)
    got = np.asarray(jax.jit(lambda x: fmt.decode(fmt.encode(x)))(x), np.float64)
    best = np.abs(x[:, None].astype(np.float64) - table).min(axis=1)
    np.testing.assert_allclose(np.abs(x - got), best, rtol=1e-6)


def test_nf4_is_the_published_construction():
    """QLoRA appendix E: normal quantiles with an exact zero, normalised by the last."""
    delta = ((1 - 1 / 32) + (1 - 1 / 30)) / 2
    assert delta == pytest.approx(0.9677083, abs=1e-7)
    quantile = np.vectorize(NormalDist().inv_cdf)
    positive = quantile(np.linspace(delta, 0.5, 9)[:-1])
    negative = -quantile(np.linspace(delta, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([positive, negative, [0.0]]))
    np.testing.assert_allclose(FORMATS["nf4"].table, levels / levels.max(), atol=5e-7)


def test_fp4_of_bitsandbytes_is_not_the_ocp_one():
    twelfths = np.asarray([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
    table = np.asarray(FORMATS["fp4_bnb"].table)
    np.testing.assert_array_equal(table, np.concatenate([twelfths, -twelfths]))
    levels = np.unique(np.abs(table))
    want = [0, 0.00521, 0.16667, 0.25, 0.33333, 0.5, 0.66667, 1]
    np.testing.assert_allclose(levels, want, atol=1e-5)


def test_e2m1_ties_go_to_the_even_code():
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    want = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    np.testing.assert_array_equal(encoded_values("fp4_e2m1", ties), want)
    minus = encoded_values("fp4_e2m1", [-t for t in ties])
    np.testing.assert_array_equal(minus, [-w for w in want])


def test_e2m1_rounds_as_ml_dtypes(rng):
    codes = np.arange(16, dtype=np.uint8)
    table = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(FORMATS["fp4_e2m1"].table, table)
    x = rng.uniform(-8, 8, 20_000).astype(np.float32)
    x = np.concatenate([x, np.arange(-8, 8, 0.125, dtype=np.float32)])
    want = np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(encoded_values("fp4_e2m1", x), want)


def test_dynamic_map_has_the_published_bytes():
    """SHA-256 of the float32 tables that bitsandbytes 0.50 builds."""
    starts = {True: "e732639a65f497b4", False: "305f002cc11278fb"}
    for signed, start in starts.items():
        table = np.asarray(dynamic_map(signed), np.float32)
        assert len(np.unique(table)) == 256
        assert hashlib.sha256(table.tobytes()).hexdigest().startswith(start)


def test_the_facts_of_the_dynamic_map():
    signed, unsigned = (np.asarray(dynamic_map(s)) for s in (True, False))
    assert signed.min() == pytest.approx(-0.99296875)
    assert signed.max() == unsigned.max() == 1.0
    assert signed[signed > 0].min() == pytest.approx(5.5e-7)
    assert unsigned[unsigned > 0].min() == pytest.approx(3.25e-7)
    assert signed.sum() == pytest.approx(1.0, abs=1e-5)
    assert unsigned.sum() == pytest.approx(75.105, abs=1e-3)
    assert 0.0 in signed
    assert 0.0 in unsigned


def test_the_middle_between_two_numbers_goes_down_in_bitsandbytes():
    table = np.asarray(FORMATS["nf4"].table, np.float64)
    middle = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    np.testing.assert_array_equal(
        encoded_values("nf4", middle), table[:-1].astype(np.float32)
    )
