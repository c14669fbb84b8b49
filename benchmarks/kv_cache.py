"""What a quantized cache costs the demo model, what it holds, how fast it is read."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
from benchmarks.report import Table, arguments, milliseconds, publish
from benchmarks.timing import interleaved
from jaxq import QuantSpec
from jaxq.evaluate import evaluate, logits_of, text_windows
from jaxq.kvcache import CACHES, cache_bytes, empty_cache
from jaxq.kvcache.quantized import quantized_cache
from jaxq.lm import LM
from jaxq.models.attention import attend
from pallas_kernels.xla import cached_attention

ABOUT = """\
Every key and value that a query of the embedded demo model attends to has been in the
cache: rounded once per token and head (64 numbers), prompt and continuation alike.
Held-out text in windows of 512 tokens; KL(float cache || this cache) in nats per token,
for the float model and for one whose weights have 4 bits. Bytes hold the scales."""

FOLDER = Path(jaxq.__file__).parent / "demo_model"
# the ways to choose a grid of 16 codes; "full" is what `int4` is
GRIDS = {
    f"4 bits, {grid} grid": QuantSpec("int4", "token", grid=grid)
    for grid in ("restricted", "gptq", "full")
}
SLOTS, HEADS, CACHED, WIDTH = 8192, 8, 2, 128


def caches(lm: LM, tokens: int) -> dict[str, Any]:
    """Return functions that make an empty cache for texts of so many tokens."""

    def named(kind: str, rows: int) -> Any:
        return empty_cache(lm.config, rows, tokens, jnp.float32, kind)

    def graded(spec: QuantSpec, rows: int) -> Any:
        return quantized_cache(lm.config, rows, tokens, spec)

    kinds = {kind: functools.partial(named, kind) for kind in CACHES}
    return kinds | {n: functools.partial(graded, s) for n, s in GRIDS.items()}


def measure(lm: LM, windows: np.ndarray) -> list[list[str]]:
    """Return one row per cache, floats first."""
    length = windows.shape[1]
    reference = list(logits_of(lm.apply, lm.params, windows))
    rows = []
    for name, make in caches(lm, length).items():

        @jax.jit
        def apply(params: Any, tokens: jax.Array, make: Any = make) -> jax.Array:
            return lm.apply(params, tokens, None, make(tokens.shape[0]))[0]

        out = evaluate(apply, lm.params, windows, reference)
        held = cache_bytes(jax.eval_shape(lambda make=make: make(1)))
        numbers = 2 * lm.config.num_layers * lm.config.num_kv_heads * 64 * length
        rows.append(
            [
                name,
                f"{8 * held / numbers:.2f}",
                f"{held // length:,}",
                f"{out.perplexity:.4f}",
                f"{out.kl:.6f}",
                f"{100 * (out.top1 or 0):.2f} %",
            ]
        )
        print(*rows[-1], flush=True)
    return rows


def speed(quick: bool) -> list[list[str]]:
    """Return the time of one token's attention over a long context, per cache."""
    random = np.random.default_rng(0)
    shape = (1, CACHED, SLOTS, WIDTH)
    q = jnp.asarray(random.standard_normal((1, 1, HEADS, WIDTH)), jnp.float32)
    floats = jnp.asarray(random.standard_normal((1, SLOTS, CACHED, WIDTH)), jnp.float32)
    codes = jnp.asarray(random.integers(-127, 128, shape), jnp.int8)
    halves = jnp.asarray(random.integers(0, 256, (*shape[:3], WIDTH // 2)), jnp.uint8)
    scales = jnp.full(shape[:3], 0.01, jnp.float32)
    last, places = jnp.full((1, 1), SLOTS - 1), jnp.arange(SLOTS)[None]
    seen = jnp.ones((1, 1, SLOTS), bool)
    half, halved = q.astype(jnp.bfloat16), floats.astype(jnp.bfloat16)
    read = jax.jit(cached_attention)
    told = (scales, scales, last, places, jnp.full(1, SLOTS))
    plain = jax.jit(attend)
    times = interleaved(
        {
            "float32": lambda: plain(q, floats, floats, seen),
            "bfloat16": lambda: plain(half, halved, halved, seen),
            "int8": lambda: read(q, codes, codes, *told),
            "int4": lambda: read(q, halves, halves, *told),
        },
        seconds=3 if quick else 10,
    )
    return [
        [name, milliseconds(t.minimum), milliseconds(t.median)]
        for name, t in times.items()
    ]


def main() -> None:
    """Measure, print, and write."""
    options = arguments("Divergence, bytes and time of caches.").parse_args()
    lm = jaxq.load_model("demo", dtype=jnp.float32)
    windows = text_windows(lm, (FOLDER / "eval.txt").read_text("utf-8"), 512)
    spread = np.linspace(0, len(windows) - 1, 16 if options.quick else 64).astype(int)
    windows = windows[spread]
    columns = ("cache", "bits", "bytes/token", "perplexity", "KL", "top-1")
    tables = [
        Table("## The float model", columns, measure(lm, windows)),
        Table("## `w4a16`", columns, measure(lm.quantize("w4a16"), windows[::2])),
        Table(
            f"## One token over {SLOTS} ({HEADS} heads, {CACHED} in the cache, {WIDTH} "
            "wide)",
            ("cache", "least ms", "median ms"),
            speed(options.quick),
            ("In plain XLA on this CPU; the kernels of chips are in compile_report.",),
        ),
    ]
    publish("kv_cache", ABOUT, tables, options)


if __name__ == "__main__":
    main()
