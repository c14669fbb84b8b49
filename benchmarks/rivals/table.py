"""Evaluate every run alike, and write the table."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
from benchmarks.report import RESULTS, Table, machine
from benchmarks.rivals.protocol import RECORD
from jaxq.evaluate import evaluate, logits_of, text_windows
from jaxq.lm import DEMO_FOLDER

EVERY = 3  # windows of the evaluation text: all would take thrice as long
REFERENCE = ("jaxq", "rtn-bfloat16")
COLUMNS = (
    "quantizer",
    "KL",
    "± draws",
    "/ RTN",
    "perplexity",
    "top-1",
    "CPU s",
    "draws",
)
ABOUT = """\
Other libraries' quantizers and jaxq's on the embedded demo model: the linear layers of
all decoder blocks in groups of 64, embedding and head float. All calibrate on the same
128 windows of 512 tokens, drawn at random offsets of `calibration.txt`, three draws.
What each library's own format stands for is put back into the float checkpoint, in
float32, and scored by `jaxq.evaluate` on `eval.txt`: KL(float || quantized) in
nats per token, perplexity, and how often both prefer the same token, means over the
draws. `± draws` is the standard deviation of the KL over draws, `/ RTN` its ratio to
rounding to nearest with zero points and bfloat16 scales. `CPU s` are the seconds of all
cores in the quantizing call, of the cheapest draw: compilation included, imports and
loading aside. (The machine did other work too, so times on the wall say little.)"""


@dataclasses.dataclass(frozen=True)
class Run:
    """One quantized model and what it scored."""

    record: dict[str, Any]
    perplexity: float
    kl: float
    top1: float

    @property
    def key(self) -> tuple[str, str]:
        """Who quantized it, and how."""
        return self.record["package"], self.record["method"]


class Judge:
    """The float model's logits on the evaluation text, and scores against them."""

    def __init__(self, text: Path, every: int) -> None:
        lm = jaxq.load_model(DEMO_FOLDER, jnp.float32)
        self._apply = jax.jit(lm.apply)
        self._windows = text_windows(lm, text.read_text("utf-8"), 512)[::every]
        self._kept = f"scores-every-{every}.json"
        self._logits = list(logits_of(self._apply, lm.params, self._windows))
        own = evaluate(self._apply, lm.params, self._windows)
        self.perplexity, self.tokens = own.perplexity, own.tokens

    def score(self, folder: Path) -> dict[str, float]:
        """Return the scores of a run, kept beside it once they are known."""
        kept = folder / self._kept
        if not kept.exists():
            params = jaxq.load_model(folder, jnp.float32).params
            out = evaluate(self._apply, params, self._windows, self._logits)
            scores = {"perplexity": out.perplexity, "kl": out.kl, "top1": out.top1}
            kept.write_text(json.dumps(scores) + "\n")
        return json.loads(kept.read_text())


def row(runs: Sequence[Run], reference: float) -> list[str]:
    """Return the line of one quantizer at one width."""
    record = runs[0].record
    kl = np.array([run.kl for run in runs])
    grid = "symmetric" if record["symmetric"] else "asymmetric"
    return [
        f"{record['package']} {record['version']}, {record['method']}, {grid}",
        f"{kl.mean():.5f}",
        f"{kl.std(ddof=1):.5f}" if len(runs) > 1 else "",
        f"{kl.mean() / reference:.3f}",
        f"{np.mean([run.perplexity for run in runs]):.3f}",
        f"{100 * np.mean([run.top1 for run in runs]):.2f} %",
        f"{min(run.record['cpu_seconds'] for run in runs):.0f}",
        f"{len(runs)}",
    ]


def tables(runs: Sequence[Run]) -> list[Table]:
    """Return one table per width, the smallest divergence first."""
    out = []
    for bits in (4, 3, 2):
        groups: dict[tuple[str, str], list[Run]] = {}
        for run in runs:
            if run.record["bits"] == bits:
                groups.setdefault(run.key, []).append(run)
        if not groups:
            continue
        reference = _mean_kl(groups[REFERENCE])
        means = {
            key: np.mean([run.kl for run in group]) for key, group in groups.items()
        }
        ranked = sorted(groups, key=means.__getitem__)
        rows = [row(groups[key], reference) for key in ranked]
        out.append(Table(f"## {bits} bits", COLUMNS, rows))
    return out


def _mean_kl(runs: Sequence[Run]) -> float:
    return float(np.mean([run.kl for run in runs]))


def notes(runs: Sequence[Run]) -> list[str]:
    """Return what the drivers say about their runs, each once."""
    said = {(run.key, run.record.get("note", "")) for run in runs}
    return [f"- {key[0]}, {key[1]}: {note}." for key, note in sorted(said) if note]


def main() -> None:
    """Evaluate the runs that have no score yet, print the table, and write it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR")
    parser.add_argument("--text", type=Path, default=DEMO_FOLDER / "eval.txt")
    parser.add_argument("--remark", action="append", default=[], metavar="TEXT")
    parser.add_argument("--every", type=int, default=EVERY, metavar="N")
    parser.add_argument("--out", type=Path, default=RESULTS / "rivals.md")
    args = parser.parse_args()
    judge = Judge(args.text, args.every)
    folders = sorted(path.parent for path in args.runs.glob(f"*/{RECORD}"))
    runs = [
        Run(json.loads((folder / RECORD).read_text()), **judge.score(folder))
        for folder in folders
    ]
    float_line = (
        f"The float model's perplexity is {judge.perplexity:.3f} over "
        f"{judge.tokens:,} predicted tokens (windows 0, {args.every}, "
        f"{2 * args.every}, ... of the text). {machine()}."
    )
    parts = ["# rivals", ABOUT, float_line]
    parts += ["\n".join(table.lines()) for table in tables(runs)]
    parts += ["## Notes", "\n".join([*notes(runs), *(f"- {r}" for r in args.remark)])]
    text = "\n\n".join(parts) + "\n"
    args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
