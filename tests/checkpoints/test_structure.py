"""Containers come back as they were, or are restored into a tree of the same kind."""

import dataclasses
import typing
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

from jaxq.checkpoints import (
    CheckpointError,
    MismatchError,
    load,
    load_abstract,
    save,
    structure,
)
from jaxq.checkpoints.errors import UnsupportedError
from jaxq.lift.trace import path_string
from tests.checkpoints.trees import assert_same, unnamed, variants


class Pair(typing.NamedTuple):
    left: Any
    right: Any


def one() -> jax.Array:
    return jnp.ones(2)


TREES: dict[str, Any] = {
    "dicts": {"a": {"b": one(), "c": {"d": one()}}},
    "int keys": {0: one(), 10: {2: one()}, -1: one()},
    "bool keys": {True: one(), False: one()},
    "numbers as names": {"0": one(), "10": one()},
    "sequences": [one(), (one(), [one()], ()), {}],
    "nothing": {"a": None, "b": [None, one()], "c": ()},
    "frozen": FrozenDict({"a": {"b": one()}, "c": one()}),
    "frozen inside": {"a": FrozenDict({"b": [one()]})},
    "odd names": {"a/b": one(), "a.b": one(), "": one(), "é\n": one(), "~": one()},
    "values": {"i": 3, "f": 0.1, "b": True, "s": "text", "big": 10**30},
    "haiku": {"mlp/~/linear_0": {"w": one(), "b": one()}},
    "quantized": {"a": [variants("nf4")["double"]], 3: (variants("int4")["group"],)}[
        "a"
    ],
}


@pytest.mark.parametrize("name", TREES)
def test_containers(tmp_path, name):
    save(tmp_path / "model", TREES[name])
    found = load(tmp_path / "model")
    assert_same(found, TREES[name])
    assert list(map(type, _nodes(found))) == list(map(type, _nodes(TREES[name])))


def _nodes(tree: Any) -> list[Any]:
    inside = tree.values() if hasattr(tree, "values") else tree
    if not isinstance(tree, dict | FrozenDict | list | tuple):
        return []
    return [tree, *(node for child in inside for node in _nodes(child))]


def test_order_of_keys(tmp_path):
    save(tmp_path / "model", {"z": one(), "a": one()})
    assert list(load(tmp_path / "model")) == ["z", "a"]


@pytest.mark.parametrize("name", TREES)
def test_like(tmp_path, name):
    """An abstract tree is enough; float arrays may stand for quantized ones."""
    save(tmp_path / "model", TREES[name])
    if name != "values":
        abstract = jax.eval_shape(lambda: TREES[name])
        assert_same(load(tmp_path / "model", like=abstract), TREES[name])
    assert_same(load(tmp_path / "model", like=TREES[name]), TREES[name])


def test_other_containers(tmp_path):
    tree = Pair(one(), {"a": Pair(one(), variants("int4")["group"])})
    save(tmp_path / "model", tree)
    found = load(tmp_path / "model")
    assert_same(
        found,
        {"left": one(), "right": {"a": {"left": one(), "right": tree[1]["a"][1]}}},
    )
    assert_same(load(tmp_path / "model", like=jax.eval_shape(lambda: tree)), tree)


def test_linen(tmp_path):
    """The float model's abstract variables take the quantized parameters."""
    variables = jax.eval_shape(
        nn.Dense(32).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 48), "float32")
    )
    q = variants("int4")["group"]
    tree = {"params": {"kernel": q, "bias": jnp.ones(32)}}
    save(tmp_path / "model", tree)
    assert_same(load(tmp_path / "model", like=variables), tree)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)


def test_nnx(tmp_path):
    graph, state = nnx.split(Net(nnx.Rngs(0)))
    save(tmp_path / "model", state)
    plain = load(tmp_path / "model")
    assert set(plain) == {"layers", "norm"}
    like = nnx.eval_shape(lambda: nnx.split(Net(nnx.Rngs(1)))[1])
    found = load(tmp_path / "model", like=like)
    assert type(found) is type(state)
    assert_same(found, state)
    net = nnx.merge(graph, found)
    np.testing.assert_array_equal(
        net.layers[1].kernel[...], nnx.merge(graph, state).layers[1].kernel[...]
    )


def test_equinox(tmp_path):
    """Arrays are saved, functions stay with the code."""
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    with pytest.raises(UnsupportedError, match=r"activation.*eqx\.filter"):
        save(tmp_path / "model", model)
    arrays, rest = eqx.partition(model, eqx.is_array)
    save(tmp_path / "model", arrays)
    abstract = eqx.filter_eval_shape(lambda: arrays)
    found = load(tmp_path / "model", like=abstract)
    assert_same(found, arrays)
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(eqx.combine(found, rest)(x), model(x))
    assert found.layers[0].weight.shape == (8, 4)
    names = load(tmp_path / "model")
    assert set(names["layers"][0]) >= {"weight", "bias"}


