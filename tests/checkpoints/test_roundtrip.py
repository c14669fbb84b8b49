"""What is saved comes back bit for bit: every format, block, scale, dtype, backend."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxq.checkpoints import load, save
from jaxq.checkpoints.backends import BACKENDS
from jaxq.checkpoints.dtypes import SAFETENSORS_NAMES
from jaxq.checkpoints.manifest import BACKENDS as BACKEND_NAMES
from jaxq.checkpoints.parameter import STATIC_CODECS
from jaxq.formats import FORMATS
from jaxq.qtensor import STATIC_FIELDS
from jaxq.quantize import quantize
from jaxq.spec import QuantSpec
from tests.checkpoints.trees import assert_same, variants, weight, with_everything

backends = pytest.mark.parametrize("backend", BACKENDS)


@backends
@pytest.mark.parametrize("name", FORMATS)
def test_every_format(tmp_path, name, backend):
    tree = {"params": variants(name)}
    save(tmp_path / "model", tree, backend=backend)
    assert_same(load(tmp_path / "model"), tree)


@backends
def test_every_field(tmp_path, backend):
    tree = {"w": with_everything(), "bare": variants("int3")["channel"]}
    save(tmp_path / "model", tree, backend=backend)
    found = load(tmp_path / "model")
    assert_same(found, tree)
    assert found["w"].activation == QuantSpec("int8", "token")
    assert found["bare"].zeros is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_of_the_original(tmp_path, dtype):
    q = variants("nf4")["group"]
    save(tmp_path / "model", {"w": dataclasses.replace(q, dtype=jnp.dtype(dtype))})
    assert load(tmp_path / "model")["w"].dtype == jnp.dtype(dtype)


@backends
def test_every_dtype(tmp_path, rng, backend):
    """Random bytes, so that NaNs with payloads and subnormals are among them."""
    tree = {}
    for name in SAFETENSORS_NAMES:
        dtype = np.dtype(getattr(ml_dtypes, name, name))
        data = rng.integers(0, 256, 6 * dtype.itemsize, dtype=np.uint8)
        if name == "bool":
            data = data % 2
        tree[name] = data.view(dtype).reshape(2, 3)
        if name.startswith(("int2", "uint2", "int4", "uint4", "float4")):
            numbers = np.array([[-2, -1, 0], [1, 2, 3]], np.float32)
            tree[name] = numbers.clip(*_limits(dtype)).astype(dtype)
    save(tmp_path / "model", tree, backend=backend)
    assert_same(load(tmp_path / "model"), tree)


def _limits(dtype: np.dtype) -> tuple[float, float]:
    info = jnp.finfo(dtype) if "float" in dtype.name else jnp.iinfo(dtype)
    return float(info.min), float(info.max)


@backends
def test_odd_shapes(tmp_path, backend):
    tree = {
        "scalar": jnp.float32(3),
        "numpy scalar": np.float32(4),
        "empty": jnp.zeros((0, 5), jnp.bfloat16),
        "strided": np.arange(24, dtype=np.int32).reshape(4, 6)[::2, ::-1],
        "big endian": np.arange(5, dtype=">f4"),
        "long": np.arange(3, dtype=np.int64) + 2**40,
    }
    save(tmp_path / "model", tree, backend=backend)
    found = load(tmp_path / "model")
    for key, array in tree.items():
        assert found[key].shape == np.shape(array)
        np.testing.assert_array_equal(found[key], array)
    assert found["long"].dtype == np.int64


@backends
@pytest.mark.parametrize(
    "tree", [{}, [], {"a": None}, {"e": jnp.zeros((0,))}, {"n": 1, "x": 2.5, "s": "é"}]
)
def test_trees_without_numbers(tmp_path, tree, backend):
    save(tmp_path / "model", tree, backend=backend)
    assert_same(load(tmp_path / "model"), tree)


@backends
def test_a_tree_that_is_one_leaf(tmp_path, backend):
    q = variants("int4")["double"]
    save(tmp_path / "q", q, backend=backend)
    assert_same(load(tmp_path / "q"), q)
    save(tmp_path / "x", weight(1), backend=backend)
    assert_same(load(tmp_path / "x"), weight(1))


def test_64_bits_stay(tmp_path):
    """With JAX's x64 enabled they are JAX arrays, else NumPy's; never narrowed."""
    save(tmp_path / "model", {"x": np.float64(1) / 3})
    assert isinstance(load(tmp_path / "model")["x"], np.ndarray)
    with jax.enable_x64(True):
        found = load(tmp_path / "model")["x"]
        assert isinstance(found, jax.Array)
        assert found == np.float64(1) / 3


def test_the_same_tree_makes_the_same_files(tmp_path):
    tree = {"w": variants("int4"), "b": jnp.ones(3)}
    for name in ("one", "two"):
        save(tmp_path / name, tree, recipe=QuantSpec("int4", 16))
    for file in ("jaxq.json", "model.safetensors"):
        one, two = tmp_path / "one" / file, tmp_path / "two" / file
        assert one.read_bytes() == two.read_bytes()


def test_loaded_arrays_do_not_depend_on_the_files(tmp_path):
    # JAX shares memory with NumPy where the alignment (64 bytes) happens to allow it
    sizes = [4096 + 2 * i for i in range(32)]
    folder = save(tmp_path / "model", [jnp.arange(float(n)) for n in sizes])
    found = load(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * (folder / "model.safetensors").stat().st_size)
    for array, n in zip(found, sizes, strict=True):
        np.testing.assert_array_equal(array, np.arange(n, dtype=np.float32))


def test_a_loaded_tree_runs(tmp_path):
    q = quantize(weight(0), QuantSpec("int4", 16))
    save(tmp_path / "model", {"w": q})
    run = jax.jit(lambda tree: tree["w"].dequantize() * 2)
    np.testing.assert_array_equal(
        run(load(tmp_path / "model")), run({"w": dataclasses.replace(q, name=None)})
    )
    assert run._cache_size() == 1


def test_every_static_field_is_saved():
    """A field that `QTensor` gains must be given a codec here.

    Names are of no account, and where a tensor lies is for the loading run to say.
    """
    assert set(STATIC_CODECS) == set(STATIC_FIELDS) - {"name", "sharding"}


def test_every_backend_may_be_named_in_a_manifest():
    assert set(BACKEND_NAMES) == set(BACKENDS)
