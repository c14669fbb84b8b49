"""Quantized weights on eight devices: placed like the weight, the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxq.lift import quantized
from jaxq.pipeline import quantize_params
from jaxq.plan import plan
from jaxq.qtensor import QTensor, is_qtensor
from jaxq.quantize import quantize
from jaxq.recipe import Recipe, Rule
from jaxq.sharding import qtensor_shardings, shard_like
from jaxq.spec import QuantSpec
from tests import oracle
from tests.small_models import filled, tiny_lm, tokens

K, N = 128, 64
INT4 = QuantSpec("int4", 32)
ASYMMETRIC = QuantSpec("uint3", 64, False, scale="bfloat16")
DOUBLE = QuantSpec("nf4", 32, scale=QuantSpec("dynamic8", 64, center=True))


@functools.cache
def mesh(kind="auto"):
    devices = np.asarray(jax.devices()).reshape(2, 4)
    types = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
    return Mesh(devices, ("data", "model"), axis_types=(types[kind],) * 2)


def put(x, *spec, kind="auto"):
    return jax.device_put(x, NamedSharding(mesh(kind), P(*spec)))


def spec_of(x):
    return tuple(x.sharding.spec) + (None,) * (x.ndim - len(x.sharding.spec))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def weight(rng):
    return jnp.asarray(rng.standard_normal((K, N)), jnp.float32)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((8, K)), jnp.float32)


def product(params, x):
    return x @ params["kernel"]


# ----------------------------------------------------------------- where arrays live


@pytest.mark.parametrize(
    ("spec", "placed", "scales"),
    [
        # 4 groups: two or four devices divide them, eight do not
        (INT4, ("model", None), ("model", None)),
        (INT4, (None, "model"), (None, "model")),
        (INT4, ("data", "model"), ("data", "model")),
        (INT4, (("data", "model"), None), (None, None)),
        (QuantSpec("int8"), ("model", "data"), (None, "data")),
        (QuantSpec("int8", "tensor"), ("data", "model"), (None, None)),
        (QuantSpec("int8", (64, 64)), ("data", "model"), ("data", None)),
        (ASYMMETRIC, ("data", "model"), ("data", "model")),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_codes_lie_like_the_weight_and_scales_where_blocks_divide(
    spec, placed, scales, kind, weight
):
    params = {"kernel": put(weight, *placed, kind=kind)}
    q = quantize_params(params, spec)["kernel"]
    assert spec_of(q.codes) == placed
    assert spec_of(q.scales) == scales
    if q.zeros is not None:
        assert spec_of(q.zeros) == scales
    assert q.codes.sharding.mesh == mesh(kind)
    same(q, quantize_params({"kernel": weight}, spec)["kernel"])


def test_shards_hold_their_part_and_no_more(weight):
    q = quantize_params({"kernel": put(weight, "data", "model")}, INT4)["kernel"]
    whole = quantize(weight, INT4)
    for array, full in ((q.codes, whole.codes), (q.scales, whole.scales)):
        shards = array.addressable_shards
        assert len(shards) == 8
        for shard in shards:
            assert shard.data.size == full.size // 8
            np.testing.assert_array_equal(shard.data, np.asarray(full)[shard.index])


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_every_array_of_a_double_quantized_tensor_is_placed(kind, weight):
    placed = put(weight, None, "model", kind=kind)
    q = quantize_params({"kernel": placed}, DOUBLE)["kernel"]
    assert spec_of(q.codes) == spec_of(q.scales.codes) == (None, "model")
    assert spec_of(q.scales.scales) == spec_of(q.scales.offset) == (None, None)
    alone = quantize_params({"kernel": weight}, DOUBLE)["kernel"]
    same((q.codes, q.scales.codes), (alone.codes, alone.scales.codes))
    # the mean of the scales is summed in another order
    got, expected = oracle.dequantize(q), oracle.dequantize(alone)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_stacked_weights_shard_their_layers(rng):
    def layers(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]

    w = jnp.asarray(0.1 * rng.standard_normal((4, 64, 64)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((2, 64)), jnp.float32)
    batch = [(x,)]
    sharded = {"w": put(w, "model", None, "data")}
    q = quantize_params(sharded, INT4, layers, batch)
    assert spec_of(q["w"].codes) == spec_of(q["w"].scales) == ("model", None, "data")
    alone = quantize_params({"w": w}, INT4, layers, batch)
    same(q, alone)
    np.testing.assert_allclose(
        quantized(layers)(q, x), quantized(layers)(alone, x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("length", [40, 100])
def test_few_blocks_over_many_devices_are_never_an_error(length, rng):
    w = jnp.asarray(rng.standard_normal((length, 24)), jnp.float32)
    devices = Mesh(np.asarray(jax.devices()), ("x",))
    sharded = jax.device_put(w, NamedSharding(devices, P(None, "x")))
    for spec in (ASYMMETRIC, QuantSpec("int8", (16, 16))):
        q = quantize_params({"kernel": sharded}, spec)["kernel"]
        assert spec_of(q.codes) == (None, "x")
        same(q, quantize_params({"kernel": w}, spec)["kernel"])


def test_shardings_of_an_abstract_tensor(weight):
    q = jax.eval_shape(lambda w: quantize(w, INT4), weight)
    placed = qtensor_shardings(q, NamedSharding(mesh(), P("data")))
    assert isinstance(placed, QTensor)
    assert placed.codes.spec == placed.scales.spec == P("data", None)
    assert placed.zeros is None


def test_what_is_on_no_mesh_stays_where_it_is(weight):
    q = quantize(weight, INT4)
    assert shard_like(q, weight) is q
    assert shard_like(q, np.asarray(weight)) is q


# ------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize(
    "placed", [("model", None), (None, "model"), ("data", "model")]
)
def test_quantizing_under_jit_on_a_mesh_gives_the_same_codes(placed, weight):
    def run(params):
        return quantize_params(params, ASYMMETRIC)

    same(jax.jit(run)({"kernel": put(weight, *placed)}), run({"kernel": weight}))


@pytest.mark.parametrize("spec", [INT4, "w8a8", DOUBLE], ids=str)
@pytest.mark.parametrize("placed", [("model", None), (None, "model")])
def test_a_product_on_a_mesh_equals_one_device(spec, placed, weight, x):
    alone = quantize_params({"kernel": weight}, spec)
    spread = quantize_params({"kernel": put(weight, *placed)}, spec)
    got = quantized(product)(spread, put(x, "data"))
    expected = quantized(product)(alone, x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_a_product_on_an_explicit_mesh_equals_one_device(weight, x):
    alone = quantize_params({"kernel": weight}, INT4)
    spread = quantize_params(
        {"kernel": put(weight, None, "model", kind="explicit")}, INT4
    )
    got = quantized(product)(spread, put(x, "data", None, kind="explicit"))
    assert spec_of(got) == ("data", "model")
    expected = quantized(product)(alone, x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def megatron(path, leaf):
    """Columns, then rows: the table by rows, the head by columns."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    rules = {"up/kernel": P(None, "model"), "down/kernel": P("model"), "up/bias": P()}
    rules |= {"embedding": P("model"), "lm_head/kernel": P(None, "model")}
    found = next((s for end, s in rules.items() if name.endswith(end)), P())
    return NamedSharding(mesh(), found)


