"""Peak memory of reading, converting and making checkpoints of other libraries."""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

import jaxq
from benchmarks.memory import peak, resident
from benchmarks.random_llama import random_llama
from benchmarks.report import Table, arguments, publish
from jaxq.codecs.folder import SafetensorsSink
from jaxq.codecs.table import CODECS
from jaxq.codecs.unpacked import Unpacked
from jaxq.heap import give_back
from jaxq.models import find_family
from jaxq.spec import QuantSpec

ABOUT = """\
A random Llama, 1024 wide, of 16 layers of 17 million weights each, in most formats that
jaxq writes, in shards of at most 100 MB: a weight is as large beside a shard as one of
70 billion is beside 5 GB. Each run is a process of its own, which first does the same
to a model of one layer, so that what is compiled is not counted. *Extra* is how far the
largest resident set rises above that, less what is returned; the project's bound is 1.3
of the largest shard. Converting returns nothing. Quantizing is rounding to nearest from
a float folder into shards of 20 MB: what solving needs besides is a block's."""

WIDTH, INNER, LAYERS, VOCAB = 1024, 4096, 16, 4096
SHARD = 100 * 10**6
BOUND = 1.3
QUANTIZE, SMALL_SHARD, DEPTHS = "quantize", 20 * 10**6, (8, 32)
HALF = {"scale": "float16"}
SPECS = {
    "float": None,
    "gptq": QuantSpec("uint4", 128, symmetric=False, **HALF),
    "awq": QuantSpec("uint4", 128, symmetric=False, **HALF),
    "compressed-tensors": QuantSpec("int4", 128, grid="gptq", **HALF),
    "bitsandbytes": QuantSpec("nf4", 64),
    "fp8": QuantSpec("fp8_e4m3", (128, 128)),
}
# what is converted: source, target, whether weights are rounded anew
CONVERTED = [
    ("gptq", "compressed-tensors", False),
    ("gptq", "float", False),
    ("float", "float", False),
    ("gptq", "bitsandbytes", True),
    ("compressed-tensors", "gguf", True),
]


def write_model(folder: Path, name: str, layers: int = LAYERS) -> Path:
    """Write a random Llama in a format."""
    config = random_llama(layers, WIDTH, INNER, VOCAB, "float16")
    folder.mkdir(parents=True)
    family = find_family(config)
    write = None if name == "float" else CODECS[name].write
    sink = SafetensorsSink(folder, None if write is None else write(), SHARD)
    rng = np.random.default_rng(0)
    for tensor, slot in family.slots(family.read_config(config)).items():
        spec = SPECS[name]
        if spec is not None and slot.transposed and "layers" in tensor:
            layer = random_layer(rng, slot.shape[::-1], spec)
            sink.quantized(tensor.removesuffix(".weight"), layer)
        else:
            bits = rng.integers(0x3000, 0x3400, slot.shape, np.uint16)
            sink.floating(tensor, bits.view(np.float16), slot.transposed)
    sink.close(config)
    return folder


