"""The end of a kernel, in registers: bias and activation of a tile of sums."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.epilogue import finished
from pallas_kernels.gpu.mosaic import Mode


@dataclasses.dataclass(frozen=True)
class Finish:
    """``f(y + bias)`` of a tile ``[columns, rows]``, in a Mosaic GPU kernel.

    The warpgroup that copies brings the bias of the thread block's columns to shared
    memory while the others multiply.

    Attributes:
        bias: whether there is one.
        epilogue: a key of `pallas_kernels.epilogue.ACTIVATIONS`.
    """

    bias: bool = False
    epilogue: str | None = None

    def operands(self, bias: jax.Array | None, columns: int) -> list[jax.Array]:
        """Return the bias as the kernel's operand, zeros up to columns, or nothing."""
        if bias is None or not self.bias:
            return []
        return [jnp.pad(bias.astype(jnp.float32), (0, columns - bias.shape[0]))]

    def scratch(self, columns: int) -> dict[str, Any]:
        """Return what the kernel needs for a bias: ``kept``, by name."""
        if not self.bias:
            return {}
        memory = plgpu.SMEM((columns,), jnp.float32)
        return {"kept": (memory, plgpu.Barrier(num_arrivals=1))}

    def parted(self, given: list[Any]) -> tuple[list[Any], list[Any]]:
        """Part optional operands into what comes first, and the bias."""
        count = len(given) - self.bias
        return given[:count], given[count:]

    def fetch(self, bias: list[Any], kept: Any, columns: Any) -> None:
        """Begin to copy the bias of some columns, as one warpgroup is to do."""
        for whole in bias:
            memory, arrived = kept
            plgpu.copy_gmem_to_smem(whole.at[columns], memory, arrived)

    def wait(self, kept: Any) -> None:
        """Wait for the bias, once, in every warpgroup that computes."""
        if self.bias:
            plgpu.barrier_wait(kept[1])

    def __call__(self, mode: Mode, y: jax.Array, kept: Any, here: Any) -> jax.Array:
        """Return finished sums of the columns ``here`` of the thread block."""
        bias = None
        if self.bias:
            bias = mode.per_row(kept[0].at[here], y.shape, jnp.float32)
        return finished(y, bias, self.epilogue)
