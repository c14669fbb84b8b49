"""The functions that the lift must find its way through: one row each in `CASES`.

A row names a builder of (function, parameters, arguments) and the sites that
`jaxq.sites` must find, with contracting axes in the coordinates of the stored
parameter. Shapes repeat on purpose: equal shapes share compiled code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

D, F, H, B, T = 64, 32, 4, 3, 5  # width, features, heads, batch, tokens


class Example(NamedTuple):
    """A function with something to call it with: fn(params, *args, **kwargs)."""

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = {}


SiteKey = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Case:
    """One row.

    Attributes:
        name: What the row covers.
        build: Makes the example; called once.
        sites: Per parameter path, the (op, contracting axes) of each of its sites.
            None where finding a site is as good as falling back.
        quantize: Per parameter path, the axes to quantize along. Defaults to the
            contracting axes of the first site of each parameter in `sites`.
        stacked: Per parameter path, the axes that enumerate independent weights:
            loops, indices and batch dimensions consume them.
        fallback: Paths that have a use without a fused rule: `explain` lists them.
        dots: Parameters that every float dot_general of the quantized function has.
        reverse: Whether the float function has a reverse-mode derivative.
    """

    name: str
    build: Callable[[], Example]
    sites: Mapping[str, tuple[SiteKey, ...]] | None
    quantize: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stacked: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    fallback: tuple[str, ...] = ()
    dots: Mapping[str, Any] = field(default_factory=dict)
    reverse: bool = True

    def axes(self) -> dict[str, tuple[int, ...]]:
        """The axes along which each chosen parameter is quantized."""
        found = {path: keys[0][1] for path, keys in (self.sites or {}).items()}
        return {**found, **self.quantize}

    def example(self) -> Example:
        """The built example, the same object on every call."""
        return _built(self.build)


@cache
def _built(build: Callable[[], Example]) -> Example:
    return build()


def dot(*contracting: int) -> SiteKey:
    """A dot_general that sums over these axes of the parameter."""
    return ("dot_general", contracting)


def conv(*contracting: int) -> SiteKey:
    """A convolution: window and input-feature axes of the kernel."""
    return ("conv_general_dilated", contracting)


def ragged(*contracting: int) -> SiteKey:
    """A ragged_dot over groups of rows, one matrix each."""
    return ("ragged_dot", contracting)


# Rows looked up in a table: what counts is the axis of a row.
GATHER: SiteKey = ("gather", (1,))


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    """Gaussian numbers that depend on the shape and the seed alone."""
    values = np.random.default_rng([seed, *shape]).normal(size=shape)
    return jnp.asarray(0.3 * values, dtype)


def x2(dtype: Any = jnp.float32) -> jax.Array:
    """Activations [B, D]."""
    return normal(B, D, seed=99, dtype=dtype)


def x3() -> jax.Array:
    """Activations [B, T, D]."""
    return normal(B, T, D, seed=98)


def ids() -> jax.Array:
    """Token ids [B, T], below 32."""
    return jnp.asarray(np.random.default_rng(1).integers(0, 32, (B, T)), jnp.int32)


def plain(fn: Callable[..., Any], *args: Any, **params: Any) -> Example:
    """A function of a flat dictionary of parameters."""
    return Example(fn, params, args or (x2(),))


def filled(abstract: Any) -> Any:
    """The tree with numbers for its shapes; initializers take long to compile."""
    leaves, tree = jax.tree.flatten(abstract)
    arrays = [
        normal(*leaf.shape, seed=i) if hasattr(leaf, "shape") else leaf
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, arrays)


def linen(module: nn.Module, *args: Any, **kwargs: Any) -> Example:
    """A Linen module with numbers in its parameters, and no time spent in `init`."""
    shapes = jax.eval_shape(partial(module.init, **kwargs), jax.random.key(0), *args)
    return Example(module.apply, filled(shapes), args, kwargs)


# ------------------------------------------------------------- products, every way


def matmul() -> Example:
    return plain(lambda p, x: x @ p["w"], w=normal(D, F))


def matmul_batched_activation() -> Example:
    return plain(lambda p, x: x @ p["w"], x3(), w=normal(D, F))


def matmul_vector() -> Example:
    return plain(lambda p, x: x @ p["w"], normal(D, seed=99), w=normal(D, F))


def matmul_weight_left() -> Example:
    return plain(lambda p, x: p["w"] @ x.T, w=normal(F, D))


def jnp_dot() -> Example:
    return plain(lambda p, x: jnp.dot(x, p["w"]), w=normal(D, F))


def transposed() -> Example:
    return plain(lambda p, x: x @ p["w"].T, w=normal(F, D))


def einsum_right() -> Example:
    return plain(
        lambda p, x: jnp.einsum("btd,dhk->bthk", x, p["w"]), x3(), w=normal(D, H, 8)
    )


def einsum_left() -> Example:
    return plain(lambda p, x: jnp.einsum("df,bd->bf", p["w"], x), w=normal(D, F))


def einsum_three() -> Example:
    def fn(p, x):
        return jnp.einsum("bd,df,fe->be", x, p["up"], p["down"])

    return plain(fn, up=normal(D, F), down=normal(F, D))


def einsum_three_gate() -> Example:
    def fn(p, x):
        return jnp.einsum("bd,df,f->bf", x, p["w"], p["gate"])

    return plain(fn, w=normal(D, F), gate=normal(F))


def einsum_experts() -> Example:
    def fn(p, x):
        return jnp.einsum("btd,edf->betf", x, p["w"])

    return plain(fn, x3(), w=normal(2, D, F))


def einsum_batched() -> Example:
    def fn(p, x):
        return jnp.einsum("ebd,edf->ebf", x, p["w"])

    return plain(fn, normal(2, B, D, seed=9), w=normal(2, D, F))


def two_axes() -> Example:
    def fn(p, x):
        return jnp.einsum("bhk,hkd->bd", x, p["w"])

    return plain(fn, normal(B, H, 8, seed=9), w=normal(H, 8, D))


def tensordot() -> Example:
    def fn(p, x):
        return jnp.tensordot(x, p["w"], axes=((1, 2), (0, 1)))

    return plain(fn, normal(B, H, 8, seed=9), w=normal(H, 8, D))


def inner() -> Example:
    return plain(lambda p, x: jnp.inner(x, p["w"]), w=normal(F, D))


def vector_weight() -> Example:
    return plain(lambda p, x: x @ p["v"], v=normal(D))


def left_transposed() -> Example:
    return plain(lambda p, x: p["w"].T @ x.T, w=normal(D, F))


def bfloat16_preferred() -> Example:
    def fn(p, x):
        dims = (((1,), (0,)), ((), ()))
        return lax.dot_general(x, p["w"], dims, preferred_element_type=jnp.float32)

    return plain(fn, x2(jnp.bfloat16), w=normal(D, F, dtype=jnp.bfloat16))


def precision_highest() -> Example:
    def fn(p, x):
        return jnp.matmul(x, p["w"], precision=lax.Precision.HIGHEST)

    return plain(fn, w=normal(D, F))


def bfloat16_both() -> Example:
    w = normal(D, F, dtype=jnp.bfloat16)
    return plain(lambda p, x: x @ p["w"], x2(jnp.bfloat16), w=w)


def stored_bfloat16() -> Example:
    def fn(p, x):
        return x @ p["w"].astype(jnp.float32)

    return plain(fn, w=normal(D, F, dtype=jnp.bfloat16))


# ----------------------------------------------- what happens to a weight on its way


def cast() -> Example:
    def fn(p, x):
        return x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)

    return plain(fn, w=normal(D, F))


def reshaped_features() -> Example:
    return plain(lambda p, x: x @ p["w"].reshape(D, F), w=normal(D, H, 8))


def reshaped_contraction() -> Example:
    def fn(p, x):
        return x.reshape(B * T, F) @ p["w"].reshape(F, D)

    return plain(fn, normal(B, T, H, 8, seed=9), w=normal(H, 8, D))


def split_contraction() -> Example:
    def fn(p, x):
        return jnp.einsum("bhk,hkf->bf", x.reshape(B, H, 16), p["w"].reshape(H, 16, F))

    return plain(fn, w=normal(D, F))


def reshaped_transposed() -> Example:
    def fn(p, x):
        w = p["w"].transpose(2, 0, 1).reshape(D, F)
        return x @ w

    return plain(fn, w=normal(H, 8, D))


def swapped_axes() -> Example:
    return plain(lambda p, x: x @ jnp.swapaxes(p["w"], 0, 1), w=normal(F, D))


def expanded() -> Example:
    def fn(p, x):
        return jnp.matmul(x, p["w"][None])[0]

    return plain(fn, w=normal(D, F))


def fused_qkv_sliced_after() -> Example:
    def fn(p, x):
        q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)
        return jax.nn.softmax(q @ k.swapaxes(-1, -2), axis=-1) @ v

    return plain(fn, x3(), qkv=normal(D, 96))


def fused_qkv_split_before() -> Example:
    def fn(p, x):
        q, k, v = (x @ w for w in jnp.split(p["qkv"], 3, axis=1))
        return jax.nn.softmax(q @ k.swapaxes(-1, -2), axis=-1) @ v

    return plain(fn, x3(), qkv=normal(D, 96))


def sliced_contraction() -> Example:
    def fn(p, x):
        return x[:, :20] @ p["w"][:20] + x[:, 20:] @ p["w"][20:]

    return plain(fn, w=normal(D, F))


def strided_slice() -> Example:
    return plain(lambda p, x: x @ p["w"][:, ::2], w=normal(D, F))


def indexed_statically() -> Example:
    def fn(p, x):
        for layer in range(2):
            x = jnp.tanh(x @ p["ws"][layer])
        return x

    return plain(fn, ws=normal(2, D, D))


def used_twice() -> Example:
    return plain(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], w=normal(D, D))


def used_both_ways() -> Example:
    return plain(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, w=normal(D, F))


def low_rank_beside() -> Example:
    def fn(p, x):
        return x @ p["w"] + (x @ p["a"]) @ p["b"]

    return plain(fn, w=normal(D, F), a=normal(D, 2), b=normal(2, F))


def both_parameters() -> Example:
    return plain(lambda p, x: x @ (p["w"] @ p["v"]), w=normal(D, F), v=normal(F, D))


def scaled_elementwise() -> Example:
    def fn(p, x):
        return x @ (p["w"] * p["gain"][:, None])

    return plain(fn, w=normal(D, F), gain=normal(D))


def masked() -> Example:
    def fn(p, x):
        keep = (jnp.arange(D)[:, None] + jnp.arange(F)[None]) % 2 == 0
        return x @ jnp.where(keep, p["w"], jnp.zeros_like(p["w"]))

    return plain(fn, w=normal(D, F))


def concatenated() -> Example:
    def fn(p, x):
        return x @ jnp.concatenate([p["w"], p["v"]], axis=1)

    return plain(fn, w=normal(D, F), v=normal(D, F, seed=1))


def broadcast() -> Example:
    def fn(p, x):
        w = jnp.broadcast_to(p["w"], (B, D, F))
        return jnp.einsum("btd,bdf->btf", x, w)

    return plain(fn, x3(), w=normal(D, F))


def sharding_constraint() -> Example:
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    columns = NamedSharding(mesh, P(None, "model"))

    def fn(p, x):
        return x @ lax.with_sharding_constraint(p["w"], columns)

    return plain(fn, w=normal(D, F))


def chosen_by_mask() -> Example:
    def fn(p, x, flag):
        return x @ jnp.where(flag, p["w"], p["v"])

    return plain(fn, x2(), jnp.array(True), w=normal(D, F), v=normal(D, F, seed=1))


def chosen_by_cond() -> Example:
    def fn(p, x, flag):
        return x @ lax.cond(flag, lambda: p["w"], lambda: p["v"])

    return plain(fn, x2(), jnp.array(False), w=normal(D, F), v=normal(D, F, seed=1))


def chosen_experts() -> Example:
    """Mixture of experts by lookup: every row of the batch takes its own matrix."""

    def fn(p, x, which):
        return jnp.einsum("bd,bdf->bf", x, p["experts"][which])

    return plain(fn, x2(), jnp.array([1, 0, 1]), experts=normal(2, D, F))


def returned() -> Example:
    return plain(lambda p, x: (x @ p["w"], p["w"]), w=normal(D, F))


def returned_transposed() -> Example:
    return plain(lambda p, x: {"y": x @ p["w"], "wt": p["w"].T}, w=normal(D, F))


def norm_penalty() -> Example:
    def fn(p, x):
        return x @ p["w"], jnp.sum(p["w"] ** 2)

    return plain(fn, w=normal(D, F))


def broadcast_bias() -> Example:
    return plain(lambda p, x: x @ p["w"] + p["b"], w=normal(D, F), b=normal(F))


def unused() -> Example:
    return plain(lambda p, x: x @ p["w"], w=normal(D, F), spare=normal(D, F, seed=1))


def untouched_input() -> Example:
    return plain(lambda p, x: (x, x @ p["w"]), w=normal(D, F))


# ---------------------------------------------------------------------- control flow


def cond() -> Example:
    def fn(p, x, flag):
        return lax.cond(flag, lambda h: h @ p["w"], lambda h: jnp.sin(h @ p["v"]), x)

    return plain(fn, x2(), jnp.array(True), w=normal(D, F), v=normal(D, F, seed=1))


def switch() -> Example:
    def fn(p, x, which):
        branches = [
            lambda h: h @ p["w"],
            lambda h: h[:, :F],
            lambda h: h @ p["w"] + p["b"],
        ]
        return lax.switch(which, branches, x)

    return plain(fn, x2(), jnp.array(2), w=normal(D, F), b=normal(F))


def while_loop() -> Example:
    def fn(p, x, steps):
        def body(carry):
            i, h = carry
            return i + 1, jnp.tanh(h @ p["w"])

        return lax.while_loop(lambda carry: carry[0] < steps, body, (0, x))[1]

    return plain(fn, x2(), jnp.array(3), w=normal(D, D))


def while_condition() -> Example:
    def fn(p, x):
        def keep_going(carry):
            i, h = carry
            return (i < 3) & (jnp.sum(h @ p["stop"]) < 1e6)

        def body(carry):
            i, h = carry
            return i + 1, jnp.tanh(h @ p["w"])

        return lax.while_loop(keep_going, body, (0, x))[1]

    return plain(fn, w=normal(D, D), stop=normal(D, F))


def while_carried() -> Example:
    def fn(p, x):
        def body(carry):
            i, h, w = carry
            return i + 1, jnp.tanh(h @ w), w

        return lax.while_loop(lambda c: c[0] < 3, body, (0, x, p["w"]))[1]

    return plain(fn, w=normal(D, D))


def fori_loop() -> Example:
    def fn(p, x):
        return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"]), x)

    return plain(fn, w=normal(D, D))


def fori_loop_layers() -> Example:
    def fn(p, x):
        def body(i, h):
            return jnp.tanh(h @ lax.dynamic_index_in_dim(p["ws"], i, keepdims=False))

        return lax.fori_loop(0, 2, body, x)

    return plain(fn, ws=normal(2, D, D))


def dynamic_index() -> Example:
    def fn(p, x, i):
        return x @ lax.dynamic_index_in_dim(p["ws"], i, axis=0, keepdims=False)

    return plain(fn, x2(), jnp.array(1), ws=normal(2, D, D))


def dynamic_column_slice() -> Example:
    def fn(p, x, i):
        return x @ lax.dynamic_slice_in_dim(p["w"], i, 16, axis=1)

    return plain(fn, x2(), jnp.array(5), w=normal(D, F))


def scan_layers() -> Example:
    def fn(p, x):
        def body(h, layer):
            return jnp.tanh(h @ layer["w"] + layer["b"]), jnp.sum(h)

        return lax.scan(body, x, p)

    return plain(fn, w=normal(2, D, D), b=normal(2, D))


def scan_reversed_unrolled() -> Example:
    def fn(p, x):
        def body(h, w):
            return jnp.tanh(h @ w), None

        return lax.scan(body, x, p["w"], reverse=True, unroll=2)[0]

    return plain(fn, w=normal(2, D, D))


def scan_constant() -> Example:
    """A recurrent cell: the weight is the same in every step, the inputs are not."""

    def fn(p, x):
        def step(h, xt):
            h = jnp.tanh(h @ p["w"] + xt)
            return h, h

        return lax.scan(step, jnp.zeros((B, D)), x.swapaxes(0, 1))

    return plain(fn, x3(), w=normal(D, D))


def scan_carried() -> Example:
    def fn(p, x):
        def step(carry, _):
            h, w = carry
            return (jnp.tanh(h @ w), w), None

        return lax.scan(step, (x, p["w"]), None, length=2)[0][0]

    return plain(fn, w=normal(D, D))


def scan_same_shapes() -> Example:
    """Constant, carry and one layer have one shape, and as many layers as rows."""

    def fn(p, x):
        def step(carry, layer):
            return jnp.tanh(carry @ p["w"]) @ layer, carry

        return lax.scan(step, x, p["ws"])

    return plain(fn, normal(4, 4, seed=9), w=normal(4, 4), ws=normal(4, 4, 4))


def scan_nested() -> Example:
    def fn(p, x):
        def inner(h, w):
            return jnp.tanh(h @ w), None

        def outer(h, ws):
            return lax.scan(inner, h, ws)[0], None

        return lax.scan(outer, x, p["w"])[0]

    return plain(fn, w=normal(2, 2, D, D))


def scan_last_axis() -> Example:
    """Layers stacked on the last axis and moved to the front before the scan."""

    def fn(p, x):
        def body(h, w):
            return jnp.tanh(h @ w), None

        return lax.scan(body, x, jnp.moveaxis(p["w"], -1, 0))[0]

    return plain(fn, w=normal(D, D, 2))


def scan_and_index() -> Example:
    """Layers are scanned, and the first one is used once more by itself."""

    def fn(p, x):
        def body(h, w):
            return jnp.tanh(h @ w), None

        return lax.scan(body, x, p["ws"])[0] @ p["ws"][0]

    return plain(fn, ws=normal(2, D, D))


def scan_emits_weight() -> Example:
    def fn(p, x):
        def body(h, w):
            return jnp.tanh(h @ w), w[0]

        return lax.scan(body, x, p["ws"])

    return plain(fn, ws=normal(2, D, D))


def lax_map() -> Example:
    return plain(lambda p, x: lax.map(lambda row: row @ p["w"], x), w=normal(D, F))


def associative_scan() -> Example:
    def fn(p, x):
        return lax.associative_scan(jnp.add, x @ p["w"], axis=1)

    return plain(fn, x3(), w=normal(D, F))


def ragged_dot() -> Example:
    def fn(p, x, sizes):
        return lax.ragged_dot(x, p["experts"], sizes)

    sizes = jnp.array([1, 0, 2], jnp.int32)
    return plain(fn, x2(), sizes, experts=normal(3, D, F))


# ------------------------------------------------------------------- transformations


@jax.custom_vjp
def half_gradient(x, w):
    """A product whose gradient is, on purpose, half the true one."""
    return x @ w


half_gradient.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda saved, g: (0.5 * g @ saved[1].T, 0.5 * saved[0].T @ g),
)


@jax.custom_jvp
def double_tangent(x, w):
    """A product whose tangent is, on purpose, twice the true one."""
    return x @ w


@double_tangent.defjvp
def _double_tangent_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, 2.0 * (dx @ w + x @ dw)


def custom_vjp() -> Example:
    return plain(lambda p, x: half_gradient(x, p["w"]), w=normal(D, F))


def custom_jvp() -> Example:
    return plain(lambda p, x: double_tangent(x, p["w"]), w=normal(D, F))


def shared_jit_helper() -> Example:
    """A jitted helper, traced once and called with two weights."""
    helper = jax.jit(lambda x, w: jnp.tanh(x @ w))

    def fn(p, x):
        return helper(helper(x, p["w"]), p["v"])

    return plain(fn, w=normal(D, D), v=normal(D, D, seed=1))


def jitted_static_argument() -> Example:
    @partial(jax.jit, static_argnames=("mode",))
    def fn(p, x, mode="tanh"):
        h = x @ p["w"]
        return jnp.tanh(h) if mode == "tanh" else h

    return Example(fn, {"w": normal(D, F)}, (x2(),), {"mode": "none"})


def vmap_activations() -> Example:
    return plain(lambda p, x: jax.vmap(lambda row: row @ p["w"])(x), w=normal(D, F))


def vmap_weights() -> Example:
    def fn(p, x):
        return jax.vmap(lambda h, w: h @ w)(x, p["w"])

    return plain(fn, normal(2, B, D, seed=9), w=normal(2, D, F))


def vmap_ensemble() -> Example:
    """One input, many weights: the batch axis is the weight's alone."""

    def fn(p, x):
        return jax.vmap(lambda w: x @ w)(p["w"])

    return plain(fn, w=normal(2, D, F))


