"""The same products in libraries that happen to be installed on a GPU machine."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

ROTATE = 600_000_000  # bytes of copies


def timed(
    layer: tuple[int, int], rows: Sequence[int], deadline: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """Yield the times of every peer, or why it has none.

    Args:
        layer: K and N.
        rows: of the activation.
        deadline: the seconds left.
    """
    for name in ("torch", "bitsandbytes", "torchao"):
        try:
            importlib.import_module(name)
        except Exception as failure:
            yield {"peer": name, "not_importable": type(failure).__name__}
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available():
        yield {"peer": "torch", "not_usable": "no CUDA"}
        return
    for name, peer in PEERS.items():
        for m in rows:
            if deadline() < 20:
                yield {"peer": name, "rows": m, "skipped": "out of time"}
                continue
            try:
                taken = _events(torch, peer(torch, layer, m))
                yield {"peer": name, "rows": m, "layer": f"{layer[0]}x{layer[1]}",
                       "us": taken}  # fmt: skip
            except Exception as failure:
                yield {"peer": name, "rows": m, "failed": str(failure)[:200]}


def _events(torch: Any, calls: list[Callable[[], Any]]) -> float:
    """Return microseconds per call, all copies in turn, the median of ten rounds."""
    taken = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
        taken.append(1e3 * start.elapsed_time(end) / len(calls))
    return sorted(taken[2:])[5]


def _copies(size: int) -> range:
    return range(max(2, -(-ROTATE // size)))


def _bfloat16(torch: Any, layer: tuple[int, int], m: int) -> list[Callable[[], Any]]:
    k, n = layer
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(m, k, **kind)
    ws = [torch.randn(n, k, **kind) for _ in _copies(2 * k * n)]
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in ws]


def _tinygemm(torch: Any, layer: tuple[int, int], m: int) -> list[Callable[[], Any]]:
    """int4, groups of 128: `torch._weight_int4pack_mm`."""
    k, n = layer
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    calls = []
    for _ in _copies(k * n // 2):
        codes = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
        w = torch._convert_weight_to_int4pack(codes, 8)
        scales = torch.randn(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)
        calls.append(lambda w=w, s=scales: torch._weight_int4pack_mm(x, w, 128, s))
    return calls


def _bitsandbytes(
    torch: Any, layer: tuple[int, int], m: int
) -> list[Callable[[], Any]]:
    """nf4, blocks of 64: `bitsandbytes.matmul_4bit`."""
    import bitsandbytes

    k, n = layer
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    calls = []
    for _ in _copies(k * n // 2):
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        q, state = bitsandbytes.functional.quantize_4bit(w, quant_type="nf4")
        calls.append(lambda q=q, s=state: bitsandbytes.matmul_4bit(x, q.t(), s))
    return calls


def _torchao(torch: Any, layer: tuple[int, int], m: int) -> list[Callable[[], Any]]:
    """int8 weights of torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    k, n = layer
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(m, k, **kind)
    layers = [torch.nn.Linear(k, n, bias=False, **kind) for _ in _copies(k * n)]
    for module in layers:
        quantize_(module, Int8WeightOnlyConfig())
    return [lambda module=module: module(x) for module in layers]


PEERS = {
    "torch bf16": _bfloat16,
    "torch int4 (tinygemm)": _tinygemm,
    "bitsandbytes nf4": _bitsandbytes,
    "torchao int8 weights": _torchao,
}
