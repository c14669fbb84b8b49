"""Which order, scale search, damping and tuning GPTQ should have by default."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
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
nats per token on held-out windows of 512, with its standard deviation over seeds and
its ratio to rounding to nearest in the full range; seconds are those of the fastest
run, compilation included."""

COLUMNS = ("method", "KL", "of RTN", "perplexity", "seconds", "seeds")

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


def needs_data(bits: int, group: int, name: str) -> bool:
    """Return whether a method calibrates, so that seeds matter."""
    rules = recipe(bits, group, METHODS[name]).rules
    return any(rule.weight and rule.needs_data for rule in rules)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One quantization: which, and what it gave."""

    bits: int
    group: int
    method: str
    seed: int
    kl: float = math.nan
    perplexity: float = math.nan
    seconds: float = math.nan

    @property
    def asked(self) -> tuple[int, int, str, int]:
        """What was to be measured."""
        return self.bits, self.group, self.method, self.seed


@dataclasses.dataclass(frozen=True)
class Bench:
    """The model, its calibration text, and the float model's answers on held-out text.

    Attributes:
        lm: the float model.
        text: tokens to draw calibration windows from.
        windows: the held-out text.
        run: the compiled forward function.
        reference: its logits on the held-out text.
    """

    lm: LM
    text: np.ndarray
    windows: np.ndarray
    run: Callable[..., jax.Array]
    reference: Sequence[np.ndarray]

    @classmethod
    def open(cls, every: int) -> "Bench":
        """Load the demo model; score every so manieth window."""
        lm = jaxq.load_model("demo", dtype=jnp.float32)
        windows = text_windows(lm, (FOLDER / "eval.txt").read_text("utf-8"), 512)
        windows = windows[::every]
        run = jax.jit(lm.forward)
        text = lm.encode((FOLDER / "calibration.txt").read_text("utf-8"))
        reference = list(logits_of(run, lm.params, windows))
        return cls(lm, text, windows, run, reference)

    def measure(self, cell: Cell) -> Cell:
        """Quantize, and evaluate."""
        how = recipe(cell.bits, cell.group, METHODS[cell.method])
        tokens = draw_windows(self.text, 512, 128, cell.seed)
        start = time.perf_counter()
        small = self.lm.quantize(how, tokens)
        jax.block_until_ready(small.params)
        seconds = time.perf_counter() - start
        floats = jaxq.dequantize_params(small.params)
        out = evaluate(self.run, floats, self.windows, self.reference)
        done = {"kl": out.kl or 0.0, "perplexity": out.perplexity, "seconds": seconds}
        return dataclasses.replace(cell, **done)


def measured(bench: Bench, cells: Sequence[Cell], path: Path | None) -> list[Cell]:
    """Return the cells measured; those that the file holds are not measured again."""
    known: dict[tuple[int, int, str, int], Cell] = {}
    if path is not None and path.exists():
        lines = path.read_text("utf-8").splitlines()
        known = {c.asked: c for c in (Cell(**json.loads(line)) for line in lines)}
    out = []
    for cell in cells:
        done = known.get(cell.asked) or bench.measure(cell)
        print(*dataclasses.astuple(done), flush=True)
        out.append(done)
        if path is not None and cell.asked not in known:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(done)) + "\n")
    return out


def rows(cells: Sequence[Cell]) -> Iterator[list[str]]:
    """Yield a row for every method, over its seeds."""
    runs: dict[tuple[int, int, str], list[Cell]] = {}
    for cell in cells:
        runs.setdefault(cell.asked[:3], []).append(cell)
    for (bits, group, method), mine in runs.items():
        kls = [cell.kl for cell in mine]
        base = runs.get((bits, group, "rtn"), [Cell(bits, group, "rtn", 0)])[0].kl
        spread = f" ± {np.std(kls, ddof=1):.5f}" if len(kls) > 1 else ""
        yield [
            method,
            f"{np.mean(kls):.5f}{spread}",
            f"{np.mean(kls) / base:.3f}",
            f"{np.mean([cell.perplexity for cell in mine]):.3f}",
            f"{min(cell.seconds for cell in mine):.0f}",
            str(len(mine)),
        ]


def main() -> None:
    """Measure, print, and write."""
    parser = arguments("GPTQ's defaults on the demo model.")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--groups", type=int, nargs="*", default=[64])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument(
        "--cells", type=Path, help="keep what is measured here, and go on from it"
    )
    options = parser.parse_args()
    bench = Bench.open(every=8 if options.quick else 3)
    names = dict.fromkeys(["rtn", *options.methods])
    tables = []
    for group in options.groups:
        for bits in options.bits:
            cells = [
                Cell(bits, group, name, seed)
                for name in names
                for seed in (options.seeds if needs_data(bits, group, name) else [0])
            ]
            done = measured(bench, cells, options.cells)
            tables.append(
                Table(f"## {bits} bits, groups of {group}", COLUMNS, list(rows(done)))
            )
    about = f"{ABOUT} {bench.windows.size:,} tokens are scored."
    publish("gptq_ablation", about, tables, options)


if __name__ == "__main__":
    main()
