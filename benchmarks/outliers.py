"""W8A8 on a model with outlier channels: what breaks, and what recovers."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
from benchmarks.report import Table, arguments, publish
from jaxq import QuantSpec, Recipe, Rule, chain, rtn, smoothquant
from jaxq.evaluate import draw_windows, evaluate, logits_of, text_windows
from jaxq.lm import LM

ABOUT = """\
A copy of the demo model that computes the same function: in every norm before attention
and feed-forward a few channels are multiplied by 40, and the rows of the matrices that
read them divided by 40. Large language models grow such channels by themselves. Weights
and activations of the decoder layers in int8; embedding and head float. Perplexity on
held-out windows of 512 tokens."""

FOLDER = Path(jaxq.__file__).parent / "demo_model"
CHANNELS, FACTOR = 4, 40.0

INT8 = QuantSpec("int8", "channel")
TENSOR = QuantSpec("int8", "tensor")
TOKEN = QuantSpec("int8", "token")
MIXED = QuantSpec("int8", "token", outliers=6.0)

READERS = {
    "input_layernorm": ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
    "post_attention_layernorm": ("mlp/gate_proj", "mlp/up_proj"),
}


def with_outliers(params: Any, seed: int = 0) -> Any:
    """Return parameters of the same function, with outlier channels."""
    rng = np.random.default_rng(seed)
    out = jax.tree.map(lambda x: x, params)
    for name, layer in out["params"].items():
        if not re.fullmatch(r"layers_\d+", name):
            continue
        for norm, readers in READERS.items():
            weight = layer[norm]["weight"]
            channels = rng.choice(len(weight), CHANNELS, replace=False)
            scale = jnp.ones(len(weight)).at[channels].set(FACTOR)
            layer[norm]["weight"] = weight * scale
            for reader in readers:
                part, leaf = reader.split("/")
                kernel = layer[part][leaf]["kernel"]
                layer[part][leaf]["kernel"] = kernel / scale[:, None]
    return out


def recipes() -> dict[str, Recipe]:
    """Return W8A8 in the ways that are compared."""

    def w8a8(activation: QuantSpec, method: Any = "rtn", static: Any = False) -> Recipe:
        kept = (Rule("*", ops=("gather",)), Rule("*lm_head*", required=False))
        rule = Rule("*", INT8, activation, static=static, solver=method)
        return Recipe("w8a8", (*kept, rule))

    smooth = chain(smoothquant(0.5), rtn())
    return {
        "static, per tensor": w8a8(TENSOR, static=True),
        "dynamic, per tensor": w8a8(TENSOR),
        "dynamic, per token": w8a8(TOKEN),
        "SmoothQuant 0.5, static per tensor": w8a8(TENSOR, smooth, static=True),
        "SmoothQuant 0.5, per token": w8a8(TOKEN, smooth),
        "LLM.int8(), threshold 6": w8a8(MIXED),
    }


def measure(lm: LM, windows: np.ndarray, tokens: np.ndarray) -> list[list[str]]:
    """Return one row per recipe, the float model first."""
    reference = list(logits_of(jax.jit(lm.forward), lm.params, windows))
    exact = evaluate(jax.jit(lm.forward), lm.params, windows).perplexity
    rows = [["float", f"{exact:.4f}", "", ""]]
    for name, recipe in recipes().items():
        small = lm.quantize(recipe, tokens)
        out = evaluate(jax.jit(lm.apply), small.params, windows, reference)
        change = 100 * (out.perplexity / exact - 1)
        rows.append(
            [name, f"{out.perplexity:.4f}", f"{change:+.2f} %", f"{out.kl:.5f}"]
        )
        print(*rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure, print, and write."""
    options = arguments("W8A8 with outlier channels.").parse_args()
    lm = jaxq.load_model("demo", dtype=jnp.float32)
    windows = text_windows(lm, (FOLDER / "eval.txt").read_text("utf-8"), 512)
    spread = np.linspace(0, len(windows) - 1, 12 if options.quick else 48).astype(int)
    windows = windows[spread]
    text = lm.encode((FOLDER / "calibration.txt").read_text("utf-8"))
    tokens = draw_windows(text, 512, 32, 0)
    injected = dataclasses.replace(lm, params=with_outliers(lm.params))
    same = jnp.max(
        jnp.abs(
            lm.forward(lm.params, windows[:1])
            - lm.forward(injected.params, windows[:1])
        )
    )
    columns = ("activations", "perplexity", "to float", "KL")
    tables = [
        Table(
            f"## With {CHANNELS} outlier channels × {FACTOR:g} in every norm",
            columns,
            measure(injected, windows, tokens),
            (f"Largest change of its logits: {float(same):.1e}.",),
        ),
        Table("## The model as it is", columns, measure(lm, windows, tokens)),
    ]
    publish("outliers", ABOUT, tables, options)


if __name__ == "__main__":
    main()
