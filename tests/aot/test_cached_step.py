"""One token into a cache of codes and out of it, compiled for chips elsewhere."""

import functools
import types

import jax
import jax.numpy as jnp
import pytest

from jaxq.kvcache import cache_bytes, empty_cache
from jaxq.kvcache.attention import Problem, attend
from jaxq.models.attention import alibi
from pallas_kernels.target import Target

pytestmark = pytest.mark.aot
BATCH, SLOTS = 4, 2048
# as Gemma 2's local layers, Mistral's, and BLOOM's
UNUSUAL = [{"window": 512, "cap": 50.0}, {"window": 1024}, {"near": True}]


def step(tree, options, q, k, v, positions, *leaves):
    """Append a token to every row, and attend."""
    cache, at = jax.tree.unflatten(tree, leaves).append(positions)
    layer = cache.layers[0].write(k, v, at)
    if "near" in options:
        options = {"bias": alibi(q.shape[2], cache.positions)}
    out, layer = attend(Problem(q, layer, positions, cache.positions, **options))
    return out, layer


def shapes(target, kind, width, heads, cached, **options):
    """The step, what it takes, and the bytes of the cache."""
    config = types.SimpleNamespace(num_layers=1, num_kv_heads=cached, head_dim=width)
    cache = jax.eval_shape(
        lambda: empty_cache(config, BATCH, SLOTS, jnp.bfloat16, kind, target)
    )
    leaves, tree = jax.tree.flatten(cache)
    new = jax.ShapeDtypeStruct((BATCH, 1, cached, width), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((BATCH, 1, heads, width), jnp.bfloat16)
    place = jax.ShapeDtypeStruct((BATCH, 1), jnp.int32)
    arguments = (q, new, new, place, *leaves)
    return functools.partial(step, tree, options), arguments, cache_bytes(cache)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(
    ("width", "heads", "cached"), [(128, 32, 8), (64, 4, 2), (80, 8, 8)]
)
def test_a_tpu_copies_no_cache(width, heads, cached, kind):
    pytest.importorskip("libtpu", reason="needs the `aot` extra")
    from benchmarks import tpu_compile

    fn, arguments, held = shapes(Target("tpu", "v5e"), kind, width, heads, cached)
    compiled = tpu_compile.compile_for(fn, arguments, "v5e")
    assert "tpu_custom_call" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < held / 10


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
@pytest.mark.parametrize("options", UNUSUAL, ids=str)
def test_a_tpus_kernel_takes_windows_caps_and_alibi(options, generation):
    pytest.importorskip("libtpu", reason="needs the `aot` extra")
    from benchmarks import tpu_compile

    cached = 16 if "near" in options else 4
    target = Target("tpu", generation)
    fn, arguments, held = shapes(target, "int8", 128, 16, cached, **options)
    compiled = tpu_compile.compile_for(fn, arguments, generation)
    assert "tpu_custom_call" in compiled.as_text()
    bias = BATCH * 16 * SLOTS * 4 if "near" in options else 0
    assert compiled.memory_analysis().temp_size_in_bytes < held / 10 + bias


@pytest.mark.parametrize("gpu", ["h200", "a100"])
@pytest.mark.parametrize("options", UNUSUAL, ids=str)
def test_a_gpus_kernel_takes_windows_caps_and_alibi(options, gpu):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the `aot` extra")
    from benchmarks import gpu_compile

    target = Target("gpu", gpu_compile.GPUS[gpu].generation)
    heads = 8 if "near" in options else 16
    fn, arguments, _ = shapes(target, "int8", 128, heads, 8, **options)
    compiled = gpu_compile.compiled(fn, arguments, gpu)
    assert "triton" in compiled.as_text()
    assert gpu_compile.code(compiled).spills == 0


@pytest.mark.parametrize("gpu", ["h200", "l4"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_gpu_copies_no_cache(gpu, kind):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the `aot` extra")
    from benchmarks import gpu_compile

    target = Target("gpu", gpu_compile.GPUS[gpu].generation)
    fn, arguments, held = shapes(target, kind, 128, 32, 8)
    compiled = gpu_compile.compiled(fn, arguments, gpu)
    assert "triton" in compiled.as_text()
    # partial results of the context's parts, float32
    parts = 8 * BATCH * 8 * 16 * (128 + 1) * 4
    assert compiled.memory_analysis().temp_size_in_bytes < held / 10 + 2 * parts


def test_queries_that_lie_on_a_mesh_compile():
    """XLA splits its own attention; a kernel it cannot cut, so that it is declined."""
    pytest.importorskip("libtpu", reason="needs the `aot` extra")
    from benchmarks import tpu_compile

    mesh = tpu_compile.mesh("v5e:2x4", (2, 4), ("data", "model"))
    fn, arguments, _ = shapes(Target("tpu", "v5e"), "int8", 128, 32, 8)
    heads = jax.NamedSharding(mesh, jax.P("data", None, "model"))
    new = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=heads) for a in arguments[:3]
    ]
    traced = jax.jit(fn).trace(*new, *arguments[3:])
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    assert "tpu_custom_call" not in compiled.as_text()