def checkpoint_policy() -> Example:
    def fn(p, x):
        policy = jax.checkpoint_policies.dots_saveable
        block = jax.checkpoint(lambda h, w: jnp.sin(h @ w), policy=policy)
        return block(block(x, p["w"]), p["w"])

    return plain(fn, w=normal(D, D))


def inner_gradient() -> Example:
    """A function that differentiates: an energy model returns its force."""

    def fn(p, x):
        return jax.grad(lambda h: jnp.sum(jnp.tanh(h @ p["w"])))(x)

    return plain(fn, w=normal(D, F))


def shard_mapped() -> Example:
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(p, x):
        local = jax.shard_map(
            lambda h, w: h @ w,
            mesh=mesh,
            in_specs=(P(), P(None, "model")),
            out_specs=P(None, "model"),
        )
        return local(x, p["w"])

    return plain(fn, w=normal(D, F))


# --------------------------------------------------------- arguments, results, trees


def gathered() -> Example:
    return plain(lambda p, t: p["table"][t], ids(), table=normal(32, D))


def taken() -> Example:
    def fn(p, t):
        return jnp.take(p["table"], t, axis=0)

    return plain(fn, ids(), table=normal(32, D))


def taken_columns() -> Example:
    def fn(p, t):
        return jnp.take(p["table"], t, axis=1)

    return plain(fn, ids(), table=normal(D, 32))


