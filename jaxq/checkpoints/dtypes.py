"""The dtypes that a checkpoint may hold, and how safetensors calls them."""

import ml_dtypes
import numpy as np

from jaxq.checkpoints.errors import CorruptError, UnsupportedError

# Names as in the safetensors format; None: it has none, so the bytes are stored (U8,
# with a last axis of the item's bytes) and the manifest knows what they mean.
SAFETENSORS_NAMES: dict[str, str | None] = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": None,
    "float8_e3m4": None,
    "float8_e4m3": None,
    "float8_e4m3b11fnuz": None,
    "float8_e4m3fnuz": None,
    "float8_e5m2fnuz": None,
    "float4_e2m1fn": None,
    "int4": None,
    "uint4": None,
    "int2": None,
    "uint2": None,
    "complex64": None,
    "complex128": None,
}


def parse_dtype(name: str, where: str) -> np.dtype:
    """Return the dtype of that name.

    Raises:
        CorruptError: no checkpoint holds such a dtype. Anything else NumPy knows, such
            as ``object``, must not be read from a file.
    """
    if name not in SAFETENSORS_NAMES:
        known = ", ".join(SAFETENSORS_NAMES)
        raise CorruptError(f"{where}: dtype {name[:40]!a} is none of {known}")
    return np.dtype(getattr(ml_dtypes, name, name))


def storable(dtype: np.dtype, where: str) -> np.dtype:
    """Return the native-endian dtype under which an array is saved.

    Raises:
        UnsupportedError: naming the place, the dtype and the remedy.
    """
    if dtype.name not in SAFETENSORS_NAMES:
        raise UnsupportedError(
            f"{where} has dtype {dtype.name}, which cannot be saved; convert it to one "
            f"of {', '.join(SAFETENSORS_NAMES)} (a random key: jax.random.key_data)"
        )
    return np.dtype(getattr(ml_dtypes, dtype.name, dtype.name))
