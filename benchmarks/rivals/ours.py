"""jaxq itself: rounding to nearest as the reference, and its presets."""

import dataclasses

import jax
import numpy as np

import jaxq
from benchmarks.rivals.protocol import Clock, options, write_run
from jaxq import PRESETS, QuantSpec, Recipe, Rule
from jaxq.method import gptq
from jaxq.models.families import checkpoint_name

SCALES = ("bfloat16", "float16", "float32")
METHODS = ("mse", "gptq", "gptq-plain", "awq", "autoround")


def recipe(variant: str, bits: int, group: int) -> Recipe:
    """Return a preset, with embedding and head left float."""
    kept = Rule("*", ops=("gather",)), Rule("*lm_head*", required=False)
    method, _, detail = variant.partition("-")
    scale = detail if detail in SCALES else "bfloat16"
    spec = QuantSpec(f"uint{bits}", group, symmetric=False, scale=scale)
    if method == "rtn":
        return Recipe(variant, (*kept, Rule("*", spec)))
    if detail == "plain":  # neither float stream nor sweeps, as the other libraries
        return Recipe(variant, (*kept, Rule("*", spec, solver=gptq(damping=0.01))))
    suffix = "" if method == "mse" else f"-{method}"
    names = f"w{bits}a16{suffix}", f"w4a16{suffix}"
    preset = next(PRESETS[name] for name in names if name in PRESETS)
    grouped = [
        dataclasses.replace(rule, weight=spec)
        for rule in preset.rules
        if rule.weight is not None and isinstance(rule.weight.block, int)
    ]
    return Recipe(variant, (*kept, *grouped))


def main() -> None:
    """Quantize, and write the dequantized weights."""
    variants = [f"rtn-{scale}" for scale in SCALES] + list(METHODS)
    run = options("jaxq", *variants).parse_args()
    lm = jaxq.load_model(run.model, jax.numpy.float32)
    tokens = np.load(run.tokens)
    clock = Clock()
    with clock.running():
        small = lm.quantize(recipe(run.variant, run.bits, run.group), tokens)
        jax.block_until_ready(small.params)
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        jaxq.dequantize_params(small.params)
    )
    tensors = {
        checkpoint_name(tuple(key.key for key in path)): np.asarray(leaf)
        for path, leaf in leaves
    }
    weights = {
        name.removesuffix(".weight"): tensor.T
        for name, tensor in tensors.items()
        if "_proj" in name
    }
    write_run(
        run,
        weights,
        clock,
        "jaxq",
        scaled=run.variant == "awq",
        method=run.variant,
        symmetric=False,
        note="compilation included",
    )


if __name__ == "__main__":
    main()