def gathered_numbers() -> Example:
    """A table of numbers, as of relative positions: its rows have no axis."""
    return plain(lambda p, t: p["bias"][t], ids(), bias=normal(32))


def one_hot() -> Example:
    def fn(p, t):
        return jax.nn.one_hot(t, 32) @ p["table"]

    return plain(fn, ids(), table=normal(32, D))


def tied_plain() -> Example:
    def fn(p, t):
        return jnp.tanh(p["table"][t]) @ p["table"].T

    return plain(fn, ids(), table=normal(32, D))


def closed_over() -> Example:
    constant, projection = np.float32(2.0) * np.ones(F, np.float32), normal(F, D)

    def fn(p, x):
        return (x @ p["w"] * constant) @ projection

    return plain(fn, w=normal(D, F))


def keyword_arguments() -> Example:
    def fn(p, *, x, scale):
        return x @ p["w"] * scale

    return Example(fn, {"w": normal(D, F)}, (), {"x": x2(), "scale": normal(F)})


def static_arguments() -> Example:
    def fn(p, x, scale, mode="sin", flag=False):
        h = x @ p["w"] * scale
        h = jnp.sin(h) if mode == "sin" else h
        return -h if flag else h

    params = {"w": normal(D, F)}
    return Example(fn, params, (x2(), 0.5, "sin"), {"flag": True})