LIKES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "missing": ({"w": 0, "b": 0, "c": 0}, ("'c' only in like", "nothing only in the")),
    "unexpected": ({"w": 0}, ("'b' only in the checkpoint", "load without like")),
    "shape": ({"w": 0, "b": jnp.ones(3)}, ("'b'", "(2,)", "(3,)", "change like")),
    "dtype": ({"w": 0, "b": jnp.ones(2, "float16")}, ("'b'", "float32", "float16")),
    "value": ({"w": 0, "b": 3}, ("'b'", "(2,) float32", "the int 3")),
    "quantized shape": (
        {"w": jax.ShapeDtypeStruct((48, 33), "float32"), "b": 0},
        ("'w'", "48x32", "(48, 33)"),
    ),
    "quantized dtype": (
        {"w": jax.ShapeDtypeStruct((48, 32), "bfloat16"), "b": 0},
        ("'w'", "float32 as int4", "bfloat16"),
    ),
    "spec": ({"w": variants("int4")["channel"], "b": 0}, ("'w'", "g16", "channel")),
}


@pytest.mark.parametrize("case", LIKES)
def test_like_that_does_not_fit(tmp_path, case):
    tree = {"w": variants("int4")["group"], "b": one()}
    save(tmp_path / "model", tree)
    like, words = LIKES[case]
    like = {
        k: tree.get(k, one()) if type(v) is int and v == 0 else v
        for k, v in like.items()
    }
    with pytest.raises(MismatchError) as caught:
        load(tmp_path / "model", like=like)
    for word in words:
        assert word in str(caught.value)


def test_float_where_like_is_quantized(tmp_path):
    save(tmp_path / "model", {"w": jnp.ones((48, 32))})
    with pytest.raises(MismatchError, match="'w' is an array"):
        load(tmp_path / "model", like={"w": variants("int4")["group"]})


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"a/b": 1, "a": {"b": 2}}, "two leaves of the tree have the path 'a/b'"),
        (
            {"a": variants("int4")["group"], "a/codes": jnp.ones(1)},
            "stored as 'a/codes'",
        ),
        ({"a": 1, 2: 3}, "cannot be flattened"),
        ({"k": jax.random.key(0)}, r"random key.*jax\.random\.key_data"),
        ({"x": jax.ShapeDtypeStruct((2,), "float32")}, "abstract"),
        ({"x": 1j}, "complex"),
    ],
)
def test_trees_that_cannot_be_saved(tmp_path, tree, words):
    with pytest.raises(UnsupportedError, match=words):
        save(tmp_path / "model", tree)
    assert not list(tmp_path.iterdir())


def test_tracers_and_deleted_arrays(tmp_path):
    with pytest.raises(UnsupportedError, match="outside of jit"):
        jax.jit(lambda x: save(tmp_path / "model", {"x": x}))(one())
    x = one()
    x.delete()
    with pytest.raises(UnsupportedError, match="'x' was deleted"):
        save(tmp_path / "model", {"x": x})


def test_depth(tmp_path):
    tree: Any = one()
    for _ in range(structure.MAX_DEPTH):
        tree = {"a": tree}
    save(tmp_path / "model", tree)
    assert_same(load(tmp_path / "model"), tree)
    with pytest.raises(CheckpointError, match="more than 100 levels deep"):
        save(tmp_path / "deep", [tree])


@pytest.mark.parametrize("name", TREES)
def test_abstract(tmp_path, name):
    """The tree that `jax.eval_shape` would give, from the manifest alone."""
    folder = save(tmp_path / "model", TREES[name])
    (folder / "model.safetensors").unlink()
    found = load_abstract(folder)
    if name == "values":
        assert found == TREES[name]
        return
    wanted = jax.eval_shape(lambda: TREES[name])
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert jax.tree.leaves(found) == jax.tree.leaves(wanted)


def test_names_are_not_saved(tmp_path):
    named = dataclasses.replace(variants("int4")["group"], name="params/w")
    save(tmp_path / "model", {"w": named})
    assert load(tmp_path / "model")["w"].name is None
    assert_same(load(tmp_path / "model", like={"w": named}), unnamed({"w": named}))


def test_paths_are_those_of_sites():
    """A recipe's patterns and a checkpoint's names speak of the same paths."""
    tree = {"params": [{"w": 1}, (2, Pair(3, 4))]}
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    assert list(structure.flatten(tree)) == [path_string(path) for path, _ in flat]
