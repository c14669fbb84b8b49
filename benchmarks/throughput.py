"""How fast weights are quantized, packed, unpacked and read back, beside a copy."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
from benchmarks import timing
from benchmarks.report import Table, arguments, publish
from jaxq import QuantSpec
from pallas_kernels import layouts

SPECS: dict[str, QuantSpec] = {
    "int8": QuantSpec("int8"),
    "int4 g128": QuantSpec("int4", 128),
    "uint4 g128 asymmetric": QuantSpec("uint4", 128, symmetric=False),
    "uint3 g128 asymmetric": QuantSpec("uint3", 128, symmetric=False),
    "uint2 g128 asymmetric": QuantSpec("uint2", 128, symmetric=False),
    "uint5 g128 asymmetric": QuantSpec("uint5", 128, symmetric=False),
    "nf4 g64": QuantSpec("nf4", 64),
    "nf4 g64, double": QuantSpec(
        "nf4", 64, scale=QuantSpec("dynamic8", 256, center=True)
    ),
    "fp4 bitsandbytes g64": QuantSpec("fp4_bnb", 64),
    "dynamic8 g256": QuantSpec("dynamic8", 256),
    "fp8 e4m3": QuantSpec("fp8_e4m3"),
    "fp8 e5m2": QuantSpec("fp8_e5m2"),
    "mxfp8 g32": QuantSpec("fp8_e4m3", 32, scale="e8m0"),
    "mxfp4 g32": QuantSpec("fp4_e2m1", 32, scale="e8m0"),
    "nvfp4 g16": QuantSpec("fp4_e2m1", 16, scale=QuantSpec("fp8_e4m3", "tensor")),
}
ABOUT = """\
GB/s of float32 weights (4 bytes each), whatever the function reads and writes: so all
numbers compare with the plain copy. `pack` and `unpack` move codes of one byte and
count those. Best round of each; compiled."""


def compiled(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Compile, and bind the arguments."""
    return functools.partial(jax.jit(fn).lower(*args).compile(), *args)


def weights(size: int, seconds: float) -> Table:
    """Time quantize and dequantize for every format."""
    random = np.random.default_rng(0)
    w = jnp.asarray(random.standard_normal((size, size), np.float32))
    runs = {"copy": compiled(jnp.copy, w)}
    for name, spec in SPECS.items():
        runs[f"quantize {name}"] = compiled(lambda w, s=spec: jaxq.quantize(w, s), w)
        q = runs[f"quantize {name}"]()
        runs[f"dequantize {name}"] = compiled(jaxq.dequantize, q)
    times = timing.interleaved(runs, seconds=seconds, least_rounds=3)
    rates = {name: w.nbytes / t.minimum / 1e9 for name, t in times.items()}
    rows = [("copy", f"{rates['copy']:.2f}", "", "", "")]
    rows += [
        (
            name,
            f"{rates[f'quantize {name}']:.2f}",
            f"{rates[f'quantize {name}'] / rates['copy']:.2f}",
            f"{rates[f'dequantize {name}']:.2f}",
            f"{rates[f'dequantize {name}'] / rates['copy']:.2f}",
        )
        for name in SPECS
    ]
    return Table(
        f"## Weights, {size} x {size} float32",
        ("format", "quantize GB/s", "of copy", "dequantize GB/s", "of copy"),
        rows,
    )


def codes(size: int, seconds: float) -> Table:
    """Time packing and unpacking for every width."""
    random = np.random.default_rng(0)
    everything = random.integers(0, 256, (size, size), dtype=np.uint8)
    whole = jnp.asarray(everything)
    runs = {"copy": compiled(jnp.copy, whole)}
    for bits in range(2, 8):
        narrow = jnp.asarray(everything >> (8 - bits))
        pack = functools.partial(layouts.pack, bits=bits, axis=0, block=128)
        unpack = functools.partial(layouts.unpack, bits=bits, axis=0, block=128)
        runs[f"pack {bits}"] = compiled(pack, narrow)
        runs[f"unpack {bits}"] = compiled(unpack, runs[f"pack {bits}"]())
    times = timing.interleaved(runs, seconds=seconds, least_rounds=3)
    rates = {name: whole.nbytes / t.minimum / 1e9 for name, t in times.items()}
    rows = [("copy", f"{rates['copy']:.2f}", "")]
    rows += [
        (f"{b} bits", f"{rates[f'pack {b}']:.2f}", f"{rates[f'unpack {b}']:.2f}")
        for b in range(2, 8)
    ]
    return Table(
        f"## Codes, {size} x {size} bytes",
        ("width", "pack GB/s", "unpack GB/s"),
        rows,
    )


def main() -> None:
    options = arguments(__doc__).parse_args()
    size, seconds = (1024, 8.0) if options.quick else (4096, 60.0)
    tables = [weights(size, seconds), codes(size, seconds / 3)]
    publish("throughput", ABOUT, tables, options)


if __name__ == "__main__":
    main()
