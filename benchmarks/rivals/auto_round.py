"""auto-round: learned rounding and range, 200 steps of sign-SGD per block."""

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.rivals.protocol import Clock, linear_names, options, write_run

STEPS = 200
BATCH = 8


def main() -> None:
    """Quantize with the library's defaults, and write the dequantized weights."""
    run = options("auto-round", "asymmetric", "symmetric").parse_args()
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    tokens = torch.from_numpy(np.load(run.tokens)).long()
    clock = Clock()
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(run.model),
        bits=run.bits,
        group_size=run.group,
        sym=run.variant == "symmetric",
        iters=STEPS,
        seqlen=tokens.shape[1],
        nsamples=len(tokens),
        batch_size=BATCH,
        dataset=torch.utils.data.DataLoader(tokens, BATCH),
        device_map="cpu",
    )
    with clock.running():
        model, _ = tuner.quantize()
    modules = dict(model.named_modules())
    weights = {
        name: modules[name].weight.detach().float().numpy()
        for name in linear_names(run.model)
    }
    write_run(
        run,
        weights,
        clock,
        "auto-round",
        method=f"{STEPS} steps",
        symmetric=run.variant == "symmetric",
        note="defaults otherwise: batch 8, learning rate 1/200, float16 scales",
    )


if __name__ == "__main__":
    main()
