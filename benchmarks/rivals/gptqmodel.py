"""GPTQModel: GPTQ as shipped, and with its scale search switched on."""

import contextlib
import os
import tempfile

import numpy as np
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT

from benchmarks.rivals.protocol import Clock, linear_names, options, write_run

BATCH = 8
METHODS = {"default": "GPTQ", "mse": "GPTQ, scale search (mse 2.4)"}


def main() -> None:
    """Quantize with zero points, and write the dequantized weights."""
    run = options("GPTQModel", *METHODS).parse_args()
    # The library's own count, half of the cores, is too few for it on two cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    config = QuantizeConfig(
        bits=run.bits,
        group_size=run.group,
        sym=False,
        # The first version of the format stores zero points less one, and packed so.
        format=FORMAT.GPTQ_V2,
        mse=2.4 if run.variant == "mse" else 0.0,
        device="cpu",
        offload_to_disk=False,
    )
    model = GPTQModel.load(os.fspath(run.model), config, dtype=torch.float32)
    tokens = np.load(run.tokens).tolist()
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens]
    clock = Clock()
    # it writes logs where it runs
    with tempfile.TemporaryDirectory() as logs, contextlib.chdir(logs), clock.running():
        model.quantize(rows, batch_size=BATCH)
    modules = dict(model.model.named_modules())
    weights = {
        name: modules[name].dequantize_weight().detach().float().numpy().T
        for name in linear_names(run.model)
    }
    write_run(
        run,
        weights,
        clock,
        "gptqmodel",
        method=METHODS[run.variant],
        symmetric=False,
        note="defaults otherwise: group-aware order, damping 0.05, float16 scales",
    )


if __name__ == "__main__":
    main()
