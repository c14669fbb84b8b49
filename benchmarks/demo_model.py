"""What every preset costs the demo model, and which range suits which bits."""

import dataclasses
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np

import jaxq
from benchmarks.report import Table, arguments, publish
from jaxq import PRESETS, QuantSpec, Recipe
from jaxq.evaluate import Evaluation, evaluate, logits_of, text_windows
from jaxq.lm import DEMO_FOLDER, LM, load_model

GROUP = 64
BATCH = 8
CLIPS: dict[str, dict[str, object]] = {
    "absmax": {"clip": "absmax"},
    "percentile 99.9": {"clip": "percentile", "percent": 99.9},
    "percentile 99": {"clip": "percentile", "percent": 99.0},
    "mse": {"clip": "mse"},
    "mse, squares": {"clip": "mse", "exponent": 2.0},
}
ABOUT = """\
The demo model on its held-out text: windows of 512 tokens that do not overlap, float32
arithmetic. `bits` counts every stored byte of every parameter. KL is that of the float
model to the quantized one, in nats per token; top-1 the share of tokens where both find
the same likeliest."""


def grids(bits: int) -> Iterator[tuple[str, QuantSpec]]:
    """Yield the symmetric grids and the asymmetric one, in groups of 64."""
    for grid in ("restricted", "gptq", "full"):
        yield grid, QuantSpec(f"int{bits}", GROUP, grid=grid, scale="bfloat16")
    yield (
        "asymmetric",
        QuantSpec(f"uint{bits}", GROUP, symmetric=False, scale="bfloat16"),
    )


def recipe_of(spec: QuantSpec, options: dict[str, object]) -> Recipe:
    """Return the recipe of w4a16 with another spec and other options."""
    *kept, last = PRESETS["w4a16"].rules
    rule = dataclasses.replace(last, weight=spec, options=options)
    return Recipe(spec.describe(), (*kept, rule))


@dataclasses.dataclass(frozen=True)
class Study:
    """The float model, the text, and what the model says of it.

    Attributes:
        lm: the model.
        windows: the text.
        reference: the float model's logits, batch by batch.
    """

    lm: LM
    windows: np.ndarray
    reference: list[jax.Array]

    @classmethod
    def of(cls, limit: int | None) -> "Study":
        """Load the model, and run it on at most ``limit`` windows."""
        lm = load_model("demo", dtype="float32")
        text = (DEMO_FOLDER / "eval.txt").read_text(encoding="utf-8")
        windows = text_windows(lm, text, limit=limit)
        return cls(lm, windows, list(logits_of(lm.apply, lm.params, windows)))

    def measure(self, lm: LM, params: object) -> Evaluation:
        """Score parameters against the float model."""
        return evaluate(lm.apply, params, self.windows, self.reference, batch=BATCH)


def presets(study: Study) -> Table:
    """Measure every preset through its own kernels."""
    lm = study.lm
    float_one = study.measure(lm, lm.params)
    rows = [("float", lm, float_one, 0.0)]
    for name in PRESETS:
        start = time.perf_counter()
        small = lm.quantize(name)
        jax.block_until_ready(small.params)
        seconds = time.perf_counter() - start
        rows.append((name, small, study.measure(small, small.params), seconds))
        print(name, rows[-1][2].perplexity, file=sys.stderr)
    return Table(
        f"## Presets, {float_one.tokens} tokens",
        (
            "recipe",
            "bits",
            "MB",
            "perplexity",
            "against float",
            "KL",
            "top-1",
            "quantize s",
        ),
        [
            (
                name,
                f"{model.bits_per_weight:.3f}",
                f"{model.nbytes / 1e6:.2f}",
                f"{found.perplexity:.4f}",
                f"{found.perplexity / float_one.perplexity - 1:+.3%}",
                f"{found.kl:.5f}",
                f"{found.top1:.2%}",
                f"{seconds:.1f}",
            )
            for name, model, found, seconds in rows
        ],
    )


def ranges(study: Study, bits: int) -> Table:
    """Measure all grids and clipping methods at one width, on dequantized weights."""
    lm, rows = study.lm, []
    for grid, spec in grids(bits):
        cells = []
        for options in CLIPS.values():
            params = lm.quantize(recipe_of(spec, options)).params
            found = study.measure(lm, jaxq.dequantize_params(params))
            cells.append(f"{found.perplexity:.3f} ({found.kl:.4f})")
        rows.append((grid, *cells))
        print(bits, grid, *cells, file=sys.stderr)
    return Table(
        f"## {bits} bits: grids and clipping",
        ("grid", *CLIPS),
        rows,
        (f"Groups of {GROUP}, bfloat16 scales: perplexity (KL to float).",),
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--windows", type=int, help="of text (default: all)")
    parser.add_argument("--range-windows", type=int, default=48, help="for the grids")
    options = parser.parse_args()
    limit = options.windows or (8 if options.quick else None)
    tables = [presets(Study.of(limit))]
    study = Study.of(min(options.range_windows, 8 if options.quick else 10**9))
    tables += [ranges(study, bits) for bits in ((4,) if options.quick else (4, 3, 2))]
    publish("demo_model", ABOUT, tables, options)


if __name__ == "__main__":
    main()
