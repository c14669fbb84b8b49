"""The chip that code is being compiled for, which need not be the one it is made on."""

import dataclasses
from typing import Any

import jax

# what a device calls itself -> the name the tables use
KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7x",
    "TPU v7x": "v7x",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of chip, and how kernels run for it.

    Attributes:
        backend: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
        generation: ``"v5e"``, ``"sm_90"`` ...; empty when it is not known.
        interpret: what `jax.experimental.pallas.pallas_call` takes: False compiles.
        tiles: tuned tiles, as `pallas_kernels.tuning.Tuning.load` returns them.
    """

    backend: str
    generation: str = ""
    interpret: Any = False
    tiles: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def here(cls) -> "Target":
        """Return the chip of the mesh in context, or else of the default backend."""
        device = jax.sharding.get_abstract_mesh().abstract_device
        if device is not None:
            backend = _backend(device.platform)
            return cls(backend, generation(backend, device.device_kind))
        backend = jax.default_backend()
        first = jax.devices()[0]
        capability = getattr(first, "compute_capability", None)
        return cls(backend, generation(backend, first.device_kind, capability))


def generation(backend: str, kind: str, capability: str | None = None) -> str:
    """Return the generation of a device by its kind, or empty."""
    if backend == "tpu":
        return KINDS.get(kind, "")
    if backend == "gpu":
        if capability is None:
            capability = next((cc for name, cc in GPUS.items() if name in kind), "")
        return f"sm_{capability.replace('.', '')}" if capability else ""
    return ""


# part of a device's name -> its compute capability, for a mesh of devices not here
GPUS = {"H100": "9.0", "H200": "9.0", "A100": "8.0", "L4": "8.9", "RTX 40": "8.9"}


def _backend(platform: str) -> str:
    return "gpu" if platform in ("cuda", "rocm") else platform
