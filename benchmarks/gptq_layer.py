"""GPTQ of one weight, compile included, beside its equations in PyTorch."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.memory import peak, resident
from benchmarks.report import Table, arguments, publish
from jaxq import QuantSpec
from jaxq.solvers import Statistics, layer_loss, rtn, solve_with

GROUP = 128
SPEC = QuantSpec("uint4", GROUP, symmetric=False)
PUBLISHED = {"search": "absmax", "damping": 0.01}
CASES: dict[str, dict[str, Any]] = {
    "as published": {**PUBLISHED, "order": "natural"},
    "static order of activations": PUBLISHED,
    "jaxq's default": {},
    "default and two sweeps": {"sweeps": 2},
    "default, search by output": {"search": "output"},
}
ABOUT = """\
One square float32 weight, 4 bits asymmetric in groups of 128, its Gram matrix given.
Every measurement is a process of its own, so that *first* includes tracing and
compiling; rounds alternate with the same equations in PyTorch (`gptq_reference.py`:
three factorizations, lazy blocks of 128), and the best of each counts. *loss* is the
squared output error over that of round to nearest. *memory* is what XLA allots beyond
the arguments (weight and Gram), results included, over the size of the Gram matrix;
*peak* the growth of the process beyond its size before the first call, likewise."""


def layer(size: int, folder: Path) -> tuple[Path, Path]:
    """Write a weight ``[out, in]`` and the Gram matrix of correlated activations."""
    rng = np.random.default_rng(0)
    weight, gram = folder / "weight", folder / "gram"
    rng.standard_normal((size, size), np.float32).tofile(weight)
    mix = rng.standard_normal((size, size), np.float32) * np.float32(0.5 / size**0.5)
    mix[np.arange(size), np.arange(size)] += 1
    x = rng.standard_normal((2 * size, size), np.float32) @ mix
    x *= np.exp(0.5 * rng.standard_normal(size)).astype(np.float32)
    (x.T @ x).tofile(gram)
    return weight, gram


def measure_once(weight: Path, gram: Path, size: int, case: str) -> dict[str, float]:
    """Time the first and the second call, and what was allotted; a fresh process."""
    w = jnp.asarray(np.fromfile(weight, np.float32).reshape(size, size).T)
    h = jnp.asarray(np.fromfile(gram, np.float32).reshape(size, size))
    jax.block_until_ready((w, h))
    before = resident()
    start = time.perf_counter()
    lowered = solve_with.lower(
        w,
        Statistics(h, jnp.int32(2 * size)),
        spec=SPEC,
        solver="gptq",
        options=tuple(sorted(CASES[case].items())),
        contracting=(0,),
        stacked=(),
    )
    compiled = lowered.compile()
    ready = time.perf_counter()
    solved = jax.block_until_ready(compiled(w, Statistics(h, jnp.int32(2 * size))))
    first = time.perf_counter()
    most = peak()
    plan, plain = compiled.memory_analysis(), rtn(w, None, SPEC)
    allotted = plan.temp_size_in_bytes + plan.output_size_in_bytes
    return {
        "compile": ready - start,
        "run": first - ready,
        "seconds": first - start,
        "loss": float(layer_loss(w, solved.weight, h) / layer_loss(w, plain, h)),
        "plain": float(layer_loss(w, plain, h)),
        "memory": allotted / h.nbytes,
        "peak": (most - before) * 2**20 / h.nbytes,
    }


def child(command: list[str]) -> dict[str, Any]:
    """Run a process and return the JSON on its last line."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def options() -> argparse.Namespace:
    """Return the command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--size", type=int, default=0, help="rows and columns")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--torch", metavar="PYTHON", help="a Python that has torch; else no reference"
    )
    parser.add_argument("--one", nargs=3, metavar=("WEIGHT", "GRAM", "CASE"))
    return parser.parse_args()


def rounds(size: int, how: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Measure every case in turn, round by round."""
    results: dict[str, list[dict[str, Any]]] = {}
    reference = str(Path(__file__).with_name("gptq_reference.py"))
    with tempfile.TemporaryDirectory() as folder:
        weight, gram = map(str, layer(size, Path(folder)))
        for _ in range(how.rounds):
            for order in ("natural", "activation") if how.torch else ():
                command = [how.torch, reference, weight, gram, str(size), str(GROUP)]
                name = f"PyTorch, {order} order"
                results.setdefault(name, []).append(child([*command, order]))
            for case in CASES:
                me = [sys.executable, "-m", "benchmarks.gptq_layer", "--size"]
                command = [*me, str(size), "--one", weight, gram, case]
                results.setdefault(case, []).append(child(command))
    return results


def table(size: int, results: dict[str, list[dict[str, Any]]]) -> Table:
    """Return the best of all rounds, by case."""
    best = {
        name: min(all_, key=lambda r: r["seconds"]) for name, all_ in results.items()
    }
    plain = next(r["plain"] for r in best.values() if "plain" in r)
    torch = best.get("PyTorch, natural order")
    rows = []
    for name, result in best.items():
        ours = "compile" in result
        base = torch if "published" in name else best.get("PyTorch, activation order")
        loss = result["loss"] if ours else result["loss"] / plain
        rows.append(
            (
                name,
                f"{result['seconds']:.1f}",
                f"{result['compile']:.1f}" if ours else "",
                f"{min(r['run'] for r in results[name]):.1f}" if ours else "",
                f"{result['seconds'] / base['seconds']:.2f}" if ours and base else "",
                f"{loss:.4f}",
                f"{result['memory']:.2f}" if ours else "",
                f"{result['peak']:.2f}" if ours else "",
            )
        )
    return Table(
        f"## {size} x {size}, group {GROUP}",
        ("", "first s", "compile s", "run s", "/ PyTorch", "loss", "memory", "peak"),
        rows,
        ("`/ PyTorch`: the first call over the equations in the same order.",),
    )


def main() -> None:
    """Measure, print, and write."""
    how = options()
    size = how.size or (1024 if how.quick else 4096)
    if how.one:
        weight, gram, case = how.one
        print(json.dumps(measure_once(Path(weight), Path(gram), size, case)))
        return
    publish("gptq_layer", ABOUT, [table(size, rounds(size, how))], how)


if __name__ == "__main__":
    main()
