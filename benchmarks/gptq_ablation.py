"""Which order, scale search, damping and tuning GPTQ should have by default."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
from benchmarks.report import Table, arguments, publish
from jaxq import QuantSpec, Recipe, Rule
from jaxq.evaluate import draw_windows, evaluate, logits_of, text_windows
from jaxq.lm import LM
from jaxq.method import Chain, Method, autoround, awq, chain, gptq, rtn

ABOUT = """\
The demo model in float32, its decoder layers quantized with zero points and bfloat16
scales, embedding and head float. Calibration: 128 windows of 512 tokens, drawn at
random offsets of the calibration text, one draw per seed. KL(float || quantized) in
nats per token on held-out windows of 512, with the spread over seeds and the ratio to
round to nearest in the full range."""

FOLDER = Path(jaxq.__file__).parent / "demo_model"

BEST = {"damping": 0.01, "drift": 0.75, "correction": "target", "sweeps": 2}

METHODS: dict[str, Method | Chain] = {
    "rtn": rtn(),
    "preset": gptq(**BEST),
    "tuned preset": autoround(**BEST),
    "awq": chain(awq(), rtn(clip="output")),
    "published: natural order, absmax, damping .01": gptq(
        order="natural", search="absmax", damping=0.01
    ),
    "activation order, importance, damping .05": gptq(search="importance"),
    "activation order, importance^3, damping .01": gptq(
        search="importance", exponent=3.0, damping=0.01
    ),
    "activation order, conditional, damping .05": gptq(),
    "activation order, conditional, damping .01": gptq(damping=0.01),
    "activation order, conditional, damping .003": gptq(damping=0.003),
    "conditional, .01, 2 sweeps": gptq(damping=0.01, sweeps=2),
    "conditional, .01, target .5": gptq(damping=0.01, drift=0.5, correction="target"),
    "conditional, .01, target 1": gptq(damping=0.01, drift=1.0, correction="target"),
    "conditional, .01, target .5, 2 sweeps": gptq(**BEST | {"drift": 0.5}),
    "conditional, .003, target .75, 2 sweeps": gptq(**BEST | {"damping": 0.003}),
    "gptaq .25": gptq(damping=0.01, drift=0.25),
}


def recipe(bits: int, group: int, method: Method | Chain) -> Recipe:
    """Return the recipe that quantizes the decoder layers, and nothing else."""
    spec = QuantSpec(f"uint{bits}", group, symmetric=False, scale="bfloat16")
    kept = Rule("*", ops=("gather",), required=False)
    head = Rule("*lm_head*", required=False)
    return Recipe(f"w{bits}", (kept, head, Rule("*", spec, solver=method)))


def measure(
    lm: LM, windows: np.ndarray, seeds: Sequence[int], cases: Sequence[tuple]
) -> Iterator[list[str]]:
    """Yield one row per case: bits, group, name and method."""
    run = jax.jit(lm.forward)
    reference = list(logits_of(run, lm.params, windows))
    text = lm.encode((FOLDER / "calibration.txt").read_text("utf-8"))
    base: dict[tuple[int, int], float] = {}
    for bits, group, name in cases:
        method, kls, perplexities, seconds = METHODS[name], [], [], []
        how = recipe(bits, group, method)
        needy = any(rule.weight and rule.needs_data for rule in how.rules)
        for seed in seeds if needy else seeds[:1]:
            tokens = draw_windows(text, 512, 128, seed)
            start = time.perf_counter()
            small = lm.quantize(how, tokens)
            jax.block_until_ready(small.params)
            seconds.append(time.perf_counter() - start)
            out = evaluate(
                run, jaxq.dequantize_params(small.params), windows, reference
            )
            kls.append(out.kl or 0.0)
            perplexities.append(out.perplexity)
        kl = float(np.mean(kls))
        if name == "rtn":
            base[bits, group] = kl
        spread = f" ± {np.std(kls):.5f}" if len(kls) > 1 else ""
        row = [
            f"w{bits} g{group} {name}",
            f"{kl:.5f}{spread}",
            f"{kl / base.get((bits, group), np.nan):.3f}",
            f"{np.mean(perplexities):.3f}",
            f"{np.mean(seconds):.0f}",
        ]
        print(*row, flush=True)
        yield row


def main() -> None:
    """Measure, print, and write."""
    parser = arguments("GPTQ's defaults on the demo model.")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--groups", type=int, nargs="*", default=[64])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    options = parser.parse_args()
    lm = jaxq.load_model("demo", dtype=jnp.float32)
    windows = text_windows(lm, (FOLDER / "eval.txt").read_text("utf-8"), 512)
    windows = windows[:: 8 if options.quick else 3]
    names = dict.fromkeys(["rtn", *options.methods])
    cases = [(b, g, n) for g in options.groups for b in options.bits for n in names]
    rows = list(measure(lm, windows, options.seeds, cases))
    columns = ("method", "KL", "of RTN", "perplexity", "seconds")
    title = f"## Held-out KL ({windows.size:,} tokens)"
    publish("gptq_ablation", ABOUT, [Table(title, columns, rows)], options)


if __name__ == "__main__":
    main()
