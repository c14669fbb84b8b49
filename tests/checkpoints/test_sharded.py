"""Eight devices: shardings survive, move to other meshes, and are read in parts."""

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxq.checkpoints import CheckpointError, MismatchError, load, placement, save
from jaxq.checkpoints.backends import BACKENDS
from jaxq.sharding import qtensor_shardings
from tests.checkpoints.trees import assert_same, variants

backends = pytest.mark.parametrize("backend", BACKENDS)
P = PartitionSpec


def mesh(*shape: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, ("x", "y")[: len(shape)])


def sharded(on: Mesh) -> Any:
    kinds = variants("int4")
    tree = {
        "column": kinds["group"],
        "row": kinds["double"],
        "bias": jnp.arange(32.0),
        "step": jnp.int32(3),
        "none": None,
    }
    specs = {"column": P(None, "x"), "row": P("x"), "bias": P("y"), "step": P()}
    return {
        key: leaf if leaf is None else put(leaf, NamedSharding(on, specs[key]))
        for key, leaf in tree.items()
    }


def put(leaf: Any, sharding: NamedSharding) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, sharding)
    return jax.device_put(leaf, qtensor_shardings(leaf, sharding))


def shardings_of(tree: Any) -> list[Any]:
    return [leaf.sharding for leaf in jax.tree.leaves(tree)]


def test_orbax_keeps_the_sharding(tmp_path):
    tree = sharded(mesh(4, 2))
    save(tmp_path / "model", tree, backend="orbax")
    found = load(tmp_path / "model")
    assert_same(found, tree)
    assert shardings_of(found) == shardings_of(tree)
    assert len(found["column"].codes.sharding.device_set) == 8


def test_safetensors_gathers(tmp_path):
    tree = sharded(mesh(4, 2))
    save(tmp_path / "model", tree)
    found = load(tmp_path / "model")
    assert_same(found, tree)
    assert all(len(s.device_set) == 1 for s in shardings_of(found))


@backends
@pytest.mark.parametrize("shape", [(8,), (2, 4), (1,), (2,)])
def test_another_mesh(tmp_path, backend, shape):
    """One sharding for everything: what it does not divide is replicated there."""
    tree = sharded(mesh(4, 2))
    save(tmp_path / "model", tree, backend=backend)
    place = NamedSharding(mesh(*shape), P(None, "x"))
    wanted = {"column": place, "row": place, "bias": None, "step": None, "none": None}
    found = load(tmp_path / "model", shardings=wanted)
    assert_same(found, tree)
    for key in ("column", "row"):
        assert shardings_of(found[key]) == jax.tree.leaves(
            qtensor_shardings(tree[key], place)
        )
    assert found["column"].codes.sharding.shard_shape((24, 32)) == (24, 32 // shape[0])


@backends
def test_ways_to_say_where(tmp_path, backend):
    tree = sharded(mesh(4, 2))
    save(tmp_path / "model", tree, backend=backend)
    device = SingleDeviceSharding(jax.devices()[5])
    assert set(shardings_of(load(tmp_path / "model", shardings=device))) == {device}
    replicated = NamedSharding(mesh(2, 2), P())
    found = load(tmp_path / "model", shardings=replicated)
    assert all(s.is_fully_replicated for s in shardings_of(found))
    assert all(s.mesh == replicated.mesh for s in shardings_of(found))
    exact = jax.tree.map(lambda a: a.sharding, tree)
    assert shardings_of(load(tmp_path / "model", shardings=exact)) == shardings_of(tree)
    assert shardings_of(load(tmp_path / "model", like=tree)) == shardings_of(tree)
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree
    )
    found = load(tmp_path / "model", like=abstract)
    assert_same(found, tree)
    assert shardings_of(found) == shardings_of(tree)


@backends
def test_like_a_sharded_float_model(tmp_path, backend):
    """The float model's sharding places the quantized one."""
    tree = {"w": variants("int4")["group"]}
    save(tmp_path / "model", tree, backend=backend)
    place = NamedSharding(mesh(4, 2), P("y", "x"))
    like = {"w": jax.ShapeDtypeStruct((48, 32), "float32", sharding=place)}
    found = load(tmp_path / "model", like=like)
    assert_same(found, tree)
    assert shardings_of(found) == jax.tree.leaves(qtensor_shardings(tree["w"], place))


