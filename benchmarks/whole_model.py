"""Seconds per block, and peak memory by depth, of a model quantized from its folder."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import jaxq
from benchmarks.memory import peak
from benchmarks.random_llama import random_llama
from benchmarks.report import Table, arguments, publish
from jaxq.checkpoints.huggingface import write_folder
from jaxq.models import find_family
from jaxq.plan import PlanRow

ABOUT = """\
A random Llama, 1024 wide with layers of 12.8 million weights in bfloat16, quantized by
`w4a16-gptq` from its folder into another with `jaxq.quantize_to`: weights are read and
written block by block. Every run is a process of its own. A block's seconds are the
time between two commits, so they hold the forward passes, the solving and the writing;
the first block's also compile. Peak memory is the process's largest resident set."""

WIDTH, INNER, VOCAB = 1024, 2816, 1024


def write_model(folder: Path, layers: int) -> Path:
    """Write a random Llama."""
    hf_config = random_llama(layers, WIDTH, INNER, VOCAB, "bfloat16")
    family = find_family(hf_config)
    config = family.read_config(hf_config)
    shapes = family.abstract(config, jax.numpy.bfloat16)
    rng = np.random.default_rng(0)

    def fill(s: jax.ShapeDtypeStruct) -> np.ndarray:
        scale = 1.0 if len(s.shape) == 1 else s.shape[0] ** -0.5
        draw = rng.standard_normal(s.shape, np.float32) * scale
        return (1 + 0.1 * draw if len(s.shape) == 1 else draw).astype(s.dtype)

    write_folder(folder, hf_config, family.slots(config), jax.tree.map(fill, shapes))
    return folder


def child(model: str, out: str, sequences: int, length: int) -> None:
    """Quantize, and print times and memory as JSON."""
    lm = jaxq.load_model(model, lazy=True)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (sequences, length))
    marks: list[tuple[str, float]] = [("", time.perf_counter())]

    def progress(row: PlanRow, done: int, total: int) -> None:
        marks.append((row.path, time.perf_counter()))

    jaxq.quantize_to(lm, out, "w4a16-gptq", tokens.astype(np.int32), progress=progress)
    ends: dict[str, float] = {}
    for path, moment in marks[1:]:
        if "/layers_" in path:
            ends[path.split("/")[1]] = moment
    moments = [marks[0][1], *ends.values()]
    seconds = np.diff(moments).tolist()
    print(json.dumps({"seconds": seconds, "peak": peak()}))


def run(layers: int, sequences: int, length: int) -> dict:
    """Quantize a model of so many layers in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch) / "model", layers)
        command = [sys.executable, "-m", "benchmarks.whole_model", "--child"]
        command += [str(model), f"{scratch}/out", str(sequences), str(length)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout)


def timing(options: argparse.Namespace) -> Table:
    """Return the table of seconds per block."""
    sequences = 16 if options.quick else 64
    seconds = run(16, sequences, 512)["seconds"]
    first, rest = seconds[0], seconds[1:]
    rows = [
        ["first (compiles)", f"{first:.1f}"],
        ["others, median", f"{np.median(rest):.1f}"],
        ["others, least and most", f"{min(rest):.1f} – {max(rest):.1f}"],
        ["last eight over the eight before", f"{_trend(rest):.2f}"],
    ]
    title = f"## Seconds per block (16 layers, {sequences}×512 tokens)"
    return Table(title, ("block", "seconds"), rows)


def _trend(seconds: list[float]) -> float:
    """Return the median of the later half over that of the earlier half."""
    half = len(seconds) // 2
    return float(np.median(seconds[half:]) / np.median(seconds[:half]))


def memory() -> Table:
    """Return the table of peak memory by depth."""
    rows = []
    found = {layers: run(layers, 16, 128) for layers in (8, 16, 32)}
    for layers, out in found.items():
        size = layers * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER) * 2 / 2**20
        rows.append(
            [
                f"{layers} layers",
                f"{size:.0f}",
                f"{out['peak']:.0f}",
                f"{out['peak'] / found[8]['peak']:.3f}",
            ]
        )
    columns = ("model", "weights, MiB", "peak, MiB", "to 8 layers")
    return Table("## Peak resident memory (16×128 tokens)", columns, rows)


def main() -> None:
    """Measure, print, and write."""
    if "--child" in sys.argv:
        model, out, sequences, length = sys.argv[sys.argv.index("--child") + 1 :]
        child(model, out, int(sequences), int(length))
        return
    parser = arguments("Seconds and memory of whole models.")
    parser.add_argument("--only", choices=("memory", "seconds"), help="one table")
    options = parser.parse_args()
    tables = [memory()] if options.only != "seconds" else []
    tables += [timing(options)] if options.only != "memory" else []
    publish("whole_model", ABOUT, tables, options)


if __name__ == "__main__":
    main()
