"""Check, tune and time the GPU kernels on the GPU of this machine, in one go.

    python -m benchmarks.kernels --out DIR            all of it, under 8 minutes
    python -m benchmarks.kernels --out DIR --quick    one layer, few tiles
    python -m benchmarks.kernels --dry                only compile it all, without a GPU

A layer is timed as a stack of copies larger than the second-level cache, one after the
other in one compiled function: no copy is still in the cache when its turn comes again,
and launches overlap. Rates are of bytes of weight and scales (decode) or of
multiplications (prefill), beside what the same machine reached in the same run: a copy
of a gigabyte, and a bfloat16 product of 8192³. Times are medians of whole calls by the
clock of the host; peers that run in torch are timed with CUDA events.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import gpu_peers
from pallas_kernels import tuning
from pallas_kernels.gpu import (
    decode_attention,
    lookup_product,
    quantized_activation,
    triton_quantized_activation,
    triton_weight_only,
    weight_only,
    weight_only_prefill,
)
from pallas_kernels.gpu.cases import FP8, INT8, NF4, Case, numbers, reference, signed
from pallas_kernels.gpu.layout import Block
from pallas_kernels.kernel import Operands, Problem, tuning_key

BUDGET = 460.0  # seconds for everything
ROTATE = 600_000_000  # bytes of copies: ten times the largest cache
DECODE_LAYERS = ((4096, 14336), (8192, 8192), (8192, 28672), (4096, 4096))
DECODE_ROWS = (1, 8, 16, 32)
PREFILL = ((2048, 8192, 8192), (8192, 4096, 14336))
MODULES = (
    quantized_activation,
    weight_only_prefill,
    weight_only,
    triton_quantized_activation,
    triton_weight_only,
)


@dataclasses.dataclass
class Run:
    """Where results go, and the time that is left.

    Attributes:
        folder: for results.jsonl, report.md and tiles.json; None prints only.
        generation: ``"sm_90"`` ...
        quick: whether to do little.
        rows: of the report: what, time, rate, share.
        tiles: the best of each problem, for `pallas_kernels.tuning.load`.
    """

    folder: Path | None
    generation: str
    quick: bool
    began: float = dataclasses.field(default_factory=time.monotonic)
    rows: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    tiles: list[tuning.Tuned] = dataclasses.field(default_factory=list)

    def left(self) -> float:
        """Seconds of the budget."""
        return BUDGET - (time.monotonic() - self.began)

    def emit(self, **facts: Any) -> None:
        """Print a line of JSON and keep it."""
        line = json.dumps(facts)
        print(line, flush=True)
        if self.folder is not None:
            with (self.folder / "results.jsonl").open("a") as file:
                file.write(line + "\n")

    def modules(self) -> Sequence[Any]:
        """The kernels for this GPU, in order of preference."""
        return [m for m in MODULES if self.generation in m.KERNEL.generations]

    def module_for(self, p: Problem) -> Any | None:
        """The first kernel here that takes a problem, or None."""
        fits = (m for m in self.modules() if not m.KERNEL.refuses(p, self.generation))
        return next(fits, None)

    def publish(self) -> None:
        """Write the report and the tiles."""
        head = "| what | time | rate | of what this machine reaches | beside it |"
        lines = [head, "|---|---:|---:|---:|---:|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        print("\n".join(lines))
        if self.folder is not None:
            (self.folder / "report.md").write_text("\n".join(lines) + "\n")
            tuning.save(self.folder / "tiles.json", self.tiles)


# ------------------------------------------------------------------------- timing


def seconds(fn: Callable[..., Any], *args: Any, least: int = 7) -> float:
    """Return the median time of a call, compiled and warm."""
    jax.block_until_ready(fn(*args))
    taken: list[float] = []
    end = time.monotonic() + 0.3
    while len(taken) < least or (time.monotonic() < end and len(taken) < 100):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def copy_bandwidth() -> float:
    """Return bytes per second, read and written, of a large copy."""
    a = jnp.ones(1 << 28, jnp.float32)
    passes = 4

    def go(a: jax.Array) -> jax.Array:
        return lax.fori_loop(0, passes, lambda i, a: a + jnp.float32(1), a)

    return 2 * passes * a.nbytes / seconds(jax.jit(go), a)


def matmul_rate(n: int = 8192) -> float:
    """Return operations per second of a bfloat16 product."""
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in (0, 1))
    return 2 * n**3 / seconds(jax.jit(jnp.dot), a, b)


# ----------------------------------------------------------------------- problems


def random_operands(case: Case) -> Operands:
    """Return a case's arrays, made on the device."""
    p, coding = case.problem, case.coding
    keys = iter(jax.random.split(jax.random.key(0), 8))
    lead = () if p.layers is None else (p.layers,)
    block = Block(coding.bits)
    codes = (*lead, p.inner // block.rows * block.slabs, 32 * p.columns)
    words = jax.random.bits(next(keys), codes, jnp.uint16)
    if coding.kind == "float8_e4m3fn":
        words = words & jnp.uint16(0xBFBF)  # no NaN
    shape = (*lead, p.inner // p.group, p.columns)
    scales = jax.random.uniform(next(keys), shape, minval=0.01, maxval=0.02)
    x = jax.random.normal(next(keys), (p.rows, p.inner), jnp.float32)
    most = {"int8": 127.0, "float8_e4m3fn": 448.0}.get(p.activation or "")
    unit = None if most is None else jnp.max(jnp.abs(x), 1, keepdims=True) / most
    layer = None if p.layers is None else jnp.int32(0)
    return Operands(x.astype(p.dtype), words, scales, None, unit, layer)


def weight_bytes(p: Problem) -> int:
    """Return the bytes of one layer's codes and scales."""
    return (
        p.inner * p.columns * p.coding.bits // 8 + 4 * (p.inner // p.group) * p.columns
    )


def each_layer(module: Any, p: Problem, tile: Any) -> Callable[..., list[jax.Array]]:
    """Return a function that multiplies with one layer of a stack after the other."""
    names = [f.name for f in dataclasses.fields(Operands)]

    @jax.jit  # inside the other: a kernel is lowered once, not once per layer
    def one(arrays: Sequence[Any], layer: jax.Array | None) -> jax.Array:
        a = Operands(**dict(zip(names, arrays, strict=True)))
        return module.run(p, dataclasses.replace(a, layer=layer), tile, None)

    @jax.jit
    def every(*arrays: Any) -> list[jax.Array]:
        if p.layers is None:
            return [one(arrays, None)]
        return [one(arrays, jnp.int32(i)) for i in range(p.layers)]

    return every


def arrays_of(a: Operands) -> list[Any]:
    """Return the fields of operands, in order."""
    return [getattr(a, f.name) for f in dataclasses.fields(Operands)]


@functools.partial(jax.jit, static_argnums=0)
def by_xla(p: Problem, x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Return the product as XLA alone computes it: dequantize, multiply."""
    w = numbers(codes, p.coding, p.dtype).reshape(scales.shape[0], -1, p.columns)
    w = (w * scales[:, None]).reshape(p.inner, p.columns).astype(p.dtype)
    return x @ w


def error(p: Problem, a: Operands, y: jax.Array) -> float:
    """Return the largest error against float32, relative to the largest number."""
    if a.layer is not None:  # the others would only take memory
        i = int(a.layer)
        cut = lambda stack: None if stack is None else stack[i : i + 1]
        a = dataclasses.replace(
            a,
            codes=a.codes[i : i + 1],
            scales=a.scales[i : i + 1],
            zeros=cut(a.zeros),
            layer=jnp.int32(0),
        )
    expected = reference(p, a)
    off = jnp.max(jnp.abs(y.astype(jnp.float32) - expected))
    return float(off / jnp.max(jnp.abs(expected)))


# ----------------------------------------------------------------------- sections


def check(run: Run) -> None:
    """Run every case of every kernel and compare."""
    for module in run.modules():
        for case in module.CASES:
            p = case.problem
            if reason := module.KERNEL.refuses(p, run.generation):
                run.emit(check=module.KERNEL.name, case=case.name, skipped=reason)
                continue
            a = case.operands()
            tile = module.KERNEL.tile(p, run.generation)
            try:
                y = each_layer(module, p, tile)(*arrays_of(a))[-1]
                off, bound = error(p, a, y), 0.02
                run.emit(
                    check=module.KERNEL.name, case=case.name, error=off, ok=off < bound
                )
            except Exception as failure:  # a benchmark reports, and goes on
                run.emit(check=module.KERNEL.name, case=case.name, failed=_say(failure))
    for case in decode_attention.CASES:
        arrays = case.arrays()
        y = decode_attention.decode_attention(*arrays, bits=case.bits)
        expected = decode_attention.reference(*arrays, bits=case.bits)
        off = float(jnp.max(jnp.abs(y.astype(jnp.float32) - expected)))
        run.emit(check="decode_attention", case=case.name, error=off, ok=off < 0.02)
    for case in lookup_product.CASES:
        arrays = case.arrays()
        y = lookup_product.lookup_product(*arrays)
        expected = lookup_product.reference(*arrays)
        off = float(jnp.max(jnp.abs(y - expected)) / jnp.max(jnp.abs(expected)))
        run.emit(check="lookup_product", case=case.name, error=off, ok=off < 1e-3)


def tuned(
    run: Run, case: Case, until: float
) -> tuple[str, Any, float, Operands] | None:
    """Time every tile of the first kernel that takes a case; return the best."""
    p = case.problem
    module = run.module_for(p)
    if module is None:
        run.emit(tune=case.name, skipped=f"no kernel takes it on {run.generation}")
        return None
    a = random_operands(case)
    first = module.KERNEL.tile(p, run.generation)
    tiles = [first, *(row.tile for row in module.KERNEL.tiles if row.tile != first)]
    best: tuple[str, Any, float, Operands] | None = None
    for tile in tiles[: 2 if run.quick else None]:
        if time.monotonic() > until and best is not None:
            run.emit(tune=case.name, tile=str(tile), skipped="out of time")
            continue
        try:
            taken = seconds(each_layer(module, p, tile), *arrays_of(a)) / (
                p.layers or 1
            )
        except Exception as failure:
            run.emit(tune=case.name, tile=str(tile), failed=_say(failure))
            continue
        run.emit(
            tune=case.name, kernel=module.KERNEL.name, tile=str(tile), us=1e6 * taken
        )
        if best is None or taken < best[2]:
            best = module.KERNEL.name, tile, taken, a
    if best is not None:
        off = error(p, a, each_layer(module, p, best[1])(*arrays_of(a))[0])
        run.emit(tuned=case.name, tile=str(best[1]), us=1e6 * best[2], error=off)
        key = tuning_key(module.KERNEL, p)
        run.tiles.append(tuning.Tuned(key, best[1], best[2], ()))
    return best


def decode_cases(quick: bool) -> Iterator[Case]:
    """Yield the products of few rows, as stacks that no cache holds."""
    layers = DECODE_LAYERS[:1] if quick else DECODE_LAYERS
    for inner, columns in layers:
        for rows in (1, 16) if quick else DECODE_ROWS:
            yield _stack(
                Case(f"w4 g128, {rows} rows", rows, inner, columns, signed(4), 128)
            )
    if not quick:
        inner, columns = DECODE_LAYERS[1]
        yield _stack(Case("w8, 16 rows", 16, inner, columns, INT8))
        yield _stack(Case("nf4 g64, 16 rows", 16, inner, columns, NF4, 64))
        yield _stack(Case("w2 g128, 16 rows", 16, inner, columns, signed(2), 128))
        yield _stack(Case("w4a8 g128, 16 rows", 16, inner, columns, signed(4), 128,
                          activation="int8"))  # fmt: skip


def _stack(case: Case) -> Case:
    copies = max(2, -(-ROTATE // weight_bytes(case.problem)))
    return dataclasses.replace(case, layers=copies)


def prefill_cases(quick: bool) -> Iterator[Case]:
    """Yield the products of many rows."""
    for rows, inner, columns in PREFILL[:1] if quick else PREFILL:
        yield Case(f"w4 g128, {rows} rows", rows, inner, columns, signed(4), 128)
    cube = 2048 if quick else 8192
    yield Case(f"w8a8, {cube}³", cube, cube, cube, INT8, activation="int8")
    yield Case(f"fp8, {cube}³", cube, cube, cube, FP8, activation="float8_e4m3fn")


def decode(run: Run, bandwidth: float) -> None:
    """Time products of few rows beside bfloat16, XLA alone, and peers."""
    cases = list(decode_cases(run.quick))
    for i, case in enumerate(cases):
        share = max(run.left() - 170, 5) / (len(cases) - i)
        best = tuned(run, case, time.monotonic() + share)
        if best is None:
            continue
        p, (_, _, taken, a) = case.problem, best
        plain = _bfloat16(p)
        xla = seconds(by_xla, p, a.x, a.codes[0], a.scales[0])
        rate = weight_bytes(p) / taken
        run.emit(decode=case.name, layer=f"{p.inner}x{p.columns}", us=1e6 * taken,
                 gbps=rate / 1e9, of_copy=rate / bandwidth, bf16_us=1e6 * plain,
                 faster_than_bf16=plain / taken, xla_us=1e6 * xla)  # fmt: skip
        run.rows.append((
            f"{case.name}, {p.inner}x{p.columns}", f"{1e6 * taken:.1f} µs",
            f"{rate / 1e9:.0f} GB/s", f"{100 * rate / bandwidth:.0f} %",
            f"bf16 {plain / taken:.2f} x slower, XLA {xla / taken:.1f} x",
        ))  # fmt: skip


def _bfloat16(p: Problem) -> float:
    """Return the time of the same product with bfloat16 weights, as many as rotate."""
    copies = max(2, -(-ROTATE // (2 * p.inner * p.columns)))
    ws = [
        jax.random.normal(jax.random.key(i), (p.inner, p.columns), jnp.bfloat16)
        for i in range(copies)
    ]
    x = jax.random.normal(jax.random.key(99), (p.rows, p.inner), jnp.bfloat16)
    return seconds(jax.jit(lambda x, ws: [x @ w for w in ws]), x, ws) / copies


def prefill(run: Run, matmul: float) -> None:
    """Time products of many rows beside bfloat16."""
    cases = list(prefill_cases(run.quick))
    for i, case in enumerate(cases):
        share = max(run.left() - 90, 5) / (len(cases) - i)
        best = tuned(run, case, time.monotonic() + share)
        if best is None:
            continue
        p, taken = case.problem, best[2]
        x = jax.random.normal(jax.random.key(1), (p.rows, p.inner), jnp.bfloat16)
        w = jax.random.normal(jax.random.key(2), (p.inner, p.columns), jnp.bfloat16)
        plain = seconds(jax.jit(jnp.dot), x, w)
        rate = 2 * p.rows * p.inner * p.columns / taken
        run.emit(prefill=case.name, us=1e6 * taken, tops=rate / 1e12,
                 of_bf16=rate / matmul, faster_than_bf16=plain / taken)  # fmt: skip
        run.rows.append((
            f"{case.name}, {p.inner}x{p.columns}", f"{1e6 * taken:.0f} µs",
            f"{rate / 1e12:.0f} T/s", f"{100 * rate / matmul:.0f} %",
            f"bf16 {plain / taken:.2f} x slower",
        ))  # fmt: skip


ATTENTION = decode_attention.Case("8192 tokens, int8", 16, 8, 8, 8192, 128, 8)


def attention(run: Run, bandwidth: float) -> None:
    """Time decode attention over a cache of int8 and of int4."""
    for bits in (8, 4):
        case = dataclasses.replace(ATTENTION, bits=bits, name=f"8192 tokens, int{bits}")
        q, keys, values, ks, vs, _ = case.arrays()
        full = jnp.full((case.batch,), case.tokens, jnp.int32)
        best: tuple[float, Any] | None = None
        for tile in decode_attention.TILES[: 1 if run.quick else None]:
            if run.left() < 60 and best is not None:
                break
            go = functools.partial(
                decode_attention.decode_attention, bits=bits, tile=tile
            )
            try:
                taken = seconds(jax.jit(go), q, keys, values, ks, vs, full)
            except Exception as failure:
                run.emit(attention=case.name, tile=str(tile), failed=_say(failure))
                continue
            run.emit(attention=case.name, tile=str(tile), us=1e6 * taken)
            best = min(best or (taken, tile), (taken, tile), key=lambda pair: pair[0])
        if best is None:
            continue
        rate = (keys.nbytes + values.nbytes + ks.nbytes + vs.nbytes) / best[0]
        run.emit(
            attended=case.name,
            us=1e6 * best[0],
            of_copy=rate / bandwidth,
            tile=str(best[1]),
        )
        run.rows.append((
            f"decode attention, {case.name}", f"{1e6 * best[0]:.0f} µs",
            f"{rate / 1e9:.0f} GB/s", f"{100 * rate / bandwidth:.0f} %", "",
        ))  # fmt: skip


def _say(failure: Exception) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"


# ---------------------------------------------------------------------------- dry


def dry(run: Run) -> int:
    """Compile what a run would compile, for an H200 that is not here."""
    failures = 0
    cases = [*decode_cases(run.quick), *prefill_cases(run.quick)]
    cases += [] if run.quick else [c for m in run.modules() for c in m.CASES]
    for case in cases:
        if case.layers:
            case = dataclasses.replace(case, layers=2)
        try:
            module, code = _compiled(run, case)
            run.emit(
                dry=case.name,
                kernel=module.KERNEL.name,
                registers=code.registers,
                spills=code.spills,
                loop=code.per_step,
            )
            failures += code.spills > 0
        except Exception as failure:
            run.emit(dry=case.name, failed=_say(failure))
            failures += 1
    return failures


def _compiled(run: Run, case: Case) -> tuple[Any, Any]:
    """Return the kernel that takes a case, and its machine code."""
    from benchmarks import gpu_compile

    p = case.problem
    module = run.module_for(p)
    if module is None:
        raise ValueError(f"no kernel takes it on {run.generation}")
    tile = module.KERNEL.tile(p, run.generation)
    shapes = jax.eval_shape(lambda: arrays_of(random_operands(case)))
    given = {i: a for i, a in enumerate(shapes) if a is not None}

    def go(*arrays: jax.Array) -> list[jax.Array]:
        whole = dict(zip(given, arrays, strict=True))
        return each_layer(module, p, tile)(*(whole.get(i) for i in range(len(shapes))))

    return module, gpu_compile.code(gpu_compile.compiled(go, list(given.values())))


def main() -> int:
    """Parse the command line and run."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=about
    )
    parser.add_argument("--out", type=Path, help="a folder for results")
    parser.add_argument("--quick", action="store_true", help="one layer, few tiles")
    parser.add_argument("--dry", action="store_true", help="compile without a GPU")
    args = parser.parse_args()
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    # read when the first array is made; peers need memory too
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if args.dry:
        jax.config.update("jax_platforms", "cpu")
        return int(dry(Run(args.out, "sm_90", args.quick)) > 0)
    device = jax.devices()[0]
    if device.platform != "gpu":
        print(f"no GPU here but {device}; --dry compiles without one", file=sys.stderr)
        return 2
    generation = "sm_" + str(device.compute_capability).replace(".", "")
    run = Run(args.out, generation, args.quick)
    run.emit(device=device.device_kind, generation=generation, jax=jax.__version__)
    bandwidth, matmul = copy_bandwidth(), matmul_rate()
    run.emit(copy_gbps=bandwidth / 1e9, bf16_tops=matmul / 1e12)
    check(run)
    decode(run, bandwidth)
    prefill(run, matmul)
    attention(run, bandwidth)
    for facts in gpu_peers.timed(DECODE_LAYERS[0], (1, 16), deadline=run.left):
        run.emit(**facts)
    run.emit(seconds=time.monotonic() - run.began)
    run.publish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
