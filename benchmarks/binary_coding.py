"""What sums of signs cost the demo model beside integers, and look-ups on a CPU."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
from benchmarks.demo_model import COLUMNS, measure
from benchmarks.report import Table, arguments, milliseconds, publish
from benchmarks.timing import interleaved
from jaxq import PRESETS, QuantSpec, Recipe, Rule
from jaxq.evaluate import text_windows
from jaxq.ops.lookup import Signs, run_dequantized
from jaxq.ops.problem import Problem
from jaxq.quantize import quantize
from pallas_kernels.xla import binary_lut_dot, binary_tiled_dot

ABOUT = """\
The embedded demo model on held-out text in windows of 512 tokens. Binary coding
(`bcq`) gives every bit of a code a scale of its own, per group; round to nearest has
one scale and a zero point (`w4a16` and its like, their range searched). Bits count
every stored byte over every parameter. Groups of 64 unless said."""

INNER = COLUMNS_OF = 4096


def recipes() -> dict[str, Recipe]:
    """Return both ways at every width, and sums of signs about as wide as integers."""
    kept, found = PRESETS["w4a16"].rules[:-1], {}
    for bits in (4, 3, 2):
        found[f"w{bits}a16"] = PRESETS[f"w{bits}a16"]
        found[f"w{bits}a16-bcq"] = PRESETS[f"w{bits}a16-bcq"]
        wide = PRESETS[f"w{bits}a16-bcq"].with_group_size(128)
        found[f"w{bits}a16-bcq, g128"] = wide
        spec = QuantSpec(f"uint{bits}", 64, False, scale="bfloat16", binary=True)
        rule = Rule("*", spec, solver="bcq")
        found[f"w{bits}a16-bcq, offset"] = Recipe("offset", (*kept, rule))
    return found


def speed(quick: bool) -> list[list[str]]:
    """Return the time of one product, per number of rows and kernel."""
    random = np.random.default_rng(0)
    w = jnp.asarray(random.standard_normal((INNER, COLUMNS_OF)), jnp.float32)
    spec = QuantSpec("uint3", 64, scale="bfloat16", binary=True)
    q = jax.jit(lambda w: quantize(w, spec))(w)

    def lookup(x: jax.Array, q: Any) -> jax.Array:
        s = Signs.of(Problem(x, q))
        return binary_lut_dot(s.x, s.codes, s.scales, group=s.group)

    def tiles(x: jax.Array, q: Any) -> jax.Array:
        return binary_tiled_dot(*Signs.of(Problem(x, q)))

    def whole(x: jax.Array, q: Any) -> jax.Array:
        return run_dequantized(Problem(x, q))

    kernels = [jax.jit(f) for f in (lookup, tiles, whole)]
    dense = jax.jit(jnp.matmul)
    rows = []
    for count in (1, 2, 4, 8, 32):
        x = jnp.asarray(random.standard_normal((count, INNER)), jnp.float32)
        calls = {
            "look-ups": lambda x=x: kernels[0](x, q),
            "tiles": lambda x=x: kernels[1](x, q),
            "whole": lambda x=x: kernels[2](x, q),
            "float32": lambda x=x: dense(x, w),
        }
        times = interleaved(calls, seconds=1 if quick else 4, least_rounds=3)
        rows.append([str(count), *(milliseconds(t.minimum) for t in times.values())])
    return rows


def main() -> None:
    """Measure, print, and write."""
    options = arguments("Binary coding beside integers.").parse_args()
    lm = jaxq.load_model("demo")
    text = (Path(jaxq.__file__).parent / "demo_model" / "eval.txt").read_text("utf-8")
    windows = text_windows(lm, text, 512)
    spread = np.linspace(0, len(windows) - 1, 16 if options.quick else 64).astype(int)
    windows = windows[spread]
    rows = measure(lm, windows, recipes(), dequantize=True)
    title = f"## {INNER} x {COLUMNS_OF}, 3 signs, groups of 64, least ms in plain XLA"
    columns = ("rows", "look-ups", "tiles", "dequantized", "float32")
    publish(
        "binary_coding",
        ABOUT,
        [
            Table(f"## Divergence ({windows.size:,} tokens)", COLUMNS, rows),
            Table(title, columns, speed(options.quick)),
        ],
        options,
    )


if __name__ == "__main__":
    main()
