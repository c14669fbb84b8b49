"""Write bitsandbytes checkpoints: nf4 or fp4, plain or double quantized, or int8."""

import json
from typing import Any

import numpy as np

from jaxq.checkpoints.errors import UnsupportedError
from jaxq.codecs.base import Writer
from jaxq.codecs.bitsandbytes import DTYPES, KINDS, STATE
from jaxq.codecs.integers import over_columns, refuse_extras, refuse_order
from jaxq.codecs.unpacked import Unpacked, swapped
from jaxq.formats import FORMATS
from jaxq.formats.codebook import CodebookFormat
from jaxq.spec import QuantSpec

NAMES = {ours: theirs for theirs, ours in KINDS.items()}
SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = 256
THRESHOLD = 6.0
Tensors = dict[str, np.ndarray]


class BitsAndBytesWriter(Writer):
    """Writes bitsandbytes layers, all of one kind."""

    def __init__(self) -> None:
        self.kind: str | None = None
        self.double = False
        self.dtype = np.dtype("float16")
        self.threshold = THRESHOLD
        self.floats: list[str] = []

    def write(self, module: str, w: Unpacked) -> tuple[Tensors, str]:
        """Return the tensors of a layer, and a note."""
        refuse_extras(w)
        refuse_order(w)
        kind = NAMES.get(w.spec.format, w.spec.format)
        if kind not in (*KINDS, "int8") or not w.spec.symmetric:
            raise UnsupportedError(
                f"bitsandbytes has nf4, fp4 and int8, and it is {w.spec.describe()}"
            )
        if self.kind not in (None, kind):
            raise UnsupportedError(
                f"bitsandbytes has one format for all layers, {self.kind} here, and it "
                f"is {kind}"
            )
        tensors, note = _int8(module, w) if kind == "int8" else self._four(module, w)
        self.kind = kind
        if kind == "int8" and w.activation is not None:
            self.threshold = float(w.activation.outliers or 0.0)
        return tensors, note

    def nearest(self, shape: tuple[int, int], dtype: Any) -> QuantSpec:
        """Return what to requantize with: nf4 in blocks of 64, or int8 as the rest."""
        del dtype
        if self.kind == "int8":
            return QuantSpec("int8", "channel")
        sizes = [size for size in (64, 32) if shape[0] % size == 0]
        if not sizes:
            raise UnsupportedError(f"blocks of 32 would run across rows of {shape[0]}")
        return QuantSpec(KINDS[self.kind or "nf4"], sizes[0])

    def config(self) -> dict[str, Any]:
        """Return the quantization config."""
        four = self.kind != "int8"
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": four,
            "_load_in_8bit": not four,
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "bnb_4bit_compute_dtype": self.dtype.name,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": self.kind if four else "fp4",
            "bnb_4bit_use_double_quant": self.double,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": sorted(self.floats) or None,
            "llm_int8_threshold": self.threshold,
        }

    def _four(self, module: str, w: Unpacked) -> tuple[Tensors, str]:
        rows, columns = w.shape
        size, name = w.block[0], f"{module}.weight"
        if size not in SIZES or rows % size or w.block[1] != 1:
            raise UnsupportedError(
                f"bitsandbytes has blocks of {SIZES[0]} to {SIZES[-1]} in a row, and "
                f"it has {w.block[0]} x {w.block[1]} of {rows} channels"
            )
        if np.dtype(w.dtype).name not in DTYPES:
            raise UnsupportedError(f"it stands for {w.dtype}")
        self.dtype = np.dtype(w.dtype)
        kind = FORMATS[w.spec.format]
        assert isinstance(kind, CodebookFormat)
        flat = np.ascontiguousarray(w.codes.T).reshape(-1, 2)
        state: dict[str, Any] = {
            "quant_type": NAMES[w.spec.format],
            "blocksize": size,
            "dtype": self.dtype.name,
            "shape": [columns, rows],
        }
        tensors: Tensors = {
            name: ((flat[:, 0] << 4) | flat[:, 1])[:, None],
            # + 0.0: its own table has no minus zero
            f"{name}.quant_map": np.asarray(kind.table, np.float32) + np.float32(0),
        }
        nested = _nested(w.scales)
        if nested is None:
            tensors[f"{name}.absmax"] = _absmax(w)
        else:
            codes, absmax, offset = nested
            self.double = True
            book = FORMATS["dynamic8"]
            assert isinstance(book, CodebookFormat)
            tensors[f"{name}.absmax"] = codes
            tensors[f"{name}.nested_absmax"] = absmax
            tensors[f"{name}.nested_quant_map"] = np.asarray(book.table, np.float32)
            state |= {
                "nested_blocksize": NESTED,
                "nested_dtype": "float32",
                "nested_offset": offset,
            }
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        tensors[f"{name}.{STATE}{state['quant_type']}"] = text
        note = "" if w.activation is None else "its activation is no longer quantized"
        return tensors, note


