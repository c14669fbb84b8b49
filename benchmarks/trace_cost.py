"""What `jaxq.quantized` costs on top of tracing, and at every later call."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
from benchmarks import timing
from benchmarks.report import Table, arguments, publish, ratio
from jaxq.models.llama import Llama, LlamaConfig

LAYERS = 6
DEPTH = 100
ABOUT = """\
First calls: `jax.make_jaxpr` of the function and of `jaxq.quantized` of it, both anew
in every round, with JAX's own caches warm. The aim is a ratio of at most 2: the
function's own trace time once more. Later calls: the time until the call returns, for
arrays so small that the arithmetic is nothing."""

Example = tuple[Callable[..., Any], Any, tuple[Any, ...]]


def llama() -> Example:
    """A Llama of six layers, small in every width."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_layers=LAYERS,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
    )
    model, tokens = Llama(config), jnp.zeros((1, 8), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    return model.apply, params, (tokens,)


def plain() -> Example:
    """A hundred layers of a plain function, eight operations each."""
    keys = jax.random.split(jax.random.key(0), DEPTH)
    params = {f"w{i}": jax.random.normal(key, (64, 64)) for i, key in enumerate(keys)}

    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        for w in params.values():
            y = jnp.tanh(x @ w) * 2.0 + 1.0
            x = x + y / jnp.sqrt(1.0 + jnp.mean(y * y, axis=-1, keepdims=True))
        return x

    return apply, params, (jnp.ones((1, 64)),)


def anew(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that no cache knows."""
    return lambda *args: fn(*args)


def first_calls(name: str, example: Example, seconds: float) -> tuple[str, ...]:
    """Compare the trace of the function with that of its quantized form."""
    fn, params, args = example
    qparams = jaxq.quantize_params(params, "w4a16", fn=fn, calibration=[args])

    def bare() -> None:
        jax.make_jaxpr(anew(fn))(params, *args)

    def lifted() -> None:
        jax.make_jaxpr(jaxq.quantized(anew(fn)))(qparams, *args)

    times = timing.interleaved({"bare": bare, "lifted": lifted}, seconds=seconds)
    bare_time, lifted_time = times["bare"], times["lifted"]
    return (
        name,
        str(len(jax.make_jaxpr(fn)(params, *args).eqns)),
        f"{bare_time.minimum * 1e3:.1f}",
        f"{lifted_time.minimum * 1e3:.1f}",
        ratio(lifted_time.minimum, bare_time.minimum),
        ratio(lifted_time.median, bare_time.median),
    )


def later_calls(name: str, example: Example, seconds: float) -> list[tuple[str, ...]]:
    """Compare dispatch: the returned function, under `jax.jit`, and the float one."""
    fn, params, args = example
    qparams = jaxq.quantize_params(params, "w4a16", fn=fn, calibration=[args])
    runs = {
        "jax.jit(fn)": (jax.jit(fn), params),
        "jax.jit(jaxq.quantized(fn))": (jax.jit(jaxq.quantized(fn)), qparams),
        "jaxq.quantized(fn)": (jaxq.quantized(fn), qparams),
    }
    taken: dict[str, list[float]] = {label: [] for label in runs}
    for label, (run, tree) in runs.items():
        jax.block_until_ready(run(tree, *args))
        taken[label].clear()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for label, (run, tree) in runs.items():
            start = time.perf_counter()
            out = run(tree, *args)
            taken[label].append(time.perf_counter() - start)
            jax.block_until_ready(out)
    leaves = {label: len(jax.tree.leaves(tree)) for label, (_, tree) in runs.items()}
    return [
        (
            f"{name}: {label}",
            str(leaves[label]),
            f"{min(values) * 1e6:.0f}",
            f"{np.median(values) * 1e6:.0f}",
        )
        for label, values in taken.items()
    ]


def main() -> None:
    options = arguments(__doc__).parse_args()
    seconds = 4 if options.quick else 30
    examples = {f"Llama, {LAYERS} layers": llama(), f"plain, {DEPTH} layers": plain()}
    publish(
        "trace_cost",
        ABOUT,
        [
            Table(
                "## First call",
                ("function", "equations", "fn ms", "quantized ms", "ratio", "(median)"),
                [first_calls(*item, seconds) for item in examples.items()],
            ),
            Table(
                "## Later calls",
                ("call", "array leaves", "min µs", "median µs"),
                [r for item in examples.items() for r in later_calls(*item, seconds)],
            ),
        ],
        options,
    )


if __name__ == "__main__":
    main()