def none_leaves() -> Example:
    def fn(p, x, mask):
        h = x @ p["w"]
        h = h if p["b"] is None else h + p["b"]
        return h if mask is None else h * mask

    return plain(fn, x2(), None, w=normal(D, F), b=None)


def static_leaves() -> Example:
    def fn(p, x):
        h = x @ p["w"]
        return jnp.tanh(h) if p["activation"] == "tanh" else h

    return plain(fn, w=normal(D, F), activation="tanh")


def nested_parameters() -> Example:
    def fn(p, x):
        for layer in p["layers"]:
            x = jnp.tanh(x @ layer["w"])
        return x @ p["head"][0]

    layers = [{"w": normal(D, D)}, {"w": normal(D, D, seed=1)}]
    return plain(fn, layers=layers, head=(normal(D, F),))


def bare_parameter() -> Example:
    """The parameters are one array, whose path is empty."""
    return Example(lambda w, x: x @ w, normal(D, F), (x2(),))


class Outputs(NamedTuple):
    """A result that is a tree."""

    hidden: Any
    aux: Any


def nested_outputs() -> Example:
    def fn(p, x):
        h = x @ p["w"]
        return Outputs(h, {"pair": [h + 1, (jnp.argmax(h, -1), None)], "n": B})

    return plain(fn, w=normal(D, F))


