"""What tests need of JAX and cannot have by a public name: interpreted kernels."""

from typing import Any

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # noqa: TID251
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # noqa: TID251
from jax.experimental.pallas import mosaic_gpu as plgpu

if jax.__version_info__ < (0, 11):
    from jax._src.pallas.mosaic_gpu.interpret.params import (  # noqa: TID251
        InterpretGPUParams,
    )
else:
    InterpretGPUParams = plgpu.InterpretGPUParams


def gpu_interpreter() -> Any:
    """Detect races between warpgroups and copies; memory starts as NaN."""
    return InterpretGPUParams(detect_races=True, uninitialized_memory="nan")


def races_found() -> bool:
    """Whether the last kernel had a race (from 0.11 on, a race raises)."""
    races = gpu_callbacks.get_races()
    return races is not None and bool(races.races_found)


def tpu_races_found() -> bool:
    """Whether the last simulated TPU kernel had a race."""
    races = interpret_pallas_call.races
    return races is not None and bool(races.races_found)
