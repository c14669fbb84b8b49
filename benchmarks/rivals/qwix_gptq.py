"""qwix: GPTQ over the Flax module, calibrated in one pass on the float model.

Its GPTQ takes symmetric formats only, and no int3: this compares 4 bits, and 2 bits
with `jnp.int2`. Needs jaxq beside it for the float module.
"""

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from qwix.contrib import gptq

from benchmarks.rivals.protocol import Clock, options, write_run
from jaxq.huggingface import load_huggingface
from jaxq.models.llama import Llama

BATCH = 8
FORMATS = {4: jnp.int4, 2: jnp.int2}


def hessians(model, params, tokens, rules):
    """Return qwix's statistics of all calibration batches."""
    watched = qwix.quantize_model(model, gptq.GptqCalibrationProvider(rules))
    apply = jax.jit(
        lambda variables, batch: watched.apply(variables, batch, mutable="quant_stats")
    )
    stats: dict = {}
    for start in range(0, len(tokens), BATCH):
        batch = jnp.asarray(tokens[start : start + BATCH])
        _, new = apply({"params": params, **stats}, batch)
        stats = {"quant_stats": new["quant_stats"]}
    return stats["quant_stats"]


def main() -> None:
    """Quantize, and write the dequantized weights."""
    run = options("qwix", "symmetric").parse_args()
    loaded = load_huggingface(run.model, jnp.float32)
    model = Llama(loaded.config, dot_general=jax.lax.dot_general)
    params = loaded.params["params"]
    tokens = np.load(run.tokens)
    rule = gptq.GptqRule(
        module_path=".*_proj", weight_qtype=FORMATS[run.bits], tile_size=run.group
    )
    clock = Clock()
    with clock.running():
        stats = hessians(model, params, tokens, [rule])
        small = qwix.quantize_model(model, qwix.PtqProvider([rule]))
        shapes = jax.eval_shape(small.init, jax.random.key(0), tokens[:1])["params"]
        quantized = gptq.quantize_params(params, shapes, stats)
        jax.block_until_ready(quantized)
    weights = {}
    for i in range(loaded.config.num_layers):
        for block, leaves in quantized[f"layers_{i}"].items():
            for name, leaf in leaves.items():
                if name.endswith("_proj"):
                    kernel = qwix.dequantize(leaf["kernel"].array)
                    weights[f"model.layers.{i}.{block}.{name}"] = np.asarray(kernel).T
    write_run(
        run,
        weights,
        clock,
        "qwix",
        method="GPTQ, one shot",
        symmetric=True,
        note="symmetric only, no int3; damping 0.01, natural order",
    )


if __name__ == "__main__":
    main()