def random_key() -> Example:
    def fn(p, x, key):
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.where(keep, x, jnp.zeros_like(x)) @ p["w"]

    return plain(fn, x2(), jax.random.key(3), w=normal(D, F))


def numpy_leaves() -> Example:
    x = np.asarray(x2())
    return plain(lambda p, x: x @ p["w"] + p["b"], x, w=normal(D, F), b=np.ones(F, "f"))


def debug_callback() -> Example:
    def fn(p, x):
        jax.debug.callback(lambda mean: None, x.mean())
        return x @ p["w"]

    return plain(fn, w=normal(D, F))


# ----------------------------------------------------------------------------- Linen


def linen_dense() -> Example:
    return linen(nn.Dense(F), x2())


def linen_dense_bfloat16() -> Example:
    return linen(nn.Dense(F, dtype=jnp.bfloat16), x2())


def linen_dense_general() -> Example:
    return linen(nn.DenseGeneral((H, 8)), x3())


def linen_dense_general_out() -> Example:
    return linen(nn.DenseGeneral(D, axis=(-2, -1)), normal(B, T, H, 8, seed=9))


def linen_einsum() -> Example:
    return linen(nn.Einsum((D, H, 8), "btd,dhk->bthk", use_bias=False), x3())


def linen_conv() -> Example:
    return linen(nn.Conv(8, (3, 3)), normal(1, 6, 6, 16, seed=9))


def linen_conv_1d_strided() -> Example:
    return linen(nn.Conv(8, (3,), strides=2, padding="VALID"), normal(2, 9, 16, seed=9))


def linen_conv_depthwise() -> Example:
    module = nn.Conv(16, (3, 3), feature_group_count=16, use_bias=False)
    return linen(module, normal(1, 6, 6, 16, seed=9))


def linen_conv_transpose() -> Example:
    return linen(nn.ConvTranspose(8, (3, 3)), normal(1, 4, 4, 16, seed=9))


def linen_attention() -> Example:
    return linen(nn.MultiHeadDotProductAttention(num_heads=H), x3(), x3())


def linen_batch_norm() -> Example:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(nn.Dense(F)(x))

    built = linen(Net(), x2())
    return built._replace(kwargs={"mutable": ["batch_stats"]})


def linen_lstm() -> Example:
    return linen(nn.RNN(nn.LSTMCell(8)), normal(B, T, D, seed=9))


class TiedEmbedding(nn.Module):
    """Looked up at the bottom, contracted at the top."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(32, D)
        return embed.attend(nn.LayerNorm()(embed(tokens)))


def linen_embed_attend() -> Example:
    return linen(TiedEmbedding(), ids())


class Block(nn.Module):
    """A residual MLP in the form that nn.scan wants."""

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        return x + nn.Dense(D)(nn.gelu(nn.Dense(F)(h))), None


class JittedBlock(nn.Module):
    """Two layers that share one compiled block."""

    @nn.compact
    def __call__(self, x):
        block = nn.jit(Block)
        return block(name="a")(block(name="b")(x)[0])[0]


def linen_jit() -> Example:
    return linen(JittedBlock(), x2())


class ScannedStack(nn.Module):
    """Rematerialized layers, stacked on axis 0."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(32, D)
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True},
            length=2,
        )  # fmt: skip
        x, _ = layers(name="layers")(embed(tokens), None)
        return embed.attend(x)


def linen_scan_remat() -> Example:
    return linen(ScannedStack(), ids())