def random_layer(
    rng: np.random.Generator, shape: tuple[int, int], spec: QuantSpec
) -> Unpacked:
    """Return a layer of random codes."""
    block = spec.block if isinstance(spec.block, tuple) else (int(spec.block), 1)
    grid = tuple(n // b for n, b in zip(shape, block, strict=True))
    high = 2**spec.bits if spec.bits < 8 else 0x7F
    scales = rng.uniform(0.01, 0.02, grid)
    return Unpacked(
        codes=rng.integers(0, high, shape, np.uint8),
        scales=scales.astype(np.float16 if spec.scale == "float16" else np.float32),
        spec=spec,
        block=block,
        dtype=np.dtype("float16" if spec.bits < 8 else ml_dtypes.bfloat16),
        zeros=None if spec.symmetric else rng.integers(1, 16, grid, np.uint8),
    )


def child(warm: str, model: str, out: str, to: str, requantize: str) -> None:
    """Read a model, convert or quantize it, and print memory as JSON, in MiB."""

    def work(source: str, target: str) -> Any:
        if to == "read":
            return jaxq.load_model(source)
        if to.startswith(QUANTIZE):
            return quantize_to(source, target, to.removeprefix(f"{QUANTIZE} "))
        options = {"requantize": requantize == "True", "shard_bytes": SHARD}
        return jaxq.convert(source, target, to, **options)

    work(warm, f"{out}-warm")
    gc.collect()
    give_back()  # what was freed is not there to be reused
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = resident(), time.perf_counter()
    done = work(model, out)
    seconds = time.perf_counter() - start
    returned = 0.0
    if to == "read":
        leaves = jax.block_until_ready(jax.tree.leaves(done.params))
        returned = sum(a.nbytes for a in leaves) / 2**20
    rise = peak() - before
    print(json.dumps({"rise": rise, "returned": returned, "seconds": seconds}))


def quantize_to(source: str, target: str, to: str) -> Any:
    """Quantize a float model into the format of another library."""
    floats = (jaxq.Rule("*embed*"), jaxq.Rule("*lm_head*"))
    recipe = jaxq.Recipe("rounded", (*floats, jaxq.Rule("*", SPECS[to])))
    lm = jaxq.load_model(source, lazy=True)
    return jaxq.quantize_to(lm, target, recipe, to=to, shard_bytes=SMALL_SHARD)


def run(
    source: str, to: str, requantize: bool = False, layers: int = LAYERS
) -> dict[str, float]:
    """Measure in a process of its own; also the size of the largest shard."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        warm = write_model(folder / "warm", source, 1)
        model = write_model(folder / "model", source, layers)
        command = [sys.executable, "-m", "benchmarks.checkpoint_memory", "--child"]
        command += map(str, (warm, model, folder / "out", to, requantize))
        usual = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=usual
        )
        sizes = [p.stat().st_size for p in model.glob("*.safetensors")]
        written = [p.stat().st_size for p in folder.glob("out/*.safetensors")]
    found = json.loads(done.stdout)
    shard = max(*sizes, *written) / 2**20
    extra = found["rise"] - found["returned"]
    return found | {
        "file": sum(sizes) / 2**20,
        "shards": len(sizes),
        "written": sum(written) / 2**20,
        "shard": shard,
        "extra": extra,
        "share": extra / shard,
    }


def rows(cases: list[tuple[str, str, bool]]) -> Iterator[list[str]]:
    """Yield a row for each case."""
    for source, to, requantize in cases:
        out = run(source, to, requantize)
        name = source if to == "read" else f"{source} → {to}"
        yield [
            name + (" (requantized)" if requantize else ""),
            f"{out['file']:.0f} in {out['shards']}",
            f"{out['returned']:.0f}",
            f"{out['rise']:.0f}",
            f"{out['extra']:.0f}",
            f"{out['share']:.2f}",
            f"{out['seconds']:.1f}",
        ]


def depths() -> Iterator[list[str]]:
    """Yield a row for each depth of a model that is quantized."""
    for layers in DEPTHS:
        out = run("float", f"{QUANTIZE} gptq", layers=layers)
        figures = (out["file"], out["written"], out["rise"])
        rest = [f"{figure:.0f}" for figure in figures]
        yield [str(layers), *rest, f"{out['seconds']:.1f}"]


def main() -> None:
    """Measure, print, and write."""
    if "--child" in sys.argv:
        child(*sys.argv[sys.argv.index("--child") + 1 :])
        return
    options = arguments(
        "Peak memory of reading, converting and making checkpoints."
    ).parse_args()
    columns = ("format", "files", "returned", "rise", "extra", "of a shard", "seconds")
    reading = [(name, "read", False) for name in SPECS]
    tables = [
        Table("## Reading, MiB", columns, list(rows(reading))),
        Table("## Converting, MiB", columns, list(rows(CONVERTED))),
        Table(
            "## Quantizing to GPTQ's format, MiB",
            ("layers", "read", "written", "rise", "seconds"),
            list(depths()),
        ),
    ]
    publish("checkpoint_memory", ABOUT, tables, options)


if __name__ == "__main__":
    main()