def _nested(scales: Any) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Return double-quantized scales if bitsandbytes would cut them into these blocks.

    Its blocks are 256 consecutive scales of the row-major ``[out, blocks of a row]``.
    """
    if not isinstance(scales, Unpacked) or scales.spec.format != "dynamic8":
        return None
    turned = swapped(scales)  # [out, blocks of a row]
    shape, block = turned.shape, turned.block
    inside = block[1] >= shape[1] and min(block[0], shape[0]) * shape[1] in (
        NESTED,
        min(shape[0] * shape[1], NESTED),
    )
    along = block[0] == 1 and block[1] == NESTED and shape[1] % NESTED == 0
    outer = turned.scales
    if not (inside or along) or not isinstance(outer, np.ndarray):
        return None
    if outer.dtype != np.float32 or turned.zeros is not None:
        return None
    offset = 0.0 if turned.offset is None else turned.offset
    if np.size(offset) != 1:
        return None
    value = float(np.asarray(offset).reshape(-1)[0])
    codes = np.ascontiguousarray(turned.codes).reshape(-1)
    return codes, np.ascontiguousarray(outer).reshape(-1), value


def _absmax(w: Unpacked) -> np.ndarray:
    """Return the scales as float32 in bitsandbytes' order; decoded where quantized."""
    scales = w.scales
    if isinstance(scales, Unpacked):
        scales = np.asarray(scales.tensor().dequantize(np.float32))
    elif w.spec.scale not in ("float32", "bfloat16", "float16"):
        raise UnsupportedError(f"its scales are {w.spec.scale}")
    wide = over_columns(scales.astype(np.float32), w.grid()[0], w)
    return np.ascontiguousarray(wide.T).reshape(-1)


def _int8(module: str, w: Unpacked) -> tuple[Tensors, str]:
    if w.grid()[0] != 1 or isinstance(w.scales, Unpacked):
        raise UnsupportedError(
            f"LLM.int8() has a scale per channel, and it is {w.spec.describe()}"
        )
    scales = over_columns(w.scales, 1, w).astype(np.float32)[0]
    note = ""
    if w.activation is None:
        note = "bitsandbytes quantizes its activation to int8; here it was float"
    return {
        f"{module}.weight": np.ascontiguousarray(w.codes.T).view(np.int8),
        f"{module}.SCB": largest_magnitude(scales),
        f"{module}.weight_format": np.asarray(0, np.uint8),
    }, note


def largest_magnitude(scales: np.ndarray) -> np.ndarray:
    """Return SCB with ``SCB / 127 = scales``: a 16-bit number where one does it."""
    exact = scales * np.float32(127)
    out = exact.copy()
    for dtype in (DTYPES["bfloat16"], DTYPES["float16"]):
        with np.errstate(over="ignore"):
            short = exact.astype(dtype).astype(np.float32)
        fits = short / np.float32(127) == scales
        out[fits] = short[fits]
    return out
