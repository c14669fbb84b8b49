"""Every format against what the library that wrote it makes of the same bytes."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxq.codecs.base import Dense
from jaxq.codecs.unpacked import Unpacked
from jaxq.ops.activation import quantized_input, static_or_dynamic
from tests.codecs.excerpts import DATA, DTYPES, NAMES, digest, load

# What no `QTensor` expresses, and the reason that is given.
DEQUANTIZED = {
    "awq_raw-fast_g128": "gemv_fast stores zero points as rounded floats",
    "bitsandbytes-fp4_double_bias": "blocks of 64 run across rows of 96",
    "bitsandbytes-nf4_double_fp16": "blocks of 64 run across rows of 96",
    "hqq-native_b3_g64_axis0": "its groups are strided",
}
# One of every way that scales, zero points and permutations are held.
SOME = (
    "gptq-v2_b4_g32_asym_descact_bias",
    "compressed_tensors-w3a16_g32_asym",
    "compressed_tensors-nvfp4",
    "compressed_tensors-w8a8_int8_static_asym",
    "compressed_tensors-mxfp4a16",
    "bitsandbytes-nf4_double_storage_bf16",
    "fp8_block-deepseek_layout_partial_blocks",
)
OBSERVED = sorted(path.stem for path in DATA.glob("*.npz"))
every = pytest.mark.parametrize("name", NAMES)


def _read(excerpt, weight):
    return excerpt.reader.read(
        weight.removesuffix(".weight"), tuple(excerpt.weights[weight]["shape"])
    )


@every
def test_dequantized_weights_are_the_librarys(name):
    excerpt = load(name)
    assert excerpt.weights
    for weight, expected in excerpt.weights.items():
        found = _read(excerpt, weight)
        dtype = DTYPES[expected["dtype"]]
        if isinstance(found, Dense):
            values = found.values
        else:
            found = dataclasses.replace(found, dtype=found.dtype or dtype)
            values = np.asarray(found.tensor().dequantize(dtype)).T
        assert values.dtype == dtype
        if name == "awq_raw-fast_g128":  # its zero points times scales are rounded
            packed = np.load(DATA / f"{name}.npy").astype(np.float32)
            step = excerpt.source.read("fast_g128.scales").max() * 16
            np.testing.assert_allclose(values, packed, atol=1e-3 * step)
            assert np.abs(packed).max() > step / 4
        elif (
            name == "bitsandbytes-int8"
        ):  # (q · SCB) · (1/127) there, q · (SCB/127) here
            largest = excerpt.source.read(weight.replace("weight", "SCB"))
            codes = found.codes.view(np.int8).astype(np.float32)
            exact = (codes * largest * np.float32(1 / 127)).T
            assert digest(exact) == expected["sha256"]
            np.testing.assert_allclose(values, exact, rtol=3e-7)
        elif name.startswith("hqq") and not isinstance(found, Dense):
            exact = _hqq(excerpt, weight, found)
            assert digest(exact) == expected["sha256"]
            step = np.spacing(np.abs(found.codes).max().astype(dtype))
            np.testing.assert_allclose(
                values, exact, rtol=2**-10, atol=float(step * found.scales.max())
            )
        else:
            assert digest(values) == expected["sha256"]


@pytest.mark.parametrize("name", OBSERVED)
def test_activations_are_rounded_as_the_library_does(name):
    """To the bit: int8 and fp8, static or not, in groups, and nvfp4."""
    stored = np.load(DATA / f"{name}.npz")
    excerpt, weight = load(name), f"{stored['module']}.weight"
    found = _read(excerpt, weight)
    assert isinstance(found, Unpacked)
    w = dataclasses.replace(found, dtype=np.dtype("float32")).tensor()
    assert w.activation is not None
    read = jax.jit(quantized_input)(stored["x"], w)
    np.testing.assert_array_equal(read, stored["xq"])
    assert (stored["xq"] != stored["x"]).any()


def test_modelopts_input_scale_multiplies_the_scales_of_blocks():
    """A block as large as was calibrated gets the largest float8 scale."""
    excerpt = load("modelopt-nvfp4")
    weight = min(excerpt.weights)
    scale = float(excerpt.source.read(weight.replace("weight", "input_scale")))
    w = _read(excerpt, weight).tensor()
    x = np.zeros((1, w.shape[0]), np.float32)
    x[0, :2] = scale * 448 * 6 * np.asarray([1, -0.3])
    read = jax.jit(static_or_dynamic, static_argnums=2)(x, w, w.activation)
    scales = np.asarray(read.scale_values())
    np.testing.assert_allclose(scales[0, 0], 448 * scale, rtol=1e-6)
    want = scale * 448 * np.asarray([6, -2])  # -1.8 lies nearest to -2
    np.testing.assert_allclose(read.dequantize()[0, :2], want, rtol=1e-6)


def _hqq(excerpt, weight, found):
    """What HQQ makes of these codes: two roundings, where one is enough."""
    zero = excerpt.source.read(weight.replace("weight", "zero"))
    groups, columns = found.scales.shape
    zero = zero.reshape(columns, groups, 1)
    codes = found.codes.T.reshape(columns, groups, -1).astype(zero.dtype)
    return ((codes - zero) * found.scales.T[..., None]).reshape(columns, -1)


@every
def test_codes_stay_codes(name):
    excerpt = load(name)
    for weight in excerpt.weights:
        found = _read(excerpt, weight)
        if isinstance(found, Dense):
            assert found.why == DEQUANTIZED[name]
        else:  # bitsandbytes' blocks fit the rows of some layers
            assert name not in DEQUANTIZED or name.startswith("bitsandbytes")


@every
def test_every_tensor_has_a_use(name):
    excerpt = load(name)
    modules = [weight.removesuffix(".weight") for weight in excerpt.weights]
    parts = {part for module in modules for part in excerpt.reader.parts(module)}
    assert parts == set(excerpt.source)
    assert excerpt.reader.parts("model.layers.0.nothing") == ()


@pytest.mark.parametrize("name", SOME)
def test_embeddings_are_packed_along_their_width(name):
    """The transposed tensor holds the same numbers, whatever its packing."""
    excerpt = load(name)
    weight = min(excerpt.weights)
    found = _read(excerpt, weight)
    assert not isinstance(found, Dense)
    found = dataclasses.replace(found, dtype=np.dtype("float32"))
    kernel = found.tensor().dequantize()
    table = found.tensor(transposed=True)
    assert table.axis == -1
    np.testing.assert_array_equal(table.dequantize().T, kernel)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_unpacking_a_tensor_gives_back_its_arrays(name, transposed):
    excerpt = load(name)
    for weight in excerpt.weights:
        found = _read(excerpt, weight)
        if isinstance(found, Dense):
            continue
        found = dataclasses.replace(found, dtype=np.dtype("float16"))
        back = Unpacked.of(found.tensor(transposed))
        _assert_same(back, found)


def _assert_same(one, other):
    for field in dataclasses.fields(Unpacked):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(b, Unpacked):
            _assert_same(a, b)
        elif field.name == "block":
            assert a == tuple(min(*p) for p in zip(b, other.shape, strict=True))
        elif isinstance(b, np.ndarray):
            a = np.asarray(a)
            assert a.shape == b.shape
            np.testing.assert_array_equal(a.astype(b.dtype), b)
        elif field.name not in ("note", "dtype"):
            assert a == b
