"""What every preset costs the demo model, and which clipping RTN should use."""

import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

import jaxq
from benchmarks.report import Table, arguments, publish
from jaxq import PRESETS, QuantSpec, Recipe, Rule
from jaxq.evaluate import evaluate, logits_of, stored_bytes, text_windows
from jaxq.lm import LM

ABOUT = """\
The embedded demo model on its held-out text, in windows of 512 tokens that do not
overlap: perplexity per token, KL(float || quantized) in nats per token, and how often
both prefer the same next token. Bits count every stored byte over every parameter. The
KL is the less noisy figure."""

GROUP = 64


def ablation() -> Iterator[tuple[str, Recipe]]:
    """Yield ways to choose an integer grid without data, at 4, 3 and 2 bits."""
    kept = PRESETS["w4a16"].rules[:-1]
    methods = {
        "absmax": {},
        "mse": {"clip": "mse"},
        "mse, exponent 2": {"clip": "mse", "exponent": 2.0},
        "percentile 99": {"clip": "percentile", "percent": 99.0},
    }
    for bits in (4, 3, 2):
        asymmetric = QuantSpec(f"uint{bits}", GROUP, False, scale="bfloat16")
        grids = {
            f"restricted {bits}": QuantSpec(f"int{bits}", GROUP, scale="bfloat16"),
            f"gptq {bits}": QuantSpec(
                f"int{bits}", GROUP, grid="gptq", scale="bfloat16"
            ),
            f"full {bits}": QuantSpec(
                f"int{bits}", GROUP, grid="full", scale="bfloat16"
            ),
        }
        for name, options in methods.items():
            rule = Rule("*", asymmetric, options=tuple(sorted(options.items())))
            yield f"w{bits} asymmetric, {name}", Recipe("ablation", (*kept, rule))
        for grid, spec in grids.items():
            for name in ("absmax", "mse"):
                rule = Rule("*", spec, options=tuple(sorted(methods[name].items())))
                label = f"w{bits} {grid.split()[0]} grid, {name}"
                yield label, Recipe("ablation", (*kept, rule))


def measure(
    lm: LM, windows: np.ndarray, recipes: dict[str, Recipe], *, dequantize: bool
) -> list[list[str]]:
    """Return one row per recipe, the float model first.

    Args:
        lm: the float model.
        windows: tokens.
        recipes: by name.
        dequantize: run the float function on the dequantized weights: the same numbers
            for weight-only recipes, and one compilation serves them all.
    """
    run = jax.jit(lm.apply)
    reference = list(logits_of(run, lm.params, windows))
    rows: list[list[str]] = []
    float_perplexity = evaluate(run, lm.params, windows).perplexity
    for name, recipe in {"float": None, **recipes}.items():
        start = time.perf_counter()
        small = lm if recipe is None else lm.quantize(recipe)
        jax.block_until_ready(small.params)
        seconds = time.perf_counter() - start
        params = jaxq.dequantize_params(small.params) if dequantize else small.params
        out = evaluate(run, params, windows, reference)
        rows.append(
            [
                name,
                f"{stored_bytes(small.params) * 8 / parameters(lm):.3f}",
                f"{out.perplexity:.4f}",
                f"{100 * (out.perplexity / float_perplexity - 1):+.2f} %",
                f"{out.kl:.5f}",
                f"{100 * (out.top1 or 0):.2f} %",
                f"{seconds:.1f}",
            ]
        )
    return rows


def parameters(lm: LM) -> int:
    """Return how many numbers the model has."""
    return sum(x.size for x in jax.tree.leaves(lm.params))


COLUMNS = ("recipe", "bits", "perplexity", "to float", "KL", "top-1", "seconds")


def main() -> None:
    """Measure, print, and write."""
    options = arguments("Perplexity, KL and agreement of every preset.").parse_args()
    lm = jaxq.load_model("demo")
    text = (Path(jaxq.__file__).parent / "demo_model" / "eval.txt").read_text("utf-8")
    windows = text_windows(lm, text, 512)
    spread = np.linspace(0, len(windows) - 1, 24 if options.quick else 96).astype(int)
    windows = windows[spread]
    weight_only, both = {}, {}
    for name, recipe in PRESETS.items():
        has_activation = any(rule.activation for rule in recipe.rules)
        (both if has_activation else weight_only)[name] = recipe
    rows = measure(lm, windows, weight_only, dequantize=True)
    rows += measure(lm, windows, both, dequantize=False)[1:]
    fewer = windows[:: 4 if options.quick else 2]
    clip = measure(lm, fewer, dict(ablation()), dequantize=True)
    publish(
        "demo_model",
        ABOUT,
        [
            Table(f"## Presets ({windows.size:,} tokens)", COLUMNS, rows),
            Table(f"## Grids and clipping of RTN (group {GROUP})", COLUMNS, clip),
        ],
        options,
    )


if __name__ == "__main__":
    main()
