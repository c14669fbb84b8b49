"""A quantized linear layer beside ``x @ w`` in float32 and bfloat16."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
from benchmarks import timing
from benchmarks.report import Table, arguments, milliseconds, publish, ratio
from jaxq import QuantSpec

SIZE = 4096
INT8_TOKEN = QuantSpec("int8", "token")

# name -> (weight, activation)
SPECS: dict[str, tuple[QuantSpec, QuantSpec | None]] = {
    "w8": (QuantSpec("int8"), None),
    "w4 g128": (QuantSpec("int4", 128), None),
    "w4 g128 asymmetric": (QuantSpec("uint4", 128, symmetric=False), None),
    "w3 g128 asymmetric": (QuantSpec("uint3", 128, symmetric=False), None),
    "w2 g128 asymmetric": (QuantSpec("uint2", 128, symmetric=False), None),
    "nf4 g64": (QuantSpec("nf4", 64), None),
    "fp8": (QuantSpec("fp8_e4m3"), None),
    "mxfp4 g32": (QuantSpec("fp4_e2m1", 32, scale="e8m0"), None),
    "dynamic8 g256": (QuantSpec("dynamic8", 256), None),
    "W8A8": (QuantSpec("int8"), INT8_TOKEN),
    "W4A8 g128": (QuantSpec("int4", 128), INT8_TOKEN),
}
ABOUT = """\
Time of `jax.jit(jaxq.quantized(lambda w, x: x @ w))` for one weight of 4096 x 4096,
beside the same product of floats in the same rounds. Ratios compare minima (medians in
brackets): below 1 is faster than the float product. `temp` is what the compiled
function allocates beyond its arguments and result; a float copy of the weight would be
32 MiB (bfloat16) or 64 MiB (float32)."""


def product(w: jax.Array, x: jax.Array) -> jax.Array:
    """The linear layer."""
    return x @ w


def compiled(fn, w, x):
    """Compile; return a function of nothing, the temporary bytes and the result."""
    executable = jax.jit(fn).lower(w, x).compile()
    run = functools.partial(executable, w, x)
    return run, executable.memory_analysis().temp_size_in_bytes, run()


def relative_error(y: jax.Array, exact: np.ndarray) -> float:
    """Return ``|y − exact| / |exact|`` in Euclidean norms."""
    difference = np.asarray(y, np.float64) - exact
    return float(np.linalg.norm(difference) / np.linalg.norm(exact))


def measure(rows: int, dtype: str, seconds: float, only: list[str] | None) -> Table:
    """Time all formats for ``rows`` rows of activations in ``dtype``."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((SIZE, SIZE), np.float32)
    x = jnp.asarray(random.standard_normal((rows, SIZE), np.float32), dtype)
    x32 = x.astype(jnp.float32)
    floats = {
        "float32 x @ w": compiled(product, jnp.asarray(weight), x32),
        "bfloat16 x @ w": compiled(
            product, jnp.asarray(weight, jnp.bfloat16), x32.astype(jnp.bfloat16)
        ),
    }
    runs, errors = dict(floats), {}
    exact_x = np.asarray(x32, np.float64)
    for name, (spec, activation) in SPECS.items():
        if only and not any(word in name for word in only):
            continue
        q = jaxq.quantize(jnp.asarray(weight, dtype), spec)
        q = dataclasses.replace(q, activation=activation)
        runs[name] = compiled(jaxq.quantized(product), q, x)
        exact = exact_x @ np.asarray(q.dequantize(jnp.float32), np.float64)
        errors[name] = relative_error(runs[name][2], exact)
    times = timing.interleaved(
        {n: run for n, (run, *_) in runs.items()}, seconds=seconds
    )
    f32, bf16 = (times[name] for name in floats)

    def row(name: str) -> tuple[str, ...]:
        t, error = times[name], errors.get(name)
        return (
            name,
            milliseconds(t.minimum),
            milliseconds(t.median),
            *(
                f"{ratio(t.minimum, r.minimum)} ({ratio(t.median, r.median)})"
                for r in (f32, bf16)
            ),
            f"{runs[name][1] / 2**20:.1f}",
            "" if error is None else f"{error:.1e}",
        )

    return Table(
        f"## {rows} x {SIZE} x {SIZE}, activations {dtype}",
        (
            "weight",
            "min ms",
            "median ms",
            "/ float32",
            "/ bfloat16",
            "temp MiB",
            "error",
        ),
        [row(name) for name in runs],
        (f"{f32.rounds} rounds. The error is against float64 on the same codes.",),
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 512])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="*", help="formats whose names contain a word")
    parser.add_argument("--seconds", type=float, help="per table")
    options = parser.parse_args()
    seconds = options.seconds or (10 if options.quick else 60)
    tables = [
        measure(rows, dtype, seconds, options.only)
        for rows in options.rows
        for dtype in options.dtypes
    ]
    publish("linear", ABOUT, tables, options)


if __name__ == "__main__":
    main()
