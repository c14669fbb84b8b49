"""Binary coding: the same numbers as an integer format, counted, saved, multiplied."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.binary import binary_coded
from jaxq.checkpoints import CheckpointError
from jaxq.codecs.unpacked import Unpacked
from jaxq.ops.lookup import LOOKUP_ROWS
from jaxq.quantize import quantize
from jaxq.relayout import LOOKUP, PLANAR, relayout, relayout_params
from jaxq.spec import QuantSpec
from pallas_kernels.target import Target

GPU = Target("gpu", "sm_90", interpret=True)


def random(shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


def signs(bits, block=32, symmetric=True, scale="bfloat16"):
    return QuantSpec(f"uint{bits}", block, symmetric, scale=scale, binary=True)


def coded(shape, bits=3, seed=0, **how):
    return jaxq.solvers.solve(
        random(shape, seed),
        spec=signs(bits, **how),
        solver="bcq",
        options=(("rounds", 2),),
        contracting=(0,),
        stacked=(),
    )


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("uint4", 32, False, scale="bfloat16"),
        QuantSpec("uint3", "channel", False),
        QuantSpec("int4", 32, grid="full", scale="bfloat16"),
        QuantSpec("uint2", 16, False, scale="float16"),
        QuantSpec("int5", 32),
    ],
    ids=lambda spec: spec.describe(),
)
def test_every_integer_format_is_a_binary_coding(spec):
    q = quantize(random((96, 8)), spec)
    b = binary_coded(q)
    assert b.spec.binary
    np.testing.assert_array_equal(b.codes, q.codes)
    # float32 sums of exact halves: one rounding of the offset, one of the sum
    want = np.asarray(q.dequantize())
    np.testing.assert_allclose(b.dequantize(), want, rtol=0, atol=3e-7 * 4)
    x = random((2, 96), 1)
    product = jaxq.quantized(lambda w, x: x @ w)
    exact = np.asarray(x, np.float64) @ want
    np.testing.assert_allclose(product(b, x), exact, rtol=0, atol=2e-5)
    np.testing.assert_allclose(product(q, x), product(b, x), rtol=0, atol=2e-5)
    assert binary_coded(b) is b


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_to_nearest_makes_an_even_grid(symmetric):
    w = random((64, 6))
    q = quantize(w, signs(3, 32, symmetric))
    planes = np.asarray(q.scale_values()).reshape(2, 3, 6)
    np.testing.assert_allclose(planes[:, 1:], 2 * planes[:, :-1], rtol=2e-7)
    step = 2 * planes[:, 0].max()
    assert float(jnp.abs(q.dequantize() - w).max()) <= 0.51 * step
    assert (q.offset is None) == symmetric


def test_bits_are_counted_from_all_that_is_stored():
    q = coded((128, 16), 3, block=32)
    assert q.bits_per_weight == 3 * (1 + 16 / 32)
    assert q.nbytes == 128 * 16 * 3 // 8 + 4 * 3 * 16 * 2
    assert coded((128, 16), 2, symmetric=False).bits_per_weight == 2 * 1.5 + 1
    assert "uint3 binary-coded g32" in repr(q)


@pytest.mark.parametrize("rows", [1, LOOKUP_ROWS, LOOKUP_ROWS + 1, 40])
@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ((96, 10), {}),
        ((50, 7), {"block": 16, "symmetric": False}),
        ((44, 3), {"block": "channel"}),
    ],
)
def test_products_are_those_with_the_weight_read_back(rows, shape, how):
    q = coded(shape, 3, **how)
    x = random((rows, shape[0]), 2)
    fn = lambda w, x: x @ w
    name = jaxq.explain(fn, q, x).rows[0].choice.kernel
    few = rows <= LOOKUP_ROWS
    assert name == ("xla.binary_lut_dot" if few else "xla.binary_tiled_dot")
    exact = np.asarray(x, np.float64) @ np.asarray(q.dequantize(), np.float64)
    got = jaxq.quantized(fn)(q, x)
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def test_the_kernel_that_looks_up_runs_on_a_gpu():
    q = coded((128, 24), 3, block=64, symmetric=False)
    moved = relayout_params({"w": q}, GPU)["w"]
    assert moved.layout == LOOKUP
    x, fn = random((2, 128), 2), lambda w, x: x @ w
    (row,) = jaxq.explain(fn, moved, x, target=GPU)
    assert row.choice.kernel == "gpu.lookup_product"
    got = jaxq.quantized(fn, target=GPU)(moved, x)
    exact = np.asarray(x, np.float64) @ np.asarray(q.dequantize(), np.float64)
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    told = dict(jaxq.explain(fn, q, x, target=GPU).rows[0].choice.declined)
    assert "in layout 'planar'" in told["gpu.lookup_product"]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.device_put(x, jax.NamedSharding(mesh, jax.P("x")))
    told = dict(jaxq.explain(fn, moved, cut, target=GPU).rows[0].choice.declined)
    assert "use jax.shard_map" in told["gpu.lookup_product"]
    many = jaxq.explain(fn, moved, random((9, 128)), target=GPU).rows[0].choice
    assert many.kernel == "xla.binary_tiled_dot"


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_the_layout_of_look_ups_is_a_bijection(bits):
    q = quantize(random((3, 64, 5)), signs(bits, 16), stacked=(0,))
    moved = relayout(q, LOOKUP)
    assert moved.shape == q.shape
    np.testing.assert_array_equal(moved.dequantize(), q.dequantize())
    np.testing.assert_array_equal(relayout(moved, PLANAR).codes, q.codes)
    # bit j of byte s of plane i is bit i of code 8 s + j
    codes = np.asarray(q.code_values()).astype(np.uint8)
    planes = np.asarray(moved.codes).reshape(3, bits, 8, 5)
    for i in range(bits):
        want = np.packbits(codes >> i & 1, axis=1, bitorder="little")
        np.testing.assert_array_equal(planes[:, i], want)


def test_no_float_weight_as_a_whole_is_made():
    q = coded((512, 512), 3, block=64)
    for rows in (1, 64):
        x = jnp.ones((rows, 512))
        run = jax.jit(jaxq.quantized(lambda w, x: x @ w))
        used = run.lower(q, x).compile().memory_analysis().temp_size_in_bytes
        assert used < 4 * 512 * 512


def test_it_has_a_derivative():
    q, x = coded((64, 6), 3), random((2, 64), 1)
    product = jaxq.quantized(lambda w, x: jnp.sum(jnp.tanh(x @ w)))
    got = jax.grad(product, argnums=1)(q, x)
    want = jax.grad(lambda x: jnp.sum(jnp.tanh(x @ q.dequantize())))(x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_stacks_transposes_and_reshapes_stay_what_they_are():
    stack = quantize(random((3, 64, 6)), signs(3, 16), stacked=(0,))
    floats = stack.dequantize()
    x = random((3, 2, 64), 1)

    def scanned(w, x):
        return jax.lax.scan(lambda c, p: (c, p[1] @ p[0]), 0, (w, x))[1]

    def attention_like(w, x):
        return jnp.einsum("btk,kgd->btgd", x, w[1].reshape(64, 2, 3))

    def turned(w, x):
        return jnp.einsum("nk,btk->btn", w[0].T, x)

    def cut(w, x):
        return x[..., :32] @ w[2][:32]

    for fn in (scanned, attention_like, turned, cut):
        got, want = jaxq.quantized(fn)(stack, x), fn(floats, x)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_experts_embeddings_and_convolutions_are_right():
    experts = quantize(random((2, 32, 4)), signs(2, 16), stacked=(0,))
    sizes = jnp.asarray([3, 2])
    fn = lambda w, x: jax.lax.ragged_dot(x, w, sizes)
    x = random((5, 32), 1)
    got, want = jaxq.quantized(fn)(experts, x), fn(experts.dequantize(), x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    table = quantize(random((10, 32)), signs(3, 16), axis=1)
    fn = lambda w, i: w[i]
    index = jnp.asarray([3, 0, 3, 9])
    np.testing.assert_array_equal(
        jaxq.quantized(fn)(table, index), table.dequantize()[index]
    )


@pytest.mark.parametrize("backend", ["safetensors", "orbax"])
def test_it_is_saved_as_it_is(tmp_path, backend):
    tree = {"a": coded((50, 8), 3, block=16, symmetric=False), "b": coded((64, 8), 2)}
    jaxq.save(tmp_path / "model", tree, backend=backend)
    found = jaxq.load(tmp_path / "model")
    for name, q in tree.items():
        again = found[name]
        assert (again.spec, again.block, again.pack) == (q.spec, q.block, q.pack)
        np.testing.assert_array_equal(again.dequantize(), q.dequantize())


def test_scales_that_are_not_one_per_bit_are_no_checkpoint(tmp_path):
    q = coded((64, 8), 2)
    wrong = dataclasses.replace(q, scales=q.scales[:2])
    jaxq.save(tmp_path / "model", {"w": wrong})
    with pytest.raises(CheckpointError, match="one per bit and block"):
        jaxq.load(tmp_path / "model")


def test_awq_scales_channels_before_signs_are_chosen():
    # channels of very different size: AWQ finds scales that lose less
    x = random((200, 64), 1) * jnp.exp(random((1, 64), 2) * 1.5)
    params, fn = {"w": random((64, 32))}, lambda p, x: x @ p["w"]
    errors = []
    for solver in ("bcq", jaxq.chain(jaxq.awq(), jaxq.bcq())):
        recipe = jaxq.Recipe("r", (jaxq.Rule("*", signs(2), solver=solver),))
        small = jaxq.quantize_params(params, recipe, fn=fn, calibration=[(x,)])
        y = jaxq.quantized(fn)(small, x)
        errors.append(float(jnp.mean((y - fn(params, x)) ** 2)))
    assert errors[1] < errors[0]


def test_presets_count_and_compute():
    params = {"w": random((128, 32))}
    fn = lambda p, x: jnp.tanh(x @ p["w"])
    x = random((3, 128), 1)
    losses = []
    for bits, stored in ((4, 5.0), (3, 3.75), (2, 2.5)):
        small = jaxq.quantize_params(
            params, f"w{bits}a16-bcq", fn=fn, calibration=[(x,)]
        )
        assert small["w"].bits_per_weight == stored
        y = jaxq.quantized(fn)(small, x)
        want = fn(jaxq.dequantize_params(small), x)
        np.testing.assert_allclose(y, want, rtol=0, atol=1e-5)
        losses.append(float(jnp.mean((y - fn(params, x)) ** 2)))
    assert losses == sorted(losses)


@pytest.mark.parametrize(
    "wrong",
    [
        {"format": "int4"},
        {"format": "uint8"},
        {"format": "nf4"},
        {"block": (16, 8)},
        {"block": "tensor"},
        {"scale": "e8m0"},
        {"scale": QuantSpec("uint8", 16, False)},
    ],
)
def test_specs_without_signs_are_refused(wrong):
    fields = {"format": "uint4", "block": 64, "binary": True} | wrong
    with pytest.raises(ValueError, match="binary=True is for uint2 to uint7"):
        QuantSpec(**fields)


def test_what_has_no_binary_coding_says_so():
    w = random((64, 8))
    for spec in (QuantSpec("nf4", 32), QuantSpec("int8"), QuantSpec("int4", "tensor")):
        with pytest.raises(ValueError, match="binary"):
            binary_coded(quantize(w, spec))
    with pytest.raises(ValueError, match="one per block: use the solver 'bcq'"):
        jaxq.quantize_params(
            {"w": w},
            jaxq.Recipe("r", (jaxq.Rule("*", signs(4), solver="gptq"),)),
            fn=lambda p, x: x @ p["w"],
            calibration=[(random((40, 64), 1),)],
        )
    with pytest.raises(ValueError, match=r"clip='mse'.*one per bit"):
        jaxq.quantize_params(
            {"kernel": w},
            jaxq.Recipe("r", (jaxq.Rule("*", signs(4), options={"clip": "mse"}),)),
        )
    with pytest.raises(ValueError, match="a scale for every bit"):
        Unpacked.of(coded((64, 8)))
    with pytest.raises(ValueError, match="it is not binary-coded"):
        relayout(quantize(w, QuantSpec("uint4", 32)), LOOKUP)
    assert QuantSpec.from_dict(signs(4).to_dict()) == signs(4)
