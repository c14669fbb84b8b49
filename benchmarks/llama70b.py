"""A decode step of a Llama of 70 billion parameters, sharded, for TPUs not here.

Weights are int4 in groups of 128, the cache is int8. The step is an ordinary function
of float weights: `jaxq.plan` says what its parameters will take on each device, and
`jaxq.quantized` runs it with stacks of packed ones. Nothing is allocated or run: what a
device would need is read off the compiled program.
"""

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from benchmarks import tpu_compile
from jaxq import QuantSpec, Recipe, Rule
from pallas_kernels.target import Target
from pallas_kernels.tpu.decode_attention import decode_attention

LAYERS, WIDTH, HIDDEN, VOCABULARY = 80, 8192, 28672, 128256
HEADS, CACHED, HEAD = 64, 8, 128
INT4 = QuantSpec("int4", 128, scale="bfloat16")
RECIPE = Recipe("int4 layers", (Rule("layers/*", INT4, ops=("dot_general",)), Rule()))

# parameter -> shape and how it is split
PARAMETERS = {
    "embedding": ((VOCABULARY, WIDTH), P(None, "model")),
    "head": ((WIDTH, VOCABULARY), P(None, "model")),
    "norm": ((WIDTH,), P()),
    "layers/norm_attention": ((LAYERS, WIDTH), P()),
    "layers/norm_mlp": ((LAYERS, WIDTH), P()),
    "layers/q": ((LAYERS, WIDTH, HEADS * HEAD), P(None, None, "model")),
    "layers/k": ((LAYERS, WIDTH, CACHED * HEAD), P(None, None, "model")),
    "layers/v": ((LAYERS, WIDTH, CACHED * HEAD), P(None, None, "model")),
    "layers/o": ((LAYERS, HEADS * HEAD, WIDTH), P(None, "model", None)),
    "layers/gate": ((LAYERS, WIDTH, HIDDEN), P(None, None, "model")),
    "layers/up": ((LAYERS, WIDTH, HIDDEN), P(None, None, "model")),
    "layers/down": ((LAYERS, HIDDEN, WIDTH), P(None, "model", None)),
}
CACHE = P(None, "data", "model", None, None)


@dataclasses.dataclass(frozen=True)
class Fit:
    """What one device needs.

    Attributes:
        topology: the slice.
        predicted: bytes of parameters (by the plan) and cache.
        arguments: bytes of the compiled program's arguments.
        temporary: bytes that it allocates beside them.
        seconds: to compile.
        kernels: calls of kernels in the program.
        copies: operations outside kernels that make an array of int4.
    """

    topology: str
    predicted: int
    arguments: int
    temporary: int
    seconds: float
    kernels: int
    copies: int


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"a/b": x}`` as ``{"a": {"b": x}}``."""
    out: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        place = out
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = leaf
    return out


def step(params: Any, cache: Any, tokens: Any, position: Any, mesh: Mesh) -> Any:
    """Return the next tokens and the cache, one token per sequence further."""
    x = params["embedding"][tokens]
    batch = x.shape[0]
    ends = jnp.full(batch, position + 1, jnp.int32)

    def layer(carry: Any, own: Any) -> Any:
        x, cache = carry
        index, w = own
        h = normed(x, w["norm_attention"])
        k, v = ((h @ w[name]).reshape(batch, CACHED, HEAD) for name in "kv")
        cache = appended(cache, k, v, index, position)
        q = (h @ w["q"]).reshape(batch, HEADS, HEAD)
        attended = attention(mesh, q, *cache, ends, index)
        x = x + attended.reshape(batch, -1) @ w["o"]
        h = normed(x, w["norm_mlp"])
        x = x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
        return (x, cache), None

    indices = jnp.arange(LAYERS, dtype=jnp.int32)
    (x, cache), _ = lax.scan(layer, (x, cache), (indices, params["layers"]))
    logits = normed(x, params["norm"]) @ params["head"]
    return jnp.argmax(logits, -1).astype(jnp.int32), cache


def normed(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Return ``x`` divided by its root mean square, times ``weight``."""
    squares = jnp.square(x.astype(jnp.float32))
    size = lax.rsqrt(jnp.mean(squares, -1, keepdims=True) + 1e-5)
    return (x.astype(jnp.float32) * size).astype(x.dtype) * weight


