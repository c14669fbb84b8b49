"""HQQ: half-quadratic quantization, which needs no data."""

import numpy as np
import torch
from hqq.core.quantize import Quantizer

from benchmarks.rivals.protocol import Clock, options, read_linears, write_run


def main() -> None:
    """Quantize with the library's defaults, and write the dequantized weights."""
    run = options("HQQ", "asymmetric").parse_args()
    floats = read_linears(run.model)
    clock = Clock()
    weights: dict[str, np.ndarray] = {}
    with clock.running():
        for name, weight in floats.items():
            codes, meta = Quantizer.quantize(
                torch.from_numpy(weight),
                nbits=run.bits,
                group_size=run.group,
                optimize=True,
                axis=1,
                compute_dtype=torch.float32,
                device="cpu",
            )
            weights[name] = Quantizer.dequantize(codes, meta).float().numpy()
    write_run(
        run,
        weights,
        clock,
        "hqq",
        method="HQQ",
        symmetric=False,
        note="needs no data: one run",
    )


if __name__ == "__main__":
    main()
