"""quantize_params, dequantize_params and calibrate, against doing it by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxq.lift import quantized
from jaxq.names import UnknownNameError
from jaxq.observers import minmax
from jaxq.pipeline import calibrate, dequantize_params, quantize_params
from jaxq.plan import plan
from jaxq.qtensor import is_qtensor
from jaxq.quantize import quantize
from jaxq.recipe import Recipe, Rule
from jaxq.solvers import rtn
from jaxq.spec import QuantSpec
from tests import oracle
from tests.small_models import filled, tiny_lm, tokens

INT8, TENSOR8 = QuantSpec("int8"), QuantSpec("int8", "tensor")
STATIC = Recipe("static", (Rule("*", INT8, TENSOR8, static=True),))


def product(params, x):
    return x @ params["w"]


def leaves(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qtensor)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in flat}


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def weight(rng):
    return jnp.asarray(rng.standard_normal((64, 8)), jnp.float32)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((4, 64)), jnp.float32)


# ------------------------------------------------------------------ quantize_params


def test_a_model_is_quantized_as_its_leaves_are():
    name = "w4a8"  # with activations, and options of the solver
    fn, shapes = tiny_lm()
    params = filled(shapes)
    before = leaves(params)
    done = leaves(quantize_params(params, name, fn, [(tokens(),)]))
    rows = plan(fn, params, name, tokens())
    assert list(done) == list(before) == [row.path for row in rows]
    for row in rows:
        if not row.is_quantized:
            assert done[row.path] is before[row.path]
            continue
        where = {"axis": row.contracting, "stacked": row.stacked}
        alone = jax.jit(
            partial(rtn, **where, **dict(row.rule.options)), static_argnums=2
        )
        same(done[row.path], alone(before[row.path], None, row.spec))
        assert done[row.path].spec == row.spec
        assert done[row.path].activation == row.rule.activation
        assert done[row.path].dtype == before[row.path].dtype


def test_without_a_function_the_flax_conventions_hold(weight):
    params = {"up": {"kernel": weight}, "embed": {"embedding": weight}, "w": weight}
    done = quantize_params(params, INT8)
    same(done["up"]["kernel"], quantize(weight, INT8, 0))
    same(done["embed"]["embedding"], quantize(weight, INT8, 1))
    assert done["w"] is weight


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_dtype_is_kept(dtype, weight, x):
    params = {"w": weight.astype(dtype)}
    q = quantize_params(params, "w4a16", product, [(x.astype(dtype),)])["w"]
    assert q.dtype == q.dequantize().dtype == dtype
    assert dequantize_params({"w": q})["w"].dtype == dtype


def test_the_input_is_not_touched(weight, x):
    inner = {"w": weight}
    copy = np.array(weight)
    quantize_params(inner, "w4a16", product, [(x,)])
    assert inner["w"] is weight
    np.testing.assert_array_equal(weight, copy)
    assert not weight.is_deleted()


def test_numpy_weights_and_any_tree_are_taken(rng):
    array = rng.standard_normal((64, 8)).astype(np.float32)
    for tree in (array, [array], (array, {"deep": (array,)})):
        fn = lambda p, x: sum(x @ w for w in jax.tree.leaves(p))
        done = quantize_params(tree, INT8, fn, [(np.ones((1, 64), np.float32),)])
        for q in jax.tree.leaves(done, is_leaf=is_qtensor):
            same(q, quantize(jnp.asarray(array), INT8))


def test_jit_and_eval_shape_see_the_same(weight, x):
    params, batch = {"w": weight}, [(x,)]
    run = lambda p: quantize_params(p, "w4a16", product, batch)
    eager = run(params)
    compiled, abstract = jax.jit(run)(params), jax.eval_shape(run, params)
    assert jax.tree.structure(eager) == jax.tree.structure(compiled)
    assert jax.tree.structure(eager) == jax.tree.structure(abstract)
    same(eager, compiled)
    assert abstract["w"].nbytes == eager["w"].nbytes
    assert [a.shape for a in jax.tree.leaves(abstract)] == [
        a.shape for a in jax.tree.leaves(eager)
    ]


def test_calibration_under_jit_is_refused(weight, x):
    run = lambda p, x: quantize_params(p, STATIC, product, [(x,)])
    with pytest.raises(ValueError, match=r"outside jax\.jit: call quantize_params"):
        jax.jit(run)({"w": weight}, x)


def test_progress_is_told_after_every_parameter():
    fn, shapes = tiny_lm()
    told = []
    quantize_params(
        filled(shapes),
        "w8a16",
        fn,
        [(tokens(),)],
        progress=lambda row, done, total: told.append((row.path, done, total)),
    )
    rows = plan(fn, shapes, "w8a16", tokens()).quantized
    assert told == [(row.path, i, 6) for i, row in enumerate(rows, 1)]


def test_the_group_size_is_replaced(weight, x):
    q = quantize_params({"w": weight}, "w4a16", product, [(x,)], group_size=16)["w"]
    assert q.block == (16, 1)
    assert q.scales.shape == (4, 8)


def test_keys_and_counters_stay_as_they_are(weight, x):
    params = {"w": weight, "key": jax.random.key(3), "step": jnp.asarray(7)}
    done = quantize_params(params, "w8a16", product, [(x,)])
    assert done["key"] is params["key"]
    assert done["step"] is params["step"]


def test_dequantize_params_inverts_the_tree(weight, x):
    params = {"w": weight, "bias": jnp.ones(8)}
    q = quantize_params(params, INT8, product, [(x,)])
    back = dequantize_params(q)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    np.testing.assert_allclose(back["w"], oracle.dequantize(q["w"]), rtol=1e-6)
    assert back["bias"] is params["bias"]
    same(dequantize_params(back), back)


# -------------------------------------------------------------- static activations


def test_static_scales_are_numpys(weight, rng):
    batches = [(rng.standard_normal((n, 64)).astype(np.float32),) for n in (3, 1, 5)]
    q = quantize_params({"w": weight}, STATIC, product, batches)["w"]
    largest = max(np.abs(x).max() for (x,) in batches)
    assert q.activation_scale.shape == (1, 1)
    assert q.activation_scale[0, 0] == largest / np.float32(127)
    # the product rounds to that scale, and saturates beyond it
    (x,) = batches[0]
    x[0, 0] = 10 * largest
    scale = float(q.activation_scale[0, 0])
    codes = np.clip(np.rint(x / scale), -127, 127)
    expected = (codes * scale) @ oracle.dequantize(q)
    got = quantized(product)({"w": q}, jnp.asarray(x))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", ["float32", "inverse_float32"])
def test_a_static_scale_of_scales_is_numpys(stored, weight, rng):
    """nvfp4: the largest block of all that was seen has the largest float8 scale."""
    scales = QuantSpec("fp8_e4m3", "tensor", scale=stored)
    fp4 = QuantSpec("fp4_e2m1", 16, scale=scales)
    recipe = Recipe("w4a4", (Rule("*", QuantSpec("int8"), fp4, static=True),))
    batches = [(rng.standard_normal((n, 64)).astype(np.float32),) for n in (3, 5)]
    q = quantize_params({"w": weight}, recipe, product, batches)["w"]
    number = max(np.abs(x).max() for (x,) in batches).astype(np.float64) / 6 / 448
    number = 1 / number if stored == "inverse_float32" else number
    assert q.activation_scale.shape == (1, 1)
    np.testing.assert_allclose(q.activation_scale[0, 0], number, rtol=1e-6)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(16, name="dense")(x)) * 2.0, None


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes, keys = {"params": 0}, {"params": True}
        stack = nn.scan(Layer, variable_axes=axes, split_rngs=keys, length=3)
        return stack(name="layers")(x, None)[0]


def test_static_scales_of_scanned_layers_are_each_layers_own(rng):
    x = jnp.asarray(rng.standard_normal((4, 16)), jnp.float32)
    fn = Layers().apply
    params = Layers().init(jax.random.key(0), x)
    q = leaves(quantize_params(params, STATIC, fn, [(x,), (0.5 * x,)]))
    scales = q["params/layers/dense/kernel"].activation_scale
    assert scales.shape == (3, 1, 1)
    kernel = oracle.dequantize(q["params/layers/dense/kernel"])
    bias = np.float64(params["params"]["layers"]["dense"]["bias"])
    y = np.float64(x)
    for layer in range(3):  # the half batch never has the largest number
        scale = np.abs(y).max() / 127
        assert scales[layer, 0, 0] == pytest.approx(scale, rel=1e-5)
        y = np.rint(y / scale) * scale  # what the quantized layer makes of it
        y = 2 * np.tanh(y @ kernel[layer] + bias[layer])
    got = quantized(fn)(quantize_params(params, STATIC, fn, [(x,)]), x)
    np.testing.assert_allclose(got, fn(params, x), atol=0.1)


def experts(params, x):
    def layer(x, w):
        return jnp.tanh(jnp.einsum("ebk,ekn->ebn", x, w)), None

    return jax.lax.scan(layer, x, params["w"])[0]


def test_static_scales_of_experts_in_layers_are_each_experts_own(rng):
    w = jnp.asarray(0.3 * rng.standard_normal((2, 3, 16, 16)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((3, 4, 16)), jnp.float32)
    q = quantize_params({"w": w}, STATIC, experts, [(x,)])
    scale = q["w"].activation_scale
    assert scale.shape == (2, 3, 1, 1)
    largest = np.abs(x).max((1, 2)) / np.float32(127)
    np.testing.assert_array_equal(scale[0, :, 0, 0], largest)
    got = quantized(experts)(q, x)
    np.testing.assert_allclose(got, experts({"w": w}, x), atol=0.05)


# ------------------------------------------------------------------------ calibrate


def test_calibrate_says_what_numpy_says(weight, rng):
    batches = [(rng.standard_normal((2, n, 64)).astype(np.float32),) for n in (3, 5)]
    seen = calibrate(product, {"w": weight}, batches, {"range": minmax()})
    low, high, count = seen["w"]["range"]
    everything = np.concatenate([x.reshape(-1, 64) for (x,) in batches])
    assert (low, high, count) == (everything.min(), everything.max(), len(everything))


def test_calibrate_observes_all_uses_of_a_weight(weight, x):
    fn = lambda p, x: (x @ p["w"], (3 * x) @ p["w"])
    seen = calibrate(fn, {"w": weight}, [(x,)], {"range": minmax()})["w"]["range"]
    assert seen.absmax == 3 * np.abs(x).max()
    assert seen.tokens == 8


def test_calibrate_on_a_mesh_says_the_same(weight, rng):
    x = jnp.asarray(rng.standard_normal((16, 64)), jnp.float32)
    mesh = jax.make_mesh((8,), ("data",))
    spread = jax.NamedSharding(mesh, jax.P("data"))
    observers = {"range": minmax(), "again": minmax()}
    alone = calibrate(product, {"w": weight}, [(x,)], observers)
    parallel = calibrate(
        product, {"w": weight}, [(jax.device_put(x, spread),)], observers
    )
    same(alone, parallel)


def test_calibrate_takes_quantized_parameters(weight, x):
    q = quantize_params({"w": weight}, INT8, product, [(x,)])
    seen = calibrate(product, q, [(x,)], {"range": minmax()})
    assert seen["w"]["range"].absmax == np.abs(x).max()


def test_constants_of_a_batch_stay_constants(weight, x):
    def fn(params, x, mode, train, factor=None):
        assert mode == "double"
        x = 2 * x if train else x
        return x @ params["w"]

    for train, largest in ((True, 2.0), (False, 1.0)):
        batch = (x / jnp.abs(x).max(), "double", train, None)
        q = quantize_params({"w": weight}, STATIC, fn, [batch])["w"]
        assert q.activation_scale[0, 0] == np.float32(largest) / np.float32(127)


# ------------------------------------------------------------------------ bad input


def test_nan_and_infinity_are_all_named_before_any_work(weight, x):
    names = [f"w{i}" for i in range(8)]
    params = dict.fromkeys(names, weight) | {"bias": jnp.full(8, jnp.nan)}
    params["w1"] = weight.at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf)
    params["w7"] = weight.at[:, 2].set(-jnp.inf)
    fn = lambda p, x: sum(x @ p[n] for n in names) + p["bias"]
    told = []
    with pytest.raises(ValueError, match="NaN or Inf") as info:
        quantize_params(params, INT8, fn, [(x,)], progress=lambda *a: told.append(a))
    message = str(info.value)
    assert "'w1' (2 of 512 values), 'w7' (64 of 512 values)" in message
    assert "'w0'" not in message
    assert "Rule('<path>', weight=None)" in message
    assert not told
    # what stays float may hold anything
    kept = Recipe("k", (Rule("w[17]"), Rule("*", INT8)))
    done = quantize_params(params, kept, fn, [(x,)])
    assert done["w1"] is params["w1"]
    assert np.isnan(done["bias"]).all()


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_nan_activations_give_no_static_scale(value, weight, x):
    with pytest.raises(
        ValueError, match="the activation that 'w' meets holds NaN or Inf"
    ):
        quantize_params({"w": weight}, STATIC, product, [(x.at[0, 0].set(value),)])


@pytest.mark.parametrize(
    ("fn", "calibration", "message"),
    [
        (
            product,
            None,
            r"fn= was given without a batch.*calibration=\[\(x, ",
        ),
        (product, [], r"fn= was given without a batch"),
        (None, [(1,)], r"calibration= was given without fn="),
        (product, [jnp.ones((1, 64))], r"must be a tuple.*write calibration=\[\(x,\)"),
        (product, "text", r"must be a tuple of fn's other arguments, got str"),
    ],
)
def test_a_function_needs_a_batch_and_a_batch_a_function(
    fn, calibration, message, weight
):
    with pytest.raises(ValueError, match=message):
        quantize_params({"w": weight}, "w8a16", fn, calibration)


def test_a_static_scale_needs_data(weight):
    with pytest.raises(ValueError, match=r"'kernel' gets a static.*fn= and calib"):
        quantize_params({"kernel": weight}, STATIC)


def test_a_static_scale_needs_an_activation_that_was_seen(weight):
    fn = lambda p, ids: p["table"][ids] @ p["w"]
    params = {"table": weight.T, "w": weight}
    with pytest.raises(ValueError, match=r"no activation of 'table' was seen.*dynamic"):
        quantize_params(params, STATIC, fn, [(jnp.arange(3),)])


def test_nothing_to_calibrate_is_an_error(weight, x):
    with pytest.raises(ValueError, match="saw no activation"):
        calibrate(product, {"w": weight}, [], {"range": minmax()})
    with pytest.raises(ValueError, match="saw no activation"):
        calibrate(lambda p, x: x + p["w"], {"w": x}, [(x,)], {"range": minmax()})


def test_quantizing_twice_is_refused(weight, x):
    q = quantize_params({"w": weight}, "w8a16", product, [(x,)])
    with pytest.raises(ValueError, match="'w' is already quantized"):
        quantize_params(q, "w8a16", product, [(x,)])
    # the way back is open
    again = quantize_params(dequantize_params(q), "w8a16", product, [(x,)])
    same(again["w"].codes, q["w"].codes)


def test_a_tree_with_nothing_to_quantize_is_refused(weight):
    with pytest.raises(ValueError, match=r"'mine' stays float: without a function"):
        quantize_params({"mine": weight}, "w8a16")
    keep = Recipe("keep", (Rule("*"),))
    with pytest.raises(ValueError, match=r"'keep' quantizes nothing.*Pass the"):
        quantize_params({"kernel": weight}, keep)
    with pytest.raises(ValueError, match="holds no arrays"):
        quantize_params({}, "w8a16")


def test_names_are_checked(weight):
    with pytest.raises(UnknownNameError, match="did you mean 'w4a16'"):
        quantize_params({"kernel": weight}, "w4a61")
    with pytest.raises(TypeError, match="preset's name, a Recipe or a QuantSpec"):
        quantize_params({"kernel": weight}, 4)  # type: ignore[arg-type]


def test_a_group_that_does_not_divide_the_axis_pads(rng):
    w = jnp.asarray(rng.standard_normal((70, 8)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((3, 70)), jnp.float32)
    q = quantize_params({"w": w}, "w4a16", product, [(x,)])
    assert q["w"].shape == (70, 8)
    assert q["w"].padding == 58
    expected = np.float64(x) @ oracle.dequantize(q["w"])
    np.testing.assert_allclose(quantized(product)(q, x), expected, rtol=1e-4, atol=1e-4)
