"""Stored rows that pick their channel: split channels, and permutations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxq import ops, views
from jaxq.checkpoints import load, save
from jaxq.checkpoints.errors import CorruptError
from jaxq.checkpoints.parameter import abstract, from_dict, to_dict
from jaxq.lift import explain, quantized
from jaxq.quantize import quantize
from jaxq.sharding import qtensor_shardings
from jaxq.spec import QuantSpec
from jaxq.views import ViewError, with_input_index
from tests import oracle

MATMUL = (((1,), (0,)), ((), ()))
INT8 = QuantSpec("int8")
G16 = QuantSpec("uint4", 16, symmetric=False)
TOKEN = QuantSpec("int8", "token")


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def stored(x, spec, axis=0, stacked=()):
    return quantize(x, spec, axis, stacked=stacked)


def picked(rng, spec=INT8, rows=40, length=48, columns=12, **fields):
    """A matrix of ``rows`` channels stored as ``length`` rows; some channels twice."""
    index = rng.permutation(np.arange(length) % rows)
    q = with_input_index(stored(normal(rng, length, columns), spec), index, rows)
    return dataclasses.replace(q, **fields), index


def rows_of(q):
    """The stored rows, as if each met a channel of its own."""
    return oracle.dequantize(dataclasses.replace(q, input_index=None, rows=None))


@jax.jit
def dequantize(q):
    return q.dequantize()


@jax.jit
def multiply(x, q):
    return ops.dot_general(x, q, MATMUL)[0]


def kernel(x, q, numbers=MATMUL):
    found = []
    jax.eval_shape(lambda x, q: found.append(ops.dot_general(x, q, numbers)[1]), x, q)
    return found[0].kernel


# --------------------------------------------------------------------- what it means


@pytest.mark.parametrize(
    "spec", [INT8, G16, QuantSpec("nf4", 16)], ids=QuantSpec.describe
)
def test_rows_of_one_channel_add_up(spec, rng):
    q, index = picked(rng, spec)
    assert q.shape == (40, 12)
    assert q.stored_shape == (48, 12)
    want = np.zeros((40, 12))
    for i, row in zip(index, rows_of(q), strict=True):
        want[i] += row
    np.testing.assert_allclose(dequantize(q), want, rtol=1e-5)
    np.testing.assert_allclose(oracle.dequantize(q), want, rtol=1e-12)


def test_a_channel_without_a_row_is_zero(rng):
    q = with_input_index(stored(normal(rng, 2, 3), INT8), np.asarray([2, 0]), 4)
    values = np.asarray(dequantize(q))
    assert not values[[1, 3]].any()
    np.testing.assert_array_equal(values[[2, 0]], rows_of(q).astype(np.float32))


def test_it_is_counted(rng):
    q, _ = picked(rng, G16)
    bare = dataclasses.replace(q, input_index=None, rows=None)
    assert q.nbytes == bare.nbytes + 4 * 48
    assert q.size == 40 * 12
    assert q.bits_per_weight == q.nbytes * 8 / (40 * 12)
    assert "40x12 float32 as uint4 g16" in repr(q)
    assert "48 rows stored" in repr(q)


def test_a_permutation_is_undone(rng):
    """Act-order: the rows lie in another order than the channels."""
    w, order = normal(rng, 64, 10), rng.permutation(64)
    q = with_input_index(stored(w[order], G16), order, 64)
    plain = rows_of(q)
    np.testing.assert_allclose(dequantize(q), plain[np.argsort(order)], rtol=1e-6)


def test_indices_compose(rng):
    """A split tensor whose rows were reordered: x[..., index][..., order]."""
    q, index = picked(rng)
    order = rng.permutation(48)
    inner = with_input_index(
        dataclasses.replace(q, input_index=None, rows=None), order, 48
    )
    both = with_input_index(inner, index, 40)
    x = normal(rng, 5, 40)
    want = x[:, index][:, order].astype(np.float64) @ rows_of(q)
    np.testing.assert_allclose(multiply(x, both), want, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------- products


@pytest.mark.parametrize(
    ("name", "spec", "activation", "rows"),
    [
        ("xla.fused_dot", INT8, None, 1),
        ("xla.tiled_dot", G16, None, 20),
        ("xla.int8_dot", INT8, TOKEN, 300),
        ("xla.integer_tiled_dot", G16, TOKEN, 20),
        ("xla.dequantize_dot", QuantSpec("int8", center=True), None, 20),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_every_kernel(name, spec, activation, rows, rng):
    scale = rng.uniform(0.5, 2, (48, 1)).astype(np.float32)
    q, index = picked(rng, spec, activation=activation, input_scale=jnp.asarray(scale))
    x = normal(rng, rows, 40)
    assert kernel(x, q) == name
    met, values = x[:, index] * scale[:, 0], rows_of(q) / scale.astype(np.float64)
    if activation is not None:
        met = np.asarray(quantize(jnp.asarray(met), activation).dequantize())
    want = met.astype(np.float64) @ values
    np.testing.assert_allclose(multiply(x, q), want, rtol=1e-4, atol=2e-4)
    if activation is None:
        same = x.astype(np.float64) @ oracle.dequantize(q)
        np.testing.assert_allclose(want, same, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "activation"), [(1, None), (20, None), (20, TOKEN)], ids=str
)
def test_bfloat16(rows, activation, rng):
    q, _ = picked(rng, G16, dtype=jnp.dtype("bfloat16"), activation=activation)
    x = jnp.asarray(normal(rng, rows, 40)).astype(jnp.bfloat16)
    wide = np.asarray(x.astype(jnp.float32), np.float64)
    want = wide @ oracle.dequantize(q)
    size = np.abs(wide) @ np.abs(oracle.dequantize(q)) + 5
    assert np.all(np.abs(np.asarray(multiply(x, q), np.float64) - want) < 2e-2 * size)


@pytest.mark.parametrize("shared", [True, False])
def test_a_stack(shared, rng):
    w = stored(normal(rng, 3, 32, 6), G16, 1, (0,))
    index = np.stack([rng.permutation(np.arange(32) % 24) for _ in range(3)])
    q = with_input_index(w, index[0] if shared else index, 24)
    assert q.shape == (3, 24, 6)
    x = normal(rng, 3, 4, 24)
    numbers = (((2,), (1,)), ((0,), (0,)))
    assert kernel(x, q, numbers) == "xla.tiled_dot"
    got = jax.jit(lambda x, q: ops.dot_general(x, q, numbers)[0])(x, q)
    want = np.einsum("bmk,bkn->bmn", x.astype(np.float64), oracle.dequantize(q))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dequantize(q), oracle.dequantize(q), rtol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_experts(shared, rng):
    sizes = np.asarray([4, 0, 3], np.int32)
    w = stored(normal(rng, 3, 32, 6), G16, 1, (0,))
    index = np.stack([rng.permutation(np.arange(32) % 24) for _ in range(3)])
    scale = rng.uniform(0.5, 2, (1 if shared else 3, 32, 1)).astype(np.float32)
    q = with_input_index(w, index[0] if shared else index, 24)
    q = dataclasses.replace(q, input_scale=jnp.asarray(scale))
    x, owner = normal(rng, 7, 24), np.repeat(np.arange(3), sizes)
    got = jax.jit(lambda x, q: ops.ragged_dot(x, q, sizes)[0])(x, q)
    want = np.einsum("mk,mkn->mn", x.astype(np.float64), oracle.dequantize(q)[owner])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_gradients(rng):
    q, _ = picked(rng, G16)
    x, cotangent = normal(rng, 5, 40), normal(rng, 5, 12)

    def loss(product):
        def of(x, scales):
            return jnp.sum(
                product(x, dataclasses.replace(q, scales=scales)) * cotangent
            )

        return jax.jit(jax.grad(of, (0, 1)))

    got = loss(multiply)(x, q.scales)
    want = loss(lambda x, q: x @ q.dequantize())(x, q.scales)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------- the replay


def test_layers_of_a_scan(rng):
    """Stored stacked, met one by one, with heads split off the columns."""
    w = stored(normal(rng, 3, 32, 24), G16, 1, (0,))
    index = np.stack([rng.permutation(np.arange(32) % 24) for _ in range(3)])
    q = with_input_index(w, index, 24)

    def net(w, x):
        def layer(x, w):
            heads = jnp.einsum("mk,khd->mhd", x, w.reshape(24, 4, 6))
            return jnp.tanh(heads.reshape(x.shape)), None

        return jax.lax.scan(layer, x, w)[0]

    x = normal(rng, 5, 24)
    got = quantized(net)(q, x)
    want = net(jnp.asarray(oracle.dequantize(q), jnp.float32), x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert not explain(net, q, x).fallbacks


def test_what_no_view_can_say_is_dequantized(rng):
    q, _ = picked(rng)
    halves = lambda w, x: x[:, :20] @ w[:20] + x[:, 20:] @ w[20:]
    x = normal(rng, 5, 40)
    rows = explain(halves, q, x).fallbacks
    assert "slices channels that an input index picks" in str(rows[0].choice)
    want = x.astype(np.float64) @ oracle.dequantize(q)
    np.testing.assert_allclose(quantized(halves)(q, x), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ViewError, match="merges or splits channels"):
        views.reshape(q, (4, 10, 12))


def test_on_a_mesh(rng):
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "model"))
    q, _ = picked(rng, G16)
    x = normal(rng, 8, 40)
    want = multiply(x, q)
    for placed in (P("model", None), P(None, "model"), P("data", "model")):
        where = qtensor_shardings(q, NamedSharding(mesh, placed))
        assert where.input_index.spec == P(placed[0], None)
        got = multiply(x, jax.device_put(q, where))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("backend", ["safetensors", "orbax"])
def test_it_is_saved(tmp_path, backend, rng):
    q, _ = picked(rng, G16)
    save(tmp_path / "model", {"w": q}, backend=backend)
    found = load(tmp_path / "model")["w"]
    assert found.shape == (40, 12)
    np.testing.assert_array_equal(oracle.dequantize(found), oracle.dequantize(q))


def _without_rows(data):
    data |= {"rows": None, "shape": [48, 12]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_rows, "rows=None, but the tensor has an input index"),
        (lambda d: d["arrays"].pop("input_index"), "has no input index"),
        (lambda d: d["arrays"]["input_index"].update(shape=[40, 1]), "does not fit"),
        (lambda d: d["arrays"]["input_index"].update(shape=[48, 5]), "does not fit"),
        (lambda d: d["arrays"]["input_index"].update(shape=[48]), "does not fit"),
        (lambda d: d["arrays"]["input_index"].update(dtype="int64"), "does not fit"),
        (lambda d: d.update(rows="many"), "'rows' is 'many', not of type int"),
        (lambda d: d.update(rows=41), "make a tensor"),
    ],
)
def test_a_damaged_one_is_refused(change, message, rng):
    q, _ = picked(rng, G16)
    data = to_dict(abstract("w", q))
    assert from_dict(data, "w").shape == (40, 12)
    change(data)
    with pytest.raises(CorruptError, match=message):
        from_dict(data, "w")


def test_files_without_the_field_still_load(rng):
    q = stored(normal(rng, 48, 12), G16)
    data = to_dict(abstract("w", q))
    del data["rows"]
    assert from_dict(data, "w").shape == (48, 12)


# ----------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("index", "rows", "message"),
    [
        (np.arange(47), 48, "int32.47. does not fit .*give an integer for each of its"),
        (np.arange(48.0), 48, "float32.48. does not fit"),
        (np.arange(48), 47, "rows=47, but the index names channels 0 to 47"),
        (np.arange(48) - 1, 47, "channels -1 to 46: give indices from 0 to 46"),
    ],
)
def test_what_does_not_fit(index, rows, message, rng):
    with pytest.raises(ValueError, match=message):
        with_input_index(stored(normal(rng, 48, 12), INT8), index, rows)


def test_not_a_matrix(rng):
    q = stored(normal(rng, 8, 2, 3), INT8)
    with pytest.raises(ValueError, match="packs axis -3 of 3: give a matrix"):
        with_input_index(q, np.arange(8), 8)