def appended(cache: Any, k: Any, v: Any, layer: Any, position: Any) -> Any:
    """Return the cache with the keys and values of one token, rounded to int8."""
    out = []
    for new in (k, v):
        size = jnp.max(jnp.abs(new.astype(jnp.float32)), -1, keepdims=True) / 127
        size = jnp.where(size == 0, 1.0, size)
        out.append((jnp.round(new.astype(jnp.float32) / size).astype(jnp.int8), size))
    (k, k_size), (v, v_size) = out
    place = (layer, jnp.int32(0), jnp.int32(0), position)

    def put(stack: jax.Array, new: jax.Array) -> jax.Array:
        start = (*place, jnp.int32(0))[: stack.ndim]
        return lax.dynamic_update_slice(stack, new, start)

    parts = (k[None, :, :, None], v[None, :, :, None])
    sizes = (k_size[None], v_size[None])
    return tuple(put(a, b) for a, b in zip(cache, (*parts, *sizes), strict=True))


def attention(mesh: Mesh, q: Any, *rest: Any) -> Any:
    """Run the kernel on every device's sequences and heads."""
    heads, scales = P("data", "model", None), P(None, "data", "model", None)
    return jax.shard_map(
        lambda *a: decode_attention(*a),
        mesh=mesh,
        in_specs=(heads, CACHE, CACHE, scales, scales, P("data"), P()),
        out_specs=heads,
        check_vma=False,
    )(q, *rest)


def local_bytes(nbytes: int, spec: P, mesh: Mesh) -> float:
    """Return the bytes on one device of something split as ``spec`` says."""
    return nbytes / math.prod(mesh.shape[name] for name in spec if name)


def fit(topology: str, data: int, model: int, batch: int, positions: int) -> Fit:
    """Compile the step for a slice and return what a device needs."""
    mesh = tpu_compile.mesh(topology, (data, model), ("data", "model"))
    kind = mesh.abstract_mesh.abstract_device.device_kind
    target = Target("tpu", {"TPU v5 lite": "v5e", "TPU v6 lite": "v6e"}[kind])

    def on(spec: P) -> NamedSharding:
        return NamedSharding(mesh, spec)

    def array(shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=on(spec))

    kv = (LAYERS, batch, CACHED, positions, HEAD)
    scales = P(*CACHE[:4])
    cache = (
        array(kv, jnp.int8, CACHE),
        array(kv, jnp.int8, CACHE),
        array(kv[:4], jnp.float32, scales),
        array(kv[:4], jnp.float32, scales),
    )
    inputs = (cache, array((batch,), jnp.int32, P("data")), array((), jnp.int32, P()))
    run = lambda params, *rest: step(params, *rest, mesh)
    floats = {
        path: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for path, (shape, _) in PARAMETERS.items()
    }
    plan = jaxq.plan(run, nested(floats), RECIPE, *inputs)
    specs = {k: spec for k, (_, spec) in PARAMETERS.items()}
    predicted = sum(local_bytes(r.bytes_after, specs[r.path], mesh) for r in plan)
    predicted += sum(
        local_bytes(math.prod(a.shape) * a.dtype.itemsize, a.sharding.spec, mesh)
        for a in cache
    )
    quantized = {row.path for row in plan if row.is_quantized}

    def packed(path: str, w: Any) -> Any:
        if path not in quantized:
            return w
        make = lambda w: jaxq.relayout(jaxq.quantize(w, INT4, stacked=(0,)), "tpu")
        return jax.eval_shape(make, w)

    tree = nested({path: packed(path, w) for path, w in floats.items()})
    placed = jaxq.shard_params(tree, nested({k: on(s) for k, s in specs.items()}))
    start = time.perf_counter()
    traced = jax.jit(jaxq.quantized(run, target=target), donate_argnums=1).trace(
        placed, *inputs
    )
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Fit(
        topology,
        round(predicted),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        time.perf_counter() - start,
        text.count("tpu_custom_call"),
        len(re.findall(r"= s4[^=]*(?:dynamic-slice|fusion|copy)[(-]", text)),
    )
