"""GPTQ's equations in PyTorch, as its authors wrote them; for `benchmarks.gptq_layer`.

Run by a Python that has torch; jaxq and NumPy are not needed there::

    python gptq_reference.py WEIGHT GRAM SIZE GROUP ORDER

The files hold float32, ``[SIZE, SIZE]`` each; the weight as ``[out, in]``. Prints one
line of JSON.
"""

import json
import sys
import time

import torch

LAZY = 128
DAMPING = 0.01


def scales(w: torch.Tensor, group: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return scale and zero point of every group, in the range of its extremes."""
    out = []
    for start in range(0, w.shape[1], group):
        part = w[:, start : start + group]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scale = (high - low) / 15
        out.append((scale, torch.round(-low / scale)))
    return out


def gptq(w: torch.Tensor, h: torch.Tensor, group: int, ordered: bool) -> torch.Tensor:
    """Return the quantized weight ``[out, in]``: 4 bits, static groups."""
    columns, grids = w.shape[1], scales(w, group)
    order = torch.arange(columns)
    if ordered:
        order = torch.argsort(torch.diag(h), descending=True)
        w, h = w[:, order], h[order][:, order]
    diagonal = torch.arange(columns)
    h[diagonal, diagonal] += DAMPING * torch.mean(torch.diag(h))
    h = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky(h, upper=True)
    out, w = torch.zeros_like(w), w.clone()
    for start in range(0, columns, LAZY):
        stop = min(start + LAZY, columns)
        block, inverse = w[:, start:stop].clone(), u[start:stop, start:stop]
        errors = torch.zeros_like(block)
        for i in range(stop - start):
            column = block[:, i]
            scale, zero = grids[int(order[start + i]) // group]
            code = torch.clamp(torch.round(column / scale) + zero, 0, 15)
            out[:, start + i] = scale * (code - zero)
            error = (column - out[:, start + i]) / inverse[i, i]
            block[:, i:] -= error[:, None] @ inverse[i, i:][None]
            errors[:, i] = error
        w[:, stop:] -= errors @ u[start:stop, stop:]
    return out[:, torch.argsort(order)]


def main() -> None:
    """Time one weight, and say how much of the output is lost."""
    size, group = int(sys.argv[3]), int(sys.argv[4])
    w, h = (
        torch.from_file(path, size=size * size, dtype=torch.float32).view(size, size)
        for path in sys.argv[1:3]
    )
    gram = h.clone()
    start = time.perf_counter()
    out = gptq(w.clone(), gram, group, sys.argv[5] == "activation")
    seconds = time.perf_counter() - start
    error = out - w
    lost = float(torch.sum((error @ h) * error))
    print(json.dumps({"seconds": seconds, "loss": lost, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