# ------------------------------------------------------------------------------- NNX


def nnx_split(make: Callable[[], Any], *args: Any) -> Example:
    """A split NNX module: its state is the parameter tree."""
    graph, state = nnx.split(nnx.eval_shape(make))

    def fn(state, *inputs):
        return nnx.merge(graph, state)(*inputs)

    return Example(fn, filled(state), args)


def nnx_linear() -> Example:
    return nnx_split(lambda: nnx.Linear(D, F, rngs=nnx.Rngs(0)), x2())


def nnx_pure_dict() -> Example:
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: nnx.Linear(D, F, rngs=nnx.Rngs(0)))
    )
    state = filled(abstract)

    def fn(pure, x):
        full = nnx.clone(state)
        nnx.replace_by_pure_dict(full, pure)
        return nnx.merge(graph, full)(x)

    return Example(fn, nnx.to_pure_dict(state), (x2(),))


def nnx_linear_general() -> Example:
    make = partial(nnx.LinearGeneral, (H, 8), D, axis=(-2, -1))
    return nnx_split(lambda: make(rngs=nnx.Rngs(0)), normal(B, T, H, 8, seed=9))


def nnx_embed() -> Example:
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(32, D, rngs=rngs)

        def __call__(self, tokens):
            return self.embed.attend(jnp.tanh(self.embed(tokens)))

    return nnx_split(lambda: Tied(nnx.Rngs(0)), ids())


def nnx_conv() -> Example:
    make = partial(nnx.Conv, 16, 8, (3, 3))
    return nnx_split(lambda: make(rngs=nnx.Rngs(0)), normal(1, 6, 6, 16, seed=9))


def nnx_scan() -> Example:
    class Stack(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=2)
            @nnx.vmap(in_axes=0, out_axes=0)
            def make(rngs):
                return nnx.Linear(D, D, rngs=rngs)

            self.layers = make(rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def forward(x, layer):
                return jnp.tanh(layer(x))

            return forward(x, self.layers)

    return nnx_split(lambda: Stack(nnx.Rngs(0)), x2())


# ---------------------------------------------------------------------------- Haiku


def haiku_mlp() -> Example:
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([F, D])(x)))
    shapes = jax.eval_shape(net.init, jax.random.key(0), x2())
    return Example(net.apply, filled(shapes), (x2(),))


# -------------------------------------------------------------------------- Equinox