def test_a_model_on_a_mesh_equals_one_device():
    fn, shapes = tiny_lm()
    params, ids = filled(shapes), tokens(4)
    shardings = jax.tree_util.tree_map_with_path(megatron, params)
    recipe = Recipe("r", (Rule("*", INT4, QuantSpec("int8", "token")),))
    alone = quantize_params(params, recipe, fn, [(ids,)])
    placed = jax.device_put(params, shardings)
    spread = quantize_params(placed, recipe, fn, [(put(ids, "data"),)])
    same(alone, spread)
    up = spread["params"]["layer_0"]["up"]["kernel"]
    assert spec_of(up.codes) == spec_of(up.scales) == (None, "model")
    run = jax.jit(quantized(fn))
    expected = np.asarray(run(alone, ids))
    got = run(spread, put(ids, "data"))
    # a rounding tie of an activation may fall the other way
    tolerance = 0.02 * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, atol=tolerance)
    # and both are the model, roughly
    floats = np.asarray(fn(params, ids))
    assert np.abs(expected - floats).max() < 0.2 * np.abs(floats).max()


# -------------------------------------------------------------------------- shard_map


def specs_of(q):
    return jax.tree.map(lambda a: a.sharding.spec, q)


@pytest.mark.parametrize("spec", [INT4, ASYMMETRIC, DOUBLE], ids=str)
def test_shard_map_with_columns(spec, weight, x):
    q = quantize_params({"kernel": put(weight, None, "model")}, spec)
    run = jax.shard_map(
        quantized(product),
        mesh=mesh(),
        in_specs=(specs_of(q), P("data")),
        out_specs=P("data", "model"),
    )
    expected = quantized(product)(quantize_params({"kernel": weight}, spec), x)
    np.testing.assert_allclose(run(q, x), expected, rtol=1e-4, atol=1e-4)


