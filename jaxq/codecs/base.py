"""What a codec is: one dialect of quantized checkpoints, in and out."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from jaxq.codecs.source import Source
from jaxq.codecs.unpacked import Unpacked
from jaxq.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Dense:
    """A weight that no `QTensor` expresses, dequantized: ``[out, in]``, and why."""

    values: np.ndarray
    why: str


class Reader(Protocol):
    """Reads the quantized weights of one checkpoint.

    A *module* is the name of a layer, ``model.layers.0.mlp.up_proj``: its weight would
    be the tensor ``module.weight`` of a float checkpoint.
    """

    def parts(self, module: str) -> tuple[str, ...]:
        """Return the names of all tensors that make up a weight; () when it is float.

        Decided by what is there, not by what the config says should be.
        """

    def read(self, module: str, shape: tuple[int, int]) -> Unpacked | Dense:
        """Return the weight of a module whose float weight would be ``[out, in]``.

        Raises:
            CheckpointError: a part is missing, or its dtype or shape does not fit.
        """

    def unused(self) -> Mapping[str, str]:
        """Return the endings of names that may be there and are not read, and why."""


class Writer(Protocol):
    """Writes the quantized weights of one checkpoint.

    Attributes:
        floats: the layers whose weights stay float.
        late: endings of the tensors that are not final before all layers are known.
    """

    floats: list[str]
    late: tuple[str, ...] = ()

    def write(self, module: str, w: Unpacked) -> tuple[dict[str, np.ndarray], str]:
        """Return the tensors that stand for a weight, and what they leave out.

        Raises:
            UnsupportedError: the format cannot express it; says what of it.
        """

    def leave(self, module: str) -> None:
        """Note a layer whose weight stays float."""
        self.floats.append(module)

    def finish(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """Return a late tensor as it is stored, now that all layers are known.

        Its dtype and shape are what they were.
        """
        del name
        return tensor

    def nearest(self, shape: tuple[int, int], dtype: Any) -> QuantSpec:
        """Return what to requantize a ``[in, out]`` weight with."""

    def config(self) -> dict[str, Any]:
        """Return the ``quantization_config`` of what was written."""


@dataclasses.dataclass(frozen=True)
class Codec:
    """One row of the table.

    Attributes:
        name: what ``--to`` calls it.
        methods: how ``quant_method`` may be spelt.
        read: returns the reader of a checkpoint, from its ``quantization_config``.
        write: returns a writer; None where the format is only read.
    """

    name: str
    methods: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Source], Reader]
    write: Callable[[], Writer] | None = None