def eqx_model(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """An Equinox module with numbers in its arrays."""
    make = partial(layer, *args, key=jax.random.key(0), **kwargs)
    return filled(eqx.filter_eval_shape(make))


def equinox_linear() -> Example:
    model = eqx_model(eqx.nn.Linear, D, F)
    return Example(lambda m, x: jax.vmap(m)(x), model, (x2(),))


def equinox_conv() -> Example:
    model = eqx_model(eqx.nn.Conv2d, 16, 8, 3)
    x = normal(1, 16, 6, 6, seed=9)
    return Example(lambda m, x: jax.vmap(m)(x), model, (x,))


def equinox_embedding() -> Example:
    model = eqx_model(eqx.nn.Embedding, 32, D)
    return Example(lambda m, t: jax.vmap(jax.vmap(m))(t), model, (ids(),))


def equinox_mlp() -> Example:
    model = eqx_model(eqx.nn.MLP, D, F, D, depth=1)
    arrays, static = eqx.partition(model, eqx.is_array)

    def fn(arrays, x):
        return jax.vmap(eqx.combine(arrays, static))(x)

    return Example(fn, arrays, (x2(),))


# -------------------------------------------------------------------------- the table

PRODUCTS: tuple[Case, ...] = (
    Case("matmul", matmul, {"w": (dot(0),)}),
    Case("matmul-batched", matmul_batched_activation, {"w": (dot(0),)}),
    Case("matmul-vector", matmul_vector, {"w": (dot(0),)}),
    Case("matmul-weight-left", matmul_weight_left, {"w": (dot(1),)}),
    Case("jnp-dot", jnp_dot, {"w": (dot(0),)}),
    Case("transposed", transposed, {"w": (dot(1),)}),
    Case("einsum-right", einsum_right, {"w": (dot(0),)}),
    Case("einsum-left", einsum_left, {"w": (dot(0),)}),
    Case("einsum-three", einsum_three, {"up": (dot(0),), "down": (dot(0),)}),
    Case("einsum-three-gate", einsum_three_gate, {"w": (dot(0),)}),
    Case("einsum-experts", einsum_experts, {"w": (dot(1),)}),
    Case("einsum-batched", einsum_batched, {"w": (dot(1),)}, stacked={"w": (0,)}),
    Case("two-axes", two_axes, {"w": (dot(0, 1),)}),
    Case("tensordot", tensordot, {"w": (dot(0, 1),)}),
    Case("inner", inner, {"w": (dot(1),)}),
    Case("vector-weight", vector_weight, {"v": (dot(0),)}),
    Case("left-transposed", left_transposed, {"w": (dot(0),)}),
    Case(
        "bfloat16-preferred-float32",
        bfloat16_preferred,
        {"w": (dot(0),)},
        dots={"preferred_element_type": np.dtype("float32")},
    ),
    Case(
        "precision-highest",
        precision_highest,
        {"w": (dot(0),)},
        dots={"precision": (lax.Precision.HIGHEST, lax.Precision.HIGHEST)},
    ),
    Case("bfloat16", bfloat16_both, {"w": (dot(0),)}),
    Case("stored-bfloat16", stored_bfloat16, {"w": (dot(0),)}),
)

VIEWS: tuple[Case, ...] = (
    Case("cast", cast, {"w": (dot(0),)}),
    Case("reshaped-features", reshaped_features, {"w": (dot(0),)}),
    Case("reshaped-contraction", reshaped_contraction, {"w": (dot(0, 1),)}),
    Case("split-contraction", split_contraction, {"w": (dot(0),)}),
    Case("reshaped-transposed", reshaped_transposed, {"w": (dot(2),)}),
    Case("swapped-axes", swapped_axes, {"w": (dot(1),)}),
    Case("expanded", expanded, {"w": (dot(0),)}),
    Case("fused-qkv-sliced-after", fused_qkv_sliced_after, {"qkv": (dot(0),)}),
    Case("fused-qkv-split-before", fused_qkv_split_before, {"qkv": (dot(0),)}),
    Case("sliced-contraction", sliced_contraction, {"w": (dot(0),)}),
    Case("strided-slice", strided_slice, {"w": (dot(0),)}),
    Case(
        "indexed-statically",
        indexed_statically,
        {"ws": (dot(1),)},
        stacked={"ws": (0,)},
    ),
    Case("used-twice", used_twice, {"w": (dot(0),)}),
    Case("used-both-ways", used_both_ways, {"w": (dot(0), dot(1))}),
    Case(
        "low-rank-beside",
        low_rank_beside,
        {"w": (dot(0),), "a": (dot(0),), "b": (dot(0),)},
    ),
    Case("both-parameters", both_parameters, None, quantize={"w": (0,), "v": (0,)}),
    Case(
        "scaled-elementwise",
        scaled_elementwise,
        {},
        quantize={"w": (0,)},
        fallback=("w",),
    ),
    Case("masked", masked, {}, quantize={"w": (0,)}, fallback=("w",)),
    Case("concatenated", concatenated, None, quantize={"w": (0,), "v": (0,)}),
    Case("broadcast", broadcast, None, quantize={"w": (0,)}),
    Case("sharding-constraint", sharding_constraint, {"w": (dot(0),)}),
    Case("chosen-by-mask", chosen_by_mask, None, quantize={"w": (0,), "v": (0,)}),
    Case("chosen-by-cond", chosen_by_cond, None, quantize={"w": (0,), "v": (0,)}),
    Case("chosen-experts", chosen_experts, None, quantize={"experts": (1,)}),
    Case("returned", returned, {"w": (dot(0),)}),
    Case("returned-transposed", returned_transposed, {"w": (dot(0),)}),
    Case("norm-penalty", norm_penalty, {"w": (dot(0),)}, fallback=("w",)),
    Case(
        "broadcast-bias",
        broadcast_bias,
        {"w": (dot(0),)},
        quantize={"b": (0,)},
        fallback=("b",),
    ),
    Case("unused", unused, {"w": (dot(0),)}, quantize={"spare": (0,)}),
    Case("untouched-input", untouched_input, {"w": (dot(0),)}),
)

CONTROL_FLOW: tuple[Case, ...] = (
    Case("cond", cond, {"w": (dot(0),), "v": (dot(0),)}),
    Case("switch", switch, {"w": (dot(0),)}),
    Case("while", while_loop, {"w": (dot(0),)}, reverse=False),
    Case(
        "while-condition",
        while_condition,
        {"w": (dot(0),), "stop": (dot(0),)},
        reverse=False,
    ),
    Case("while-carried", while_carried, None, quantize={"w": (0,)}, reverse=False),
    Case("fori-loop", fori_loop, {"w": (dot(0),)}),
    Case("fori-loop-layers", fori_loop_layers, {"ws": (dot(1),)}, stacked={"ws": (0,)}),
    Case("dynamic-index", dynamic_index, {"ws": (dot(1),)}, stacked={"ws": (0,)}),
    Case("dynamic-column-slice", dynamic_column_slice, {"w": (dot(0),)}),
    Case("scan-layers", scan_layers, {"w": (dot(1),)}, stacked={"w": (0,)}),
    Case(
        "scan-reversed-unrolled",
        scan_reversed_unrolled,
        {"w": (dot(1),)},
        stacked={"w": (0,)},
    ),
    Case("scan-constant", scan_constant, {"w": (dot(0),)}),
    Case("scan-carried", scan_carried, None, quantize={"w": (0,)}),
    Case(
        "scan-same-shapes",
        scan_same_shapes,
        {"w": (dot(0),), "ws": (dot(1),)},
        stacked={"ws": (0,)},
    ),
    Case("scan-nested", scan_nested, {"w": (dot(2),)}, stacked={"w": (0, 1)}),
    Case("scan-last-axis", scan_last_axis, {"w": (dot(0),)}, stacked={"w": (2,)}),
    Case("scan-and-index", scan_and_index, {"ws": (dot(1),)}, stacked={"ws": (0,)}),
    Case("scan-emits-weight", scan_emits_weight, {"ws": (dot(1),)}, fallback=("ws",)),
    Case("lax-map", lax_map, {"w": (dot(0),)}),
    Case("associative-scan", associative_scan, {"w": (dot(0),)}),
    Case(
        "ragged-dot", ragged_dot, {"experts": (ragged(1),)}, stacked={"experts": (0,)}
    ),
)

TRANSFORMATIONS: tuple[Case, ...] = (
    Case("custom-vjp", custom_vjp, {"w": (dot(0),)}),
    Case("custom-jvp", custom_jvp, {"w": (dot(0),)}),
    Case("shared-jit", shared_jit_helper, {"w": (dot(0),), "v": (dot(0),)}),
    Case("jit-static-argument", jitted_static_argument, {"w": (dot(0),)}),
    Case("vmap-activations", vmap_activations, {"w": (dot(0),)}),
    Case("vmap-weights", vmap_weights, {"w": (dot(1),)}, stacked={"w": (0,)}),
    Case("vmap-ensemble", vmap_ensemble, {"w": (dot(1),)}),
    Case("checkpoint-policy", checkpoint_policy, {"w": (dot(0),)}),
    Case("inner-gradient", inner_gradient, {"w": (dot(0), dot(1))}),
    Case("shard-map", shard_mapped, None, quantize={"w": (0,)}),
)

TREES: tuple[Case, ...] = (
    Case("gather", gathered, {"table": (GATHER,)}),
    Case("take", taken, {"table": (GATHER,)}),
    Case("take-columns", taken_columns, None, quantize={"table": (0,)}),
    Case(
        "gather-numbers",
        gathered_numbers,
        {},
        quantize={"bias": (0,)},
        fallback=("bias",),
    ),
    Case("one-hot", one_hot, {"table": (dot(0),)}),
    Case("tied", tied_plain, {"table": (GATHER, dot(1))}),
    Case("closed-over", closed_over, {"w": (dot(0),)}),
    Case("keyword-arguments", keyword_arguments, {"w": (dot(0),)}),
    Case("static-arguments", static_arguments, {"w": (dot(0),)}),
    Case("none-leaves", none_leaves, {"w": (dot(0),)}),
    Case("static-leaves", static_leaves, {"w": (dot(0),)}),
    Case(
        "nested-parameters",
        nested_parameters,
        {"layers/0/w": (dot(0),), "layers/1/w": (dot(0),), "head/0": (dot(0),)},
    ),
    Case("bare-parameter", bare_parameter, {"": (dot(0),)}),
    Case("nested-outputs", nested_outputs, {"w": (dot(0),)}),
    Case("random-key", random_key, {"w": (dot(0),)}),
    Case("numpy-leaves", numpy_leaves, {"w": (dot(0),)}),
    Case("debug-callback", debug_callback, {"w": (dot(0),)}),
)

LIBRARIES: tuple[Case, ...] = (
    Case("linen-dense", linen_dense, {"params/kernel": (dot(0),)}),
    Case("linen-dense-bfloat16", linen_dense_bfloat16, {"params/kernel": (dot(0),)}),
    Case("linen-dense-general", linen_dense_general, {"params/kernel": (dot(0),)}),
    Case(
        "linen-dense-general-out",
        linen_dense_general_out,
        {"params/kernel": (dot(0, 1),)},
    ),
    Case("linen-einsum", linen_einsum, {"params/kernel": (dot(0),)}),
    Case("linen-conv", linen_conv, {"params/kernel": (conv(0, 1, 2),)}),
    Case("linen-conv-1d", linen_conv_1d_strided, {"params/kernel": (conv(0, 1),)}),
    Case(
        "linen-conv-depthwise",
        linen_conv_depthwise,
        {"params/kernel": (conv(0, 1, 2),)},
    ),
    Case(
        "linen-conv-transpose",
        linen_conv_transpose,
        {"params/kernel": (conv(0, 1, 2),)},
    ),
    Case(
        "linen-attention",
        linen_attention,
        {
            "params/query/kernel": (dot(0),),
            "params/key/kernel": (dot(0),),
            "params/value/kernel": (dot(0),),
            "params/out/kernel": (dot(0, 1),),
        },
    ),
    Case(
        "linen-lstm",
        linen_lstm,
        {f"params/cell/{of}{gate}/kernel": (dot(0),) for of in "ih" for gate in "ifgo"},
    ),
    Case("linen-batch-norm", linen_batch_norm, {"params/Dense_0/kernel": (dot(0),)}),
    Case(
        "linen-embed-attend",
        linen_embed_attend,
        {"params/Embed_0/embedding": (GATHER, dot(1))},
    ),
    Case(
        "linen-jit",
        linen_jit,
        {
            "params/a/Dense_0/kernel": (dot(0),),
            "params/a/Dense_1/kernel": (dot(0),),
            "params/b/Dense_0/kernel": (dot(0),),
            "params/b/Dense_1/kernel": (dot(0),),
        },
    ),
    Case(
        "linen-scan-remat",
        linen_scan_remat,
        {
            "params/Embed_0/embedding": (GATHER, dot(1)),
            "params/layers/Dense_0/kernel": (dot(1),),
            "params/layers/Dense_1/kernel": (dot(1),),
        },
        stacked={
            "params/layers/Dense_0/kernel": (0,),
            "params/layers/Dense_1/kernel": (0,),
        },
    ),
    # NNX
    Case("nnx-linear", nnx_linear, {"kernel": (dot(0),)}),
    Case("nnx-pure-dict", nnx_pure_dict, {"kernel": (dot(0),)}),
    Case("nnx-linear-general", nnx_linear_general, {"kernel": (dot(0, 1),)}),
    Case("nnx-embed", nnx_embed, {"embed/embedding": (GATHER, dot(1))}),
    Case("nnx-conv", nnx_conv, {"kernel": (conv(0, 1, 2),)}),
    Case(
        "nnx-scan",
        nnx_scan,
        {"layers/kernel": (dot(1),)},
        stacked={"layers/kernel": (0,)},
    ),
    # Haiku
    Case(
        "haiku-mlp",
        haiku_mlp,
        {"mlp/~/linear_0/w": (dot(0),), "mlp/~/linear_1/w": (dot(0),)},
    ),
    # Equinox
    Case("equinox-linear", equinox_linear, {"weight": (dot(1),)}),
    Case("equinox-conv", equinox_conv, {"weight": (conv(1, 2, 3),)}),
    Case("equinox-embedding", equinox_embedding, {"weight": (GATHER,)}),
    Case(
        "equinox-mlp",
        equinox_mlp,
        {"layers/0/weight": (dot(1),), "layers/1/weight": (dot(1),)},
    ),
)

CASES = (*PRODUCTS, *VIEWS, *CONTROL_FLOW, *TRANSFORMATIONS, *TREES, *LIBRARIES)
