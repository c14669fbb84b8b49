"""Binary coding: a weight as a sum of signs, each with a scale of its own.

    w ≈ Σ_i α_i · b_i + z,   b_i = ±1

Bit i of a code is the sign b_i (1 is plus), so q bits choose among 2^q numbers that
need not be evenly spaced. Where they are, α_i = 2^(i−1) s, it is an integer format:
every one is a binary coding (`binary_coded`), and runs in the same look-up kernels.

A block has q scales. They lie beside each other along the packed axis, ``[groups · q,
N]``, those of one block together, low bits first; the z is the tensor's ``offset``.

Source: Park et al. 2022, LUT-GEMM (arXiv 2206.09557); Jeon et al. 2020 (BiQGEMM).
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxq.qtensor import QTensor
from jaxq.scales import store_scale


def interleaved(planes: jax.Array, axis: int) -> jax.Array:
    """Return scales of planes ``[q, *grid]`` beside each other along one axis.

    Args:
        planes: one value per plane and block.
        axis: of the grid, not negative.
    """
    together = jnp.moveaxis(planes, 0, axis + 1)
    shape = list(planes.shape[1:])
    shape[axis] *= planes.shape[0]
    return together.reshape(shape)


def binary_coded(q: QTensor) -> QTensor:
    """Return an integer tensor as a binary coding: the same numbers.

    ``(code − zero) s = Σ_i 2^(i−1) s · b_i + ((2^q − 1) / 2 − zero) s`` for codes from
    0 on. Scales that were rounded to bfloat16 stay exact, as they are multiplied by
    powers of two; the offset is float32.

    Args:
        q: of an integer format below 8 bits, each block with one plain scale.

    Raises:
        ValueError: when the format or the scales are others.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxq import QuantSpec, quantize
        >>> w = quantize(jnp.asarray([[0.0], [1.0], [3.0]]), QuantSpec("uint2"))
        >>> binary_coded(w).dequantize()[:, 0].tolist()
        [0.0, 1.0, 3.0]
    """
    fmt, kind = q.spec.number_format, q.spec.scale
    plain = isinstance(kind, str) and kind in ("float32", "bfloat16", "float16")
    if q.spec.binary:
        return q
    if not fmt.is_integer or fmt.bits == 8 or not plain or q.spec.center:
        raise ValueError(
            f"{q.spec.describe()} has no binary coding here: it takes integers of 2 to "
            f"7 bits, with scales in float32, bfloat16 or float16"
        )
    if not isinstance(q.scales, jax.Array):
        raise ValueError(f"{q!r} has scales that are quantized themselves")
    scale = q.scale_values()
    powers = 2.0 ** jnp.arange(-1, fmt.bits - 1, dtype=jnp.float32)
    planes = powers.reshape(-1, *(1,) * scale.ndim) * scale
    zero = jnp.float32(fmt.lowest) * -1  # codes are stored less the lowest integer
    zero = zero if q.zeros is None else zero + q.zeros.astype(jnp.float32)
    offset = (jnp.float32((2**fmt.bits - 1) / 2) - zero) * scale
    offset = offset if q.offset is None else offset + q.offset
    spec = dataclasses.replace(
        q.spec,
        format=f"uint{fmt.bits}",
        symmetric=False,
        grid="restricted",
        binary=True,
    )
    return dataclasses.replace(
        q,
        scales=store_scale(interleaved(planes, q.axis % q.ndim), str(kind)),
        zeros=None,
        offset=offset,
        spec=spec,
    )