@backends
@pytest.mark.parametrize(
    ("shardings", "words"),
    [
        ({"b": None}, "no prefix of the tree"),
        ({"a": {"c": None}, "b": None}, "no prefix"),
        ({"a": "x", "b": None}, "has a str for 'a'"),
        ({"a": P("x"), "b": None}, "for 'a'; give a .*NamedSharding"),
    ],
)
def test_bad_shardings(tmp_path, backend, shardings, words):
    save(tmp_path / "model", {"a": jnp.ones(3), "b": jnp.ones(8)}, backend=backend)
    with pytest.raises(MismatchError, match=words):
        load(tmp_path / "model", shardings=shardings)


def test_shardings_that_do_not_divide(tmp_path):
    save(tmp_path / "model", {"a": jnp.ones(3)})
    place = NamedSharding(mesh(2), P("x"))
    with pytest.raises(MismatchError, match=r"'a' of shape \(3,\) cannot be sharded"):
        load(tmp_path / "model", shardings=place)


def test_only_the_parts_of_a_device_are_read(tmp_path, monkeypatch):
    """A sharded array is never put together on the host."""
    save(tmp_path / "model", {"a": jnp.arange(64.0).reshape(8, 8)})
    sizes, place = [], NamedSharding(mesh(4, 2), P("x", "y"))
    monkeypatch.setattr(
        placement.np, "array", lambda a: (sizes.append(a.size), np.copy(a))[1]
    )
    found = load(tmp_path / "model", shardings=place)
    assert sizes == [8] * 8
    np.testing.assert_array_equal(found["a"], np.arange(64.0).reshape(8, 8))


def test_fewer_devices(tmp_path):
    """What eight devices saved loads where there is one."""
    tree = sharded(mesh(4, 2))
    save(tmp_path / "model", tree, backend="orbax")
    np.save(tmp_path / "codes.npy", np.asarray(tree["column"].codes))
    code = (
        "import jax, numpy as np, warnings; warnings.simplefilter('error')\n"
        "from jaxq.checkpoints import load\n"
        f"found = load({str(tmp_path / 'model')!r})\n"
        "assert len(jax.devices()) == 1\n"
        f"codes = np.load({str(tmp_path / 'codes.npy')!r})\n"
        "np.testing.assert_array_equal(found['column'].codes, codes)\n"
    )
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert not run.stdout + run.stderr, "quiet"


@backends
def test_quiet(tmp_path, capfd, caplog, backend):
    tree = sharded(mesh(4, 2))
    save(tmp_path / "model", tree, backend=backend)
    load(tmp_path / "model")
    save(tmp_path / "model", tree, backend=backend, overwrite=True)
    out, err = capfd.readouterr()
    assert not out + err
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]


@backends
def test_no_pickle(tmp_path, monkeypatch, backend):
    import pickle

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a checkpoint was pickled")

    tree = sharded(mesh(4, 2))
    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    save(tmp_path / "model", tree, backend=backend)
    assert_same(load(tmp_path / "model"), tree)
    for path in (tmp_path / "model").rglob("*"):
        assert path.is_dir() or not path.read_bytes().startswith(b"\x80\x04")


def test_orbax_alone_can_read_it(tmp_path):
    """Plain arrays under plain names: no jaxq is needed to get at the numbers."""
    import orbax.checkpoint as ocp

    tree = {"w": variants("int4")["group"]}
    folder = save(tmp_path / "model", tree, backend="orbax")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeRestore(
            restore_args={
                name: ocp.RestoreArgs(restore_type=np.ndarray)
                for name in ("w/codes", "w/scales")
            }
        )
        found = checkpointer.restore(folder / "arrays", args=args)
    assert set(found) == {"w/codes", "w/scales"}
    np.testing.assert_array_equal(found["w/codes"], tree["w"].codes)


def test_many_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(CheckpointError, match=r"2 processes run.*orbax\.checkpoint"):
        save(tmp_path / "model", {"x": jnp.ones(2)}, backend="orbax")
    assert not list(tmp_path.iterdir())


def test_backend_names(tmp_path):
    with pytest.raises(ValueError, match="safetensors"):
        save(tmp_path / "model", {}, backend="safetensor")
    with pytest.raises(ValueError, match="shard_bytes=0 must be at least 1"):
        save(tmp_path / "model", {}, shard_bytes=0)
    assert not list(tmp_path.iterdir())
    assert issubclass(CheckpointError, ValueError)
