"""Programs: the segments, run one after the other, are the function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxq.lift.program import Key, block_name, program
from jaxq.pipeline.stream import Batch, Stream

WIDTH = 8


class Block(nn.Module):
    """Two products that share an activation, and one that depends on both."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm(name="norm")(x)
        gate = nn.Dense(16, use_bias=False, name="gate")(y)
        up = nn.Dense(16, name="up")(y)
        return x + nn.Dense(WIDTH, name="down")(nn.silu(gate) * up), None


class Unrolled(nn.Module):
    """Three blocks of their own, and a head."""

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x, _ = Block(name=f"layers_{i}")(x)
        return nn.Dense(4, name="head")(x)


class Scanned(nn.Module):
    """The same blocks in a scan, rematerialized."""

    reverse: bool = False

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            reverse=self.reverse,
        )
        return nn.Dense(4, name="head")(layers(name="layers")(x, None)[0])


def linen(module):
    x = jax.random.normal(jax.random.key(1), (2, 5, WIDTH))
    return module.apply, module.init(jax.random.key(0), x), (x,)


def experts(params, x):
    """Every token through every expert, and the mean of them."""
    y = jnp.einsum("td,edf->etf", x, params["up"])
    return jnp.einsum("etf,efd->td", jnp.tanh(y), params["down"])


def ragged(params, x):
    """Tokens in the order of their experts."""
    y = jax.lax.ragged_dot(x, params["up"], jnp.asarray([3, 0, 2], jnp.int32))
    return jnp.tanh(y) @ params["out"]


def split_weight(params, x):
    """A fused weight, cut before it is used; a scan without weights."""
    q, k = jnp.split(params["qk"], 2, axis=1)
    y = jax.lax.scan(lambda c, s: (c * 0.5 + s, c), x[0], x @ q)[1]
    return y * (x @ k)


def branch(params, x):
    """Weights inside a branch and a loop, which stay closed."""
    y = jax.lax.cond(x.sum() > 0, lambda a: a @ params["a"], lambda a: -a, x)
    loop = lambda i, c: jnp.tanh(c @ params["b"])
    return jax.lax.fori_loop(0, 3, loop, y) @ params["c"]


def random_params(**shapes):
    rng = np.random.default_rng(0)
    return {
        k: jnp.asarray(0.3 * rng.normal(size=s), "float32") for k, s in shapes.items()
    }


X = jnp.asarray(np.random.default_rng(1).normal(size=(5, WIDTH)), jnp.float32)
CASES = {
    "unrolled": linen(Unrolled()),
    "scanned": linen(Scanned()),
    "reversed": linen(Scanned(reverse=True)),
    "experts": (experts, random_params(up=(3, 8, 8), down=(3, 8, 8)), (X,)),
    "ragged": (ragged, random_params(up=(3, 8, 8), out=(8, 4)), (X,)),
    "split": (split_weight, random_params(qk=(8, 16)), (X,)),
    "branch": (branch, random_params(a=(8, 8), b=(8, 8), c=(8, 4)), (X,)),
}


def leaf_of(params):
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in flat}
    return lambda key: named[key.path][key.index]


@pytest.mark.parametrize("name", CASES)
def test_the_segments_in_order_are_the_function(name):
    fn, params, batch = CASES[name]
    cut = program(fn, params, *batch)
    values = dict(zip(cut.inputs, batch, strict=True))
    stream = Stream((Batch(cut, values),), {})
    for _ in range(len(cut.groups) + 1):
        stream = stream.advance(leaf_of(params))
    (result,) = stream.batches[0].values.values()
    np.testing.assert_allclose(result, fn(params, *batch), rtol=1e-5, atol=1e-5)


def test_groups_are_what_can_be_solved_at_once():
    fn, params, batch = CASES["unrolled"]
    groups = program(fn, params, *batch).groups
    names = [[key.path.split("/")[-2] for key in g.keys] for g in groups]
    assert names == [["gate", "up"], ["down"]] * 3 + [["head"]]
    blocks = [name for name, _ in program(fn, params, *batch).blocks]
    assert blocks == [f"params/layers_{i}" for i in range(3)] + ["params/head/kernel"]


@pytest.mark.parametrize("name", ["unrolled", "scanned"])
def test_equal_layers_are_one_function(name):
    fn, params, batch = CASES[name]
    groups = program(fn, params, *batch).groups
    kinds = [hash(g.segment.structure) for g in groups]
    # the first layer begins with the input; the others are alike
    assert kinds[2] == kinds[4]
    assert kinds[3] == kinds[5] == kinds[1]
    assert len({kinds[1], kinds[2]}) == 2


def test_a_constant_inside_makes_another_function():
    def fn(params, x):
        y = jnp.tanh(x @ params["a_0"]) * 2.0
        return jnp.tanh(y @ params["a_1"]) * 3.0 @ params["a_2"]

    params = random_params(a_0=(8, 8), a_1=(8, 8), a_2=(8, 8))
    _, one, two = program(fn, params, X).groups
    assert one.segment.structure != two.segment.structure


def test_slices_of_a_scan_are_weights_of_their_own():
    fn, params, batch = CASES["scanned"]
    keys = [key for group in program(fn, params, *batch).groups for key in group.keys]
    path = "params/layers/down/kernel"
    assert [k for k in keys if k.path == path] == [Key(path, (i,)) for i in range(3)]
    assert str(Key(path, (1,))) == f"{path}[1]"


def test_what_is_in_several_places_or_out_of_reach_is_named():
    def fn(params, x):
        y = params["table"][jnp.asarray([1, 2])] + x @ params["twice"]
        return jnp.tanh(y @ params["twice"]) @ params["once"]

    params = random_params(table=(8, 8), twice=(8, 8), once=(8, 8))
    cut = program(fn, params, X[:2])
    assert [k.path for g in cut.groups for k in g.keys] == ["once"]
    assert cut.skipped["twice"] == "2 products at different places share it"
    assert cut.skipped["table"] == "it is looked up, not multiplied with"
    fn, params, batch = CASES["branch"]
    cut = program(fn, params, *batch)
    assert cut.skipped == dict.fromkeys(
        "ab", "its product is inside a loop or a branch"
    )


def test_only_live_values_are_kept():
    fn, params, batch = CASES["unrolled"]
    groups = program(fn, params, *batch).groups
    for group in groups:
        sizes = [v.aval.shape for v in group.live]
        assert len(sizes) <= 3, "the stream, an activation, and a product's result"


def test_blocks_may_be_named():
    key = Key("params/encoder/3/mlp/up")
    assert block_name(key, ()) == "params/encoder/3"
    assert block_name(key, ("encoder",)) == "encoder"
    assert block_name(Key("layers/up", (2,)), ()) == "step 2"
    assert block_name(Key("dense/kernel"), ()) == "dense/kernel"