def test_shard_map_with_rows(weight, x):
    q = quantize_params({"kernel": put(weight, "model")}, INT4)

    def local(params, x):
        return jax.lax.psum(quantized(product)(params, x), "model")

    run = jax.shard_map(
        local, mesh=mesh(), in_specs=(specs_of(q), P(None, "model")), out_specs=P()
    )
    expected = quantized(product)(quantize_params({"kernel": weight}, INT4), x)
    np.testing.assert_allclose(run(q, x), expected, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------- gradients


def test_gradients_on_a_mesh_equal_one_device(weight, x):
    def loss(params, x):
        return jnp.sum(jnp.tanh(product(params, x) * params["scale"]))

    def grads(q, scale, x):
        run = lambda scale, x: quantized(loss)({"kernel": q, "scale": scale}, x)
        return jax.grad(run, (0, 1))(scale, x)

    q = quantize(weight, INT4)
    scale = jnp.linspace(0.01, 0.1, N)
    spread = quantize_params({"kernel": put(weight, "data", "model")}, INT4)["kernel"]
    got = jax.jit(grads)(spread, put(scale, "model"), put(x, "data"))
    expected = grads(q, scale, x)
    # and those are the gradients of the dequantized weight
    exact = jax.grad(
        lambda s, x: loss({"kernel": q.dequantize(), "scale": s}, x), (0, 1)
    )
    for a, b, c in zip(got, expected, exact(scale, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(b, c, rtol=1e-4, atol=1e-5)


def test_a_plan_of_sharded_weights_is_the_plan(weight):
    sharded = {"kernel": put(weight, "data", "model")}
    assert plan(None, sharded, "w4a16") == plan(None, {"kernel": weight}, "w4a16")
    leaves = jax.tree.leaves(quantize_params(sharded, "w4a16"), is_leaf=is_qtensor)
    assert [q.nbytes for q in leaves] == [plan(None, sharded, "w4a16").bytes_after]


# ----------------------------------------------------------------- explicit axes

EXPLICIT = ("w8a16", "w4a16", "w8a8", "w4a8", "nf4-dq", "w3a16-bcq", "llm-int8")
CALIBRATED = ("w4a16-gptq", "w3a16-awq", "w8a8-smoothquant", "w4a8-gptq")


def two_layers(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def two_layers_on_a_mesh(params, x):
    """The same where types say how arrays lie: over the rows' axis, summed."""
    hidden = jax.nn.relu(x @ params["up"])
    return jnp.matmul(hidden, params["down"], out_sharding=P("data", None))


@pytest.mark.parametrize("recipe", EXPLICIT + CALIBRATED)
def test_explicit_axes_change_nothing(recipe, rng):
    """Tensor parallel weights, data parallel rows, and types that say so."""
    up, down, x = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((64, 128), (128, 64), (64, 64))
    )
    params = {"up": up, "down": down}
    alone = quantize_params(params, recipe, two_layers, [(x,)])
    expected = np.asarray(quantized(two_layers)(alone, x))
    with jax.set_mesh(mesh("explicit")):
        placed = {
            "up": put(up, None, "model", kind="explicit"),
            "down": put(down, "model", None, kind="explicit"),
        }
        rows = put(x, "data", kind="explicit")
        q = quantize_params(placed, recipe, two_layers_on_a_mesh, [(rows,)])
        got = jax.jit(quantized(two_layers_on_a_mesh))(q, rows)
        read = jax.tree.map(lambda w: w.dequantize(), q, is_leaf=is_qtensor)
        for name, spec in (("up", (None, "model")), ("down", ("model", None))):
            assert spec_of(q[name].codes) == spec
            assert spec_of(read[name]) in (spec, (None, None))
            np.testing.assert_allclose(
                np.asarray(read[name]), np.asarray(alone[name].dequantize()), 1e-4, 1e-5
            )
    assert spec_of(got) == ("data", None)
    np.testing.assert_allclose(np.asarray(got), expected, rtol=1e-4, atol=1e-3)


def test_tuning_on_explicit_axes_is_refused(rng):
    w = jnp.asarray(rng.standard_normal((64, 32)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((8, 64)), jnp.float32)
    with jax.set_mesh(mesh("explicit")):
        params = {"kernel": put(w, None, "model", kind="explicit")}
        rows = put(x, "data", kind="explicit")
        with pytest.raises(ValueError, match=r"'data': 2.*explicit axes.*Auto"):
            quantize_params(params, "w4a16-autoround", product, [(rows,)])
