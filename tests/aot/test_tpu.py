"""TPU kernels compiled for real chips, their schedules held to the memory."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("libtpu", reason="needs the `aot` extra")

import jaxq
from benchmarks import llama70b, tpu_compile
from benchmarks.tpu_schedules import PRODUCTS, attention_estimate, estimate
from jaxq import QuantSpec
from jaxq.sharding import qtensor_shardings
from pallas_kernels.target import Target

pytestmark = pytest.mark.aot
GENERATIONS = tuple(tpu_compile.CHIPS)


@functools.cache
def cost(name: str, phase: str, generation: str):
    product = next(p for p in PRODUCTS if (p.name, p.phase) == (name, phase))
    return estimate(product, generation)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("product", PRODUCTS, ids=lambda p: f"{p.name} {p.phase}")
def test_compiles(product, generation):
    assert cost(product.name, product.phase, generation).schedule.bundles > 0


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
@pytest.mark.parametrize("name", ["W4A16 g128", "W4A16 g128, float32 scales"])
def test_decode_keeps_up_with_the_memory(name, generation):
    e = cost(name, "decode", generation)
    assert e.schedule.bundles <= e.weight_clocks


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", ["W4A16 g128", "W4A16 g128, float32 scales"])
def test_prefill_costs_what_bfloat16_costs(name, generation):
    # the same blocks, so bundles compare
    dense = cost("bf16 prefill", "prefill", generation).schedule.bundles
    assert cost(name, "prefill", generation).schedule.bundles <= 1.05 * dense


def test_fp8_with_int4_comes_nearest_to_the_roof_of_v7x():
    e = cost("fp8 x int4 g128", "decode", "v7x")
    assert e.schedule.bundles <= 1.2 * e.weight_clocks


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_attention_keeps_up_with_the_memory(generation):
    schedule, clocks = attention_estimate("int8", generation)
    assert schedule.bundles <= clocks


def test_a_parallel_mlp_keeps_its_kernels_on_eight_chips():
    mesh = tpu_compile.mesh("v5e:2x4", (2, 4), ("data", "model"))
    spec = QuantSpec("int4", 128)
    shapes = {"up": (4096, 14336), "down": (14336, 4096)}
    cut = {"up": P(None, "model"), "down": P("model", None)}

    def made(w):
        return jaxq.relayout(jaxq.quantize(w, spec), "tpu")

    params = {
        k: jax.eval_shape(made, jax.ShapeDtypeStruct(s, jnp.bfloat16))
        for k, s in shapes.items()
    }
    placed = {k: NamedSharding(mesh, s) for k, s in cut.items()}
    params = jaxq.shard_params(params, placed)

    def mlp(p, x):
        return jax.nn.silu(x @ p["up"]) @ p["down"]

    x = jax.ShapeDtypeStruct((32, 4096), jnp.bfloat16)
    x = jaxq.shard_params(x, NamedSharding(mesh, P("data", None)))
    run = jax.jit(jaxq.quantized(mlp, target=Target("tpu", "v5e")))
    compiled = run.trace(params, x).lower(lowering_platforms=("tpu",)).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_without_a_word_on_weights_compiles(kind):
    """Explicit axes keep the kernels; with automatic ones XLA cuts plain products."""
    mesh = tpu_compile.mesh("v5e:2x4", (2, 4), ("data", "model"))
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(kind,) * 2)
    w = jax.ShapeDtypeStruct((4096, 8192), jnp.bfloat16)
    made = lambda w: jaxq.relayout(jaxq.quantize(w, QuantSpec("int4", 128)), "tpu")
    q = jax.eval_shape(made, w)
    q = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        q,
        qtensor_shardings(q, NamedSharding(mesh, P(None, "model"))),
    )
    rows = NamedSharding(mesh, P("data", None))
    x = jax.ShapeDtypeStruct((32, 4096), jnp.bfloat16, sharding=rows)
    run = jaxq.quantized(lambda w, x: x @ w, target=Target("tpu", "v5e"))
    compiled = jax.jit(run).trace(q, x).lower(lowering_platforms=("tpu",)).compile()
    calls = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    assert calls == (kind == AxisType.Explicit)


def test_gathered_rows_leave_the_table_packed():
    """An embedding reads packed rows: what is allocated is a few rows of floats."""
    w = jax.ShapeDtypeStruct((128256, 8192), jnp.bfloat16)
    q = jax.eval_shape(lambda w: jaxq.quantize(w, QuantSpec("int4", 128), axis=-1), w)
    ids = jax.ShapeDtypeStruct((16,), jnp.int32)
    run = jaxq.quantized(lambda w, i: w[i], target=Target("tpu", "v5e"))
    mesh = tpu_compile.mesh("v5e:2x2", (1,), ("x",))
    everywhere = NamedSharding(mesh, P())
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), (q, ids)
    )
    compiled = jax.jit(run).trace(*placed).lower(lowering_platforms=("tpu",)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 << 20


@pytest.mark.parametrize(
    ("topology", "data", "model", "batch"),
    [("v5e:2x4", 1, 8, 16), ("v5e:16x16", 32, 8, 512)],
)
def test_a_model_of_70_billion_parameters_fits_as_planned(topology, data, model, batch):
    fit = llama70b.fit(topology, data, model, batch, positions=2048)
    needed = fit.arguments + fit.temporary
    assert abs(needed - fit.predicted) <= 0.05 * fit.predicted
    assert needed < 16 << 30
    assert fit.copies == 0
    # seven products and the attention: one call each, in a loop over layers
    assert fit.kernels == 8
