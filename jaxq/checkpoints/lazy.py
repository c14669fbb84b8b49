"""Tensors that stay in their files until they are read: one, or a stack of several."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.checkpoints.errors import (
    CheckpointError,
    CorruptError,
    MissingFileError,
)
from jaxq.checkpoints.safetensors import Header

PIECE = 2**20  # of bytes: a piece that is turned must fit a core's cache
FLOATS: dict[str, np.dtype] = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": jnp.dtype("bfloat16"),
}


@dataclasses.dataclass(frozen=True, repr=False)
class LazyArray:
    """One float tensor of a safetensors file: shape and dtype now, numbers when asked.

    To JAX's tree functions it is a leaf, like an array. Nothing is open or mapped
    between two reads, so a tree of them costs no memory, however large the model.

    Attributes:
        path: of the file.
        name: of the tensor, in the file.
        stored_shape: its shape in the file.
        stored_dtype: its dtype in the file.
        start: the byte of the file at which its numbers begin.
        file_bytes: the size of the file when its header was checked.
        dtype: what `read` converts to.
        transposed: whether `read` returns it transposed (all axes reversed).

    Example:
        >>> import numpy as np
        >>> from pathlib import Path
        >>> from safetensors.numpy import save_file
        >>> from jaxq.checkpoints.safetensors import read_header
        >>> save_file({"w": np.ones((2, 3), np.float16)}, "x.safetensors")
        >>> header = read_header(Path("x.safetensors"))
        >>> lazy = LazyArray.of(header, "w", "float32", transposed=True)
        >>> lazy
        LazyArray(float32[3, 2], 'w' of x.safetensors)
        >>> lazy.read().sum(axis=1)
        array([2., 2., 2.], dtype=float32)
    """

    path: Path
    name: str
    stored_shape: tuple[int, ...]
    stored_dtype: np.dtype
    start: int
    file_bytes: int
    dtype: np.dtype
    transposed: bool

    @classmethod
    def of(
        cls, header: Header, name: str, dtype: Any = None, transposed: bool = False
    ) -> "LazyArray":
        """Return the tensor ``name`` of a file, whose dtype must be in `FLOATS`.

        Args:
            header: of the file, see `read_header`.
            name: of the tensor.
            dtype: what to convert to; None keeps the file's.
            transposed: whether to reverse its axes.
        """
        entry = header.entries[name]
        stored = FLOATS[entry.dtype]
        return cls(
            path=header.path,
            name=name,
            stored_shape=entry.shape,
            stored_dtype=stored,
            start=header.start + entry.start,
            file_bytes=header.size,
            dtype=stored if dtype is None else jnp.dtype(dtype),
            transposed=transposed,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what `read` returns."""
        return self.stored_shape[::-1] if self.transposed else self.stored_shape

    @property
    def ndim(self) -> int:
        """The rank."""
        return len(self.stored_shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.stored_shape)

    @property
    def nbytes(self) -> int:
        """The bytes of what `read` returns."""
        return self.size * self.dtype.itemsize

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype alone, as JAX takes them."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def read(self) -> np.ndarray:
        """Return the numbers, at the cost of one tensor and a few MB of memory.

        Raises:
            MissingFileError: the file cannot be read any more.
            CorruptError: the file has another size than when its header was read.
        """
        out = np.empty(self.shape, self.dtype)
        try:
            with self.path.open("rb", buffering=0) as file:
                self._check_size(os.fstat(file.fileno()).st_size)
                file.seek(self.start)
                self._fill(file, out)
        except CheckpointError:
            raise
        except OSError as error:
            raise MissingFileError(
                f"{self.path} can no longer be read: {error.strerror or error}"
            ) from error
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read, for NumPy's functions."""
        if copy is False:
            raise ValueError(f"{self!r} is on the disk: it cannot be had uncopied")
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __repr__(self) -> str:
        """Say dtype, shape and origin in one line."""
        shape = ", ".join(map(str, self.shape))
        return (
            f"LazyArray({self.dtype.name}[{shape}], {self.name!r} of {self.path.name})"
        )

    def _fill(self, file: Any, out: np.ndarray) -> None:
        """Read what lies next in the file, which is never there in full twice."""
        if self.transposed:
            self._fill_rows(file, out.T)
        elif self.dtype != self.stored_dtype:
            self._fill_rows(file, out.reshape(-1))
        else:
            self._read_into(file, out)

    def _fill_rows(self, file: Any, rows: np.ndarray) -> None:
        """Read, convert and turn a few rows at a time."""
        if not rows.size:
            return
        if not rows.ndim:
            rows = rows.reshape(1)
        one = rows[0].size * self.stored_dtype.itemsize
        step = max(PIECE // one, 1)
        buffer = np.empty((min(step, len(rows)), *rows.shape[1:]), self.stored_dtype)
        for begin in range(0, len(rows), step):
            piece = buffer[: len(rows) - begin]
            self._read_into(file, piece)
            rows[begin : begin + step] = piece.astype(self.dtype, copy=False)

    def _read_into(self, file: Any, array: np.ndarray) -> None:
        left = array.reshape(-1).view(np.uint8).data
        while len(left):
            got = file.readinto(left)
            if not got:
                self._check_size(os.fstat(file.fileno()).st_size)
                raise CorruptError(f"{self.path} ended early; fetch it again")
            left = left[got:]

    def _check_size(self, found: int) -> None:
        if found != self.file_bytes:
            raise CorruptError(
                f"{self.path} changed since it was opened: it had {self.file_bytes} "
                f"bytes, and has {found}; leave the model alone while it is read"
            )


@dataclasses.dataclass(frozen=True, repr=False)
class LazyStack:
    """Several tensors of one shape and dtype, read as one with a leading axis.

    Experts are apart in most checkpoints, and one weight in the model.

    Attributes:
        parts: the tensors, in order; at least one.
    """

    parts: tuple[LazyArray, ...]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of what `read` returns."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what `read` returns."""
        return (len(self.parts), *self.parts[0].shape)

    @property
    def ndim(self) -> int:
        """The rank."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of what `read` returns."""
        return self.size * self.dtype.itemsize

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype alone, as JAX takes them."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def read(self) -> np.ndarray:
        """Return the numbers; beside them, one part at a time is in memory.

        Raises:
            MissingFileError: a file cannot be read any more.
            CorruptError: a file has another size than when its header was read.
        """
        out = np.empty(self.shape, self.dtype)
        for place, part in enumerate(self.parts):
            out[place] = part.read()
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read, for NumPy's functions."""
        if copy is False:
            raise ValueError(f"{self!r} is on the disk: it cannot be had uncopied")
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __repr__(self) -> str:
        """Say dtype, shape and origin in one line."""
        shape = ", ".join(map(str, self.shape))
        first = self.parts[0]
        return (
            f"LazyStack({self.dtype.name}[{shape}], {first.name!r} and "
            f"{len(self.parts) - 1} more of {first.path.name})"
        )
