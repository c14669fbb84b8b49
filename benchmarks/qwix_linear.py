"""The linear layer of `benchmarks.linear`, quantized by qwix instead.

Run it with a Python that has qwix (`pip install qwix flax`); jaxq is not needed there.
Compare the ratios: both are to the float products of their own run.
"""

import functools
import importlib.metadata

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import qwix

from benchmarks import timing
from benchmarks.report import Table, arguments, milliseconds, publish, ratio

SIZE = 4096
RULES: dict[str, dict[str, object]] = {
    "w8": {"weight_qtype": jnp.int8},
    "w4 g128": {"weight_qtype": jnp.int4, "tile_size": 128},
    "nf4 g64": {"weight_qtype": "nf4", "tile_size": 64},
    "fp8": {"weight_qtype": jnp.float8_e4m3fn},
    "W8A8": {"weight_qtype": jnp.int8, "act_qtype": jnp.int8},
    "W4A8 g128": {"weight_qtype": jnp.int4, "act_qtype": jnp.int8, "tile_size": 128},
}
ABOUT = """\
`qwix.quantize_model` and `qwix.quantize_params` of one `nn.Dense` of 4096 x 4096, under
`jax.jit`, beside float products in the same rounds. Columns as in `linear.md`."""


def compiled(fn, *args):
    """Compile; return a function of nothing, and the temporary bytes."""
    executable = jax.jit(fn).lower(*args).compile()
    run = functools.partial(executable, *args)
    run()
    return run, executable.memory_analysis().temp_size_in_bytes


def quantized(rule, kernel, x):
    """Return the quantized layer as a function, and its parameters."""
    model = nn.Dense(SIZE, use_bias=False, dtype=x.dtype, param_dtype=kernel.dtype)
    rules = [qwix.QuantizationRule(module_path=".*", **rule)]
    small = qwix.quantize_model(model, qwix.PtqProvider(rules))
    shapes = jax.eval_shape(small.init, jax.random.key(0), x)["params"]
    params = qwix.quantize_params({"kernel": kernel}, shapes)
    return (lambda params, x: small.apply({"params": params}, x)), params


def product(w, x):
    """The linear layer."""
    return x @ w


def measure(rows: int, dtype: str, seconds: float) -> Table:
    """Time all formats for ``rows`` rows of activations in ``dtype``."""
    random = np.random.default_rng(0)
    w = jnp.asarray(random.standard_normal((SIZE, SIZE), np.float32))
    x = jnp.asarray(random.standard_normal((rows, SIZE), np.float32), dtype)
    half = jnp.bfloat16
    runs = {
        "float32 x @ w": compiled(product, w, x.astype(jnp.float32)),
        "bfloat16 x @ w": compiled(product, w.astype(half), x.astype(half)),
    }
    for name, rule in RULES.items():
        fn, params = quantized(rule, w.astype(dtype), x)
        runs[name] = compiled(fn, params, x)
    calls = {name: run for name, (run, _) in runs.items()}
    times = timing.interleaved(calls, seconds=seconds)
    f32, bf16 = times["float32 x @ w"], times["bfloat16 x @ w"]
    return Table(
        f"## {rows} x {SIZE} x {SIZE}, activations {dtype}",
        ("weight", "min ms", "median ms", "/ float32", "/ bfloat16", "temp MiB"),
        [
            (
                name,
                milliseconds(t.minimum),
                milliseconds(t.median),
                f"{ratio(t.minimum, f32.minimum)} ({ratio(t.median, f32.median)})",
                f"{ratio(t.minimum, bf16.minimum)} ({ratio(t.median, bf16.median)})",
                f"{runs[name][1] / 2**20:.1f}",
            )
            for name, t in times.items()
        ],
        (f"{f32.rounds} rounds, qwix {importlib.metadata.version('qwix')}.",),
    )


def main() -> None:
    options = arguments(__doc__).parse_args()
    seconds = 10 if options.quick else 60
    tables = [
        measure(rows, dtype, seconds)
        for rows in (1, 512)
        for dtype in ("float32", "bfloat16")
    ]
    publish("qwix_linear", ABOUT, tables, options)


if __name__ == "__main__":
    main()
