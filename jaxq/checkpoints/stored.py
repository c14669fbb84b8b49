"""`Stored`: the parameters of a saved checkpoint, read one at a time."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxq.checkpoints import data_files, manifest, parameter, safetensors, shards
from jaxq.checkpoints.errors import UnsupportedError
from jaxq.checkpoints.lazy import LazyArray


class Stored(Mapping[str, Any]):
    """A checkpoint's parameters by path; each is read whenever it is asked for.

    Arrays, those of `QTensor`s too, are NumPy's: what is not kept is not in memory.

    Args:
        path: the folder that `jaxq.save` or a `StreamWriter` wrote.
        verify: whether to compare the SHA-256 of every file now, which reads it once.

    Raises:
        MissingFileError: the folder or one of its files is missing.
        CorruptError: a file is truncated or was altered.
        MismatchError: files and manifest do not fit together.
        UnsupportedError: it was saved with another backend than safetensors.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from jaxq.checkpoints import save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     stored = Stored(save(f"{folder}/model", {"w": jnp.ones(2), "b": 0}))
        ...     stored["w"]
        array([1., 1.], dtype=float32)
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        folder = Path(path).absolute()
        self.manifest = found = manifest.read(folder)
        if found.backend != "safetensors":
            raise UnsupportedError(
                f"{folder} was saved with backend={found.backend!r}, which is not read "
                "one parameter at a time: load it, or save it with 'safetensors'"
            )
        data_files.check_sizes(folder, found)
        shards.check_headers(folder, found)
        if verify:
            data_files.check_contents(folder, found, found.files)
        headers = (safetensors.read_header(folder / file) for file in found.files)
        self._headers = {name: header for header in headers for name in header.entries}
        self._tensors = dict(found.tensors())

    def __getitem__(self, path: str) -> Any:
        """Read a parameter."""
        return parameter.rebuild(path, self.manifest.params[path], self._read)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the paths."""
        return iter(self.manifest.params)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.manifest.params)

    def _read(self, name: str) -> np.ndarray:
        return read_tensor(self._headers[name], name, self._tensors[name])


def read_tensor(
    header: safetensors.Header, name: str, tensor: jax.ShapeDtypeStruct
) -> np.ndarray:
    """Read a tensor of a file.

    Args:
        header: of the file.
        name: of the tensor.
        tensor: its shape and dtype, which safetensors need not know.

    Raises:
        MissingFileError: the file cannot be read any more.
        CorruptError: the file has another size than when its header was read.
    """
    dtype = np.dtype(tensor.dtype)
    return LazyArray(
        path=header.path,
        name=name,
        stored_shape=tensor.shape,
        stored_dtype=dtype,
        start=header.start + header.entries[name].start,
        file_bytes=header.size,
        dtype=dtype,
        transposed=False,
    ).read()
