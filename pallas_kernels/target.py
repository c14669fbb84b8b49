"""The chip that code is being compiled for, which need not be the one it is made on."""

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Generation:
    """What kernels need to know of a generation of chips.

    Attributes:
        backend: ``"gpu"`` or ``"tpu"``.
        compiler: which of Pallas's compilers its kernels are for.
        kinds: what its devices call themselves; of a GPU, part of that.
        fp8: whether it multiplies fp8 by fp8.
    """

    backend: str
    compiler: str
    kinds: tuple[str, ...]
    fp8: bool = True


# Ampere's two come as they do because "A10" is a part of "A100"
GENERATIONS = {
    "v5e": Generation("tpu", "mosaic", ("TPU v5 lite", "TPU v5e")),
    "v5p": Generation("tpu", "mosaic", ("TPU v5", "TPU v5p")),
    "v6e": Generation("tpu", "mosaic", ("TPU v6 lite", "TPU v6e")),
    "v7x": Generation("tpu", "mosaic", ("TPU7x", "TPU v7x")),
    "sm_80": Generation("gpu", "triton", ("A100",), fp8=False),
    "sm_86": Generation("gpu", "triton", ("A10", "A40", "RTX 30"), fp8=False),
    "sm_89": Generation("gpu", "triton", ("L4", "RTX 40")),
    "sm_90": Generation("gpu", "mosaic", ("H100", "H200")),
}


def generations(backend: str, compiler: str | None = None) -> tuple[str, ...]:
    """Return the generations of a backend that have kernels, of any compiler or one."""
    return tuple(
        name
        for name, chip in GENERATIONS.items()
        if chip.backend == backend and compiler in (None, chip.compiler)
    )


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
    """Return the generation of a device by its kind, or empty.

    A GPU that is here tells its compute capability, and need not be in `GENERATIONS`.
    """
    if backend == "gpu" and capability is not None:
        return f"sm_{capability.replace('.', '')}"
    for name in generations(backend):
        kinds = GENERATIONS[name].kinds
        if kind in kinds or (backend == "gpu" and any(k in kind for k in kinds)):
            return name
    return ""


def _backend(platform: str) -> str:
    return "gpu" if platform in ("cuda", "rocm") else platform
