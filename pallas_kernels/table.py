"""The literal tables: which kernels and layouts each backend has, best first."""

import importlib

from pallas_kernels.kernel import Kernel, Layout

# backend -> modules with a KERNEL, in order of preference
KERNELS: dict[str, tuple[str, ...]] = {
    "tpu": (
        "pallas_kernels.tpu.quantized_activation",
        "pallas_kernels.tpu.weight_only_decode",
        "pallas_kernels.tpu.weight_only_prefill",
    ),
    "gpu": (
        "pallas_kernels.gpu.quantized_activation",
        "pallas_kernels.gpu.weight_only_prefill",
        "pallas_kernels.gpu.weight_only",
        "pallas_kernels.gpu.triton_quantized_activation",
        "pallas_kernels.gpu.triton_weight_only",
    ),
}

# layout -> the module with the LAYOUT
LAYOUTS: dict[str, str] = {
    "tpu": "pallas_kernels.tpu.layout",
    "gpu": "pallas_kernels.gpu.layout",
    "lookup": "pallas_kernels.lookup_layout",
}


def kernels(backend: str) -> tuple[Kernel, ...]:
    """Return the kernels of a backend, imported now: Pallas takes a while."""
    modules = KERNELS.get(backend, ())
    return tuple(importlib.import_module(name).KERNEL for name in modules)


def layout(name: str) -> Layout:
    """Return a layout by its name.

    Raises:
        ValueError: when there is none of that name.
    """
    if name not in LAYOUTS:
        known = ", ".join(map(repr, LAYOUTS))
        raise ValueError(f"there is no layout {name!r}; the layouts are {known}")
    return importlib.import_module(LAYOUTS[name]).LAYOUT
