"""Kernels on eight devices, each with columns or rows of the weight."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import QuantSpec
from jaxq.ops.parallel import placement
from jaxq.sharding import qtensor_shardings
from pallas_kernels.target import Target

V5E = Target("tpu", "v5e", interpret=True)
INT8 = QuantSpec("int8", "token")


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def mlp(p, x):
    h = jax.nn.silu(x @ p["up"].astype(x.dtype))
    return h @ p["down"].astype(x.dtype)


def params(spec, mesh, relaid=True):
    random = np.random.default_rng(2)
    shapes = {"up": (256, 512), "down": (512, 256)}
    floats = {k: random.standard_normal(s) / 16 for k, s in shapes.items()}
    made = {
        k: jaxq.quantize(jnp.asarray(w, jnp.float32), spec) for k, w in floats.items()
    }
    made = jaxq.relayout_params(made, V5E) if relaid else made
    cut = {"up": P(None, "model"), "down": P("model", None)}
    placed = {k: NamedSharding(mesh, spec) for k, spec in cut.items()}
    return made, jaxq.shard_params(made, placed)


@pytest.mark.parametrize("spec", [QuantSpec("int4", 128), QuantSpec("int8")], ids=str)
def test_parts_add_up_to_the_whole(spec, mesh):
    whole, cut = params(spec, mesh)
    x = jax.random.normal(jax.random.key(0), (8, 256), jnp.float32)
    run = jax.jit(jaxq.quantized(mlp, target=V5E))
    rows = jaxq.explain(mlp, cut, x, target=V5E)
    assert {row.choice.kernel for row in rows} == {"tpu.weight_only_decode"}
    placed = jax.device_put(x, NamedSharding(mesh, P("data", None)))
    text = run.lower(cut, placed).compile().as_text()
    # summands are added up; no part of a weight travels
    assert "all-reduce" in text
    assert not re.search(r"= s[48]\[.* all-gather", text)
    y, alone = run(cut, placed), jaxq.quantized(mlp, target=V5E)(whole, x)
    np.testing.assert_allclose(y, alone, rtol=2e-2, atol=2e-2)
    assert np.linalg.norm(y - alone) <= 2e-3 * np.linalg.norm(alone)


def test_a_row_has_one_scale_wherever_its_parts_are(mesh):
    random = np.random.default_rng(4)
    w = jnp.asarray(random.standard_normal((512, 128)), jnp.float32)
    q = jaxq.quantize(w, QuantSpec("int8"))
    q = jaxq.relayout(q, "tpu")
    q = dataclasses.replace(q, activation=INT8)
    cut = jaxq.shard_params(q, NamedSharding(mesh, P("model", None)))
    x = jnp.asarray(random.standard_normal((4, 512)), jnp.float32)
    fn = lambda w, x: x @ w
    y = jax.jit(jaxq.quantized(fn, target=V5E))(cut, x)
    alone = jaxq.quantized(fn, target=V5E)(q, x)
    np.testing.assert_allclose(y, alone, rtol=1e-5, atol=1e-4)


def test_uneven_parts_are_left_to_the_compiler(mesh):
    w = jnp.ones((192, 128), jnp.float32)
    q = jaxq.relayout(jaxq.quantize(w, QuantSpec("int4", 64)), "tpu")
    cut = jaxq.shard_params(q, NamedSharding(mesh, P("model", None)))
    x = jnp.ones((8, 192), jnp.float32)
    (row,) = jaxq.explain(lambda w, x: x @ w, cut, x, target=V5E)
    assert row.choice.kernel == "xla.tiled_dot"
    reason = dict(row.choice.declined)["tpu.weight_only_decode"]
    assert reason == "groups of 64 are cut by 4 parts of 192 rows"
    y = jax.jit(jaxq.quantized(lambda w, x: x @ w, target=V5E))(cut, x)
    np.testing.assert_allclose(y, 192.0, rtol=1e-2)


@pytest.mark.parametrize("cut", [P(None, "model"), P("model", None), P()], ids=str)
def test_explicit_axes_say_how_a_weight_lies(cut):
    kinds = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=kinds)
    random = np.random.default_rng(6)
    w = jnp.asarray(random.standard_normal((512, 256)), jnp.float32)
    x = jnp.asarray(random.standard_normal((8, 512)), jnp.float32)
    q = jaxq.relayout(jaxq.quantize(w, QuantSpec("int4", 128)), "tpu")
    fn = lambda w, x: x @ w
    alone = jaxq.quantized(fn, target=V5E)(q, x)
    where = NamedSharding(mesh, cut)
    q = jax.device_put(q, qtensor_shardings(q, where))
    x = jax.device_put(x, NamedSharding(mesh, P("data", None)))
    (row,) = jaxq.explain(fn, q, x, target=V5E)
    assert row.choice.kernel == "tpu.weight_only_decode"
    run = jax.jit(jaxq.quantized(fn, target=V5E))
    text = run.lower(q, x).compile().as_text()
    assert not re.search(r"= s[48]\[.* all-gather", text)
    y = run(q, x)
    np.testing.assert_allclose(y, alone, rtol=2e-2, atol=2e-2)
    assert np.linalg.norm(y - alone) <= 2e-3 * np.linalg.norm(alone)


def test_a_mesh_that_says_nothing_of_a_weight_has_no_kernel(mesh):
    """What Mosaic would refuse when it compiles is refused before, with a remedy."""
    q = jaxq.relayout(jaxq.quantize(jnp.ones((256, 128)), QuantSpec("int4", 64)), "tpu")
    fn = lambda w, x: x @ w
    columns = qtensor_shardings(q, NamedSharding(mesh, P(None, "model")))
    for placed, x in (
        (jax.device_put(q, columns), jnp.ones((8, 256))),
        (q, jax.device_put(jnp.ones((8, 256)), NamedSharding(mesh, P("data", None)))),
    ):
        (row,) = jaxq.explain(fn, placed, x, target=V5E)
        assert row.choice.kernel == "xla.tiled_dot"
        reason = dict(row.choice.declined)["tpu.weight_only_decode"]
        assert "{'data': 2, 'model': 4} it is not known" in reason
        assert "jaxq.shard_params" in reason
    y = jax.jit(jaxq.quantized(fn, target=V5E))(jax.device_put(q, columns), x)
    np.testing.assert_allclose(y, 256.0, rtol=1e-2)


def test_a_stack_that_is_split_has_no_kernel():
    mesh = jax.make_mesh((2,), ("stage",), axis_types=(AxisType.Explicit,))
    q = jaxq.quantize(jnp.ones((2, 64, 32)), QuantSpec("int4", 32), stacked=(0,))
    q = jaxq.relayout(q, "tpu")
    q = jax.device_put(q, qtensor_shardings(q, NamedSharding(mesh, P("stage"))))
    assert "the stack is split over {'stage': 2}" in str(placement(q, jnp.ones(1)))


def test_rows_that_only_fill_up_codes_are_not_split(mesh):
    q = jaxq.relayout(jaxq.quantize(jnp.ones((200, 128)), QuantSpec("int4", 32)), "tpu")
    cut = jaxq.shard_params(q, NamedSharding(mesh, P("model", None)))
    x = jnp.ones((8, 200), jnp.float32)
    (row,) = jaxq.explain(lambda w, x: x @ w, cut, x, target=V5E)
    reason = dict(row.choice.declined)["tpu.weight_only_decode"]
    assert reason == "24 rows that only fill up the codes cannot be split"


def test_inside_a_shard_map_a_part_is_a_weight_of_its_own(mesh):
    _, cut = params(QuantSpec("int4", 128), mesh)
    x = jax.random.normal(jax.random.key(0), (8, 256), jnp.float32)
    specs = jax.tree.map(lambda a: a.sharding.spec, cut)

    def part(p, x):
        return jax.lax.psum(jaxq.quantized(mlp, target=V5E)(p, x), "model")

    run = jax.shard_map(
        part, mesh=mesh, in_specs=(specs, P()), out_specs=P(), check_vma=False
    )
    outside = jax.jit(jaxq.quantized(mlp, target=V5E))(cut, x)
    np.testing.assert_allclose(jax.jit(run)(cut, x), outside, rtol=1e-4, atol=1e-4)
