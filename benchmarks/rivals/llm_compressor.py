"""llm-compressor: GPTQ with either observer, AWQ, and rounding to nearest."""

import tempfile

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM

from benchmarks.rivals.protocol import Clock, linear_names, options, write_run

BATCH = 8
METHODS = {
    "gptq": "GPTQ",
    "gptq-imatrix": "GPTQ, imatrix observer",
    "awq": "AWQ",
    "rtn": "RTN",
}
NORMS = ("input_layernorm", "post_attention_layernorm")


def modifiers(variant: str, bits: int, group: int) -> list[object]:
    """Return the recipe; what is not said here is the library's default."""
    observer = {"observer": "imatrix_mse"} if variant.endswith("imatrix") else {}
    weights = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=False,
        strategy="group",
        group_size=group,
        **observer,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    last = GPTQModifier if variant.startswith("gptq") else QuantizationModifier
    rounding = last(config_groups={"group_0": scheme}, ignore=["lm_head"])
    return [AWQModifier(), rounding] if variant == "awq" else [rounding]


def without_pinning() -> None:
    """Let AWQ run without an accelerator: it pins memory unasked, which then fails."""
    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda tensor, *_: tensor


def main() -> None:
    """Quantize, and write the dequantized weights."""
    run = options("llm-compressor", *METHODS).parse_args()
    without_pinning()
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    tokens = torch.from_numpy(np.load(run.tokens)).long()
    rows = [
        {"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens
    ]
    loader = torch.utils.data.DataLoader(rows, BATCH)
    recipe = modifiers(run.variant, run.bits, run.group)
    clock = Clock()
    with tempfile.TemporaryDirectory() as logs, clock.running():
        oneshot(
            model=model,
            dataset=loader,
            recipe=recipe,
            num_calibration_samples=len(tokens),
            log_dir=logs,
        )
    modules = dict(model.named_modules())
    weights, norms = {}, {}
    with torch.no_grad():
        for name in linear_names(run.model):
            layer = modules[name]
            args = layer.quantization_scheme.weights
            rounded = forward_quantize(layer, layer.weight, "weight", args)
            weights[name] = rounded.float().numpy()
        for name, module in modules.items():
            if name.endswith(NORMS):
                norms[name] = module.weight.float().numpy()
    note = "static activation order, damping 0.01" if "gptq" in run.variant else ""
    write_run(
        run,
        weights,
        clock,
        "llmcompressor",
        norms=norms,
        method=METHODS[run.variant],
        symmetric=False,
        note=note,
    )


if __name__ == "__main__":
    main()
