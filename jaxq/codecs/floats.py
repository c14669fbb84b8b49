"""Matrices of fp8 and fp4 codes, as several formats have them."""

from typing import Any

import ml_dtypes
import numpy as np

from jaxq.codecs.unpacked import Unpacked, block_name
from jaxq.spec import QuantSpec

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def float_matrix(
    codes: np.ndarray,
    scales: np.ndarray,
    scale: str,
    block: tuple[int, int],
    dtype: Any,
) -> Unpacked:
    """Return an fp8 matrix.

    Args:
        codes: float8_e4m3fn ``[in, out]``.
        scales: one per block, as ``scale`` stores them; they multiply.
        scale: of `jaxq.spec.SCALE_DTYPES`.
        block: ``(in, out)``.
        dtype: of the matrix it stands for.
    """
    name = block_name(block, (codes.shape[0], codes.shape[1]))
    spec = QuantSpec("fp8_e4m3", name, scale=scale)
    return Unpacked(codes.view(np.uint8), scales, spec, block, dtype)


def fp4_matrix(
    codes: np.ndarray,
    scales: np.ndarray,
    world: np.ndarray | None,
    *,
    divides: bool = False,
) -> Unpacked:
    """Return an nvfp4 matrix, or mxfp4 without ``world``; both stand for bfloat16.

    Args:
        codes: E2M1 ``[in, out]``, a byte each.
        scales: float8_e4m3fn of 16 channels each, or e8m0 patterns of 32.
        world: float32 ``[1, 1]`` that scales the scales.
        divides: whether it divides them (compressed-tensors) or multiplies.
    """
    if world is None:
        spec = QuantSpec("fp4_e2m1", 32, scale="e8m0")
        return Unpacked(codes, scales, spec, (32, 1), BFLOAT16)
    inner = small_scales(divides)
    grid = scales.shape[0], scales.shape[1]
    level = Unpacked(scales.view(np.uint8), world, inner, grid, np.float32)
    spec = QuantSpec("fp4_e2m1", 16, scale=inner)
    return Unpacked(codes, level, spec, (16, 1), BFLOAT16)


def small_scales(divides: bool) -> QuantSpec:
    """Return how nvfp4 stores scales: e4m3, and one number for all of them.

    Args:
        divides: whether the number divides them (compressed-tensors) or multiplies.
    """
    scale = "inverse_float32" if divides else "float32"
    return QuantSpec("fp8_e4m3", "tensor", scale=scale)


def e8m0_patterns(scales: np.ndarray) -> np.ndarray:
    """Return power-of-two scales as their bytes, whichever dtype they are stored in."""
    return scales.view(np.uint8)
