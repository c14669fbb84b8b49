"""The backend for sharded trees: every device writes and reads its own part."""

import errno
import logging
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from jaxq.checkpoints import placement
from jaxq.checkpoints.data_files import check_contents, fingerprint
from jaxq.checkpoints.errors import (
    CheckpointError,
    CorruptError,
    MismatchError,
    UnsupportedError,
)
from jaxq.checkpoints.manifest import DataFile, Manifest

FOLDER = "arrays"
# What not every TensorStore knows is stored as something that holds the same values
# (below a byte) or the same bits (other 8-bit floats); the manifest knows what it was.
WIDENED = {
    "int2": "int8",
    "int4": "int8",
    "uint2": "uint8",
    "uint4": "uint8",
    "float4_e2m1fn": "float8_e4m3fn",
}
VIEWED = (
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)


def write(
    folder: Path, manifest: Manifest, arrays: Mapping[str, Any], shard_bytes: int
) -> dict[str, DataFile]:
    """Write every array with Orbax, as a flat tree from name to array.

    Args:
        folder: where to; the arrays go into its folder `arrays`.
        manifest: names the arrays, with their shapes and dtypes.
        arrays: the arrays by name.
        shard_bytes: the limit of an Orbax data file.

    Returns:
        The files written.

    Raises:
        UnsupportedError: several processes would have to agree on one folder.
    """
    if jax.process_count() > 1:
        raise UnsupportedError(
            f"{jax.process_count()} processes run, and a checkpoint is written by one; "
            "save the tree with orbax.checkpoint itself"
        )
    ocp = _orbax()
    stored = {
        name: _convert(arrays[name], _stored_dtype(tensor))
        for name, tensor in manifest.tensors()
        if _has_numbers(tensor)
    }
    if not stored:
        return {}
    args = ocp.args.PyTreeSave(stored, ocdbt_target_data_file_size=shard_bytes)
    with _quiet(), _checkpointer(ocp) as checkpointer:
        try:
            with _ctrl_c_later():
                checkpointer.save(folder / FOLDER, args=args)
        except (ValueError, RuntimeError) as error:  # how TensorStore says: no room
            _settle(folder)
            full = "RESOURCE_EXHAUSTED" in str(error)
            code = errno.ENOSPC if full else errno.EIO
            reason = f"{os.strerror(code)} (Orbax: {_first_line(error)})"
            raise OSError(code, reason) from error
    return {
        path.relative_to(folder).as_posix(): fingerprint(path)
        for path in sorted((folder / FOLDER).rglob("*"))
        if path.is_file()
    }


def read(
    folder: Path, manifest: Manifest, places: placement.Places, verify: bool
) -> dict[str, Any]:
    """Read every array to its place, by default the one it was saved from.

    Where those devices do not exist here, the default is the first device.

    Raises:
        CorruptError: a file is damaged.
        MismatchError: files and manifest do not hold the same arrays.
    """
    if verify:
        check_contents(folder, manifest, manifest.files)
    tensors = dict(manifest.tensors())
    wanted = {name: t for name, t in tensors.items() if _has_numbers(t)}
    arrays = {
        name: placement.put(np.empty(0, np.uint8), tensor, places.get(name))
        for name, tensor in tensors.items()
        if name not in wanted
    }
    if not wanted:
        return arrays
    ocp = _orbax()
    with _quiet(), _checkpointer(ocp) as checkpointer, _explained(folder):
        found = checkpointer.metadata(folder / FOLDER).item_metadata.tree
        _check(folder, found, wanted)
        restore = {
            name: _restore_args(
                ocp, tensor, places.get(name) or _saved_place(found[name])
            )
            for name, tensor in wanted.items()
        }
        args = ocp.args.PyTreeRestore(restore_args=restore)
        restored = checkpointer.restore(folder / FOLDER, args=args)
    for name, array in restored.items():
        arrays[name] = _convert(array, np.dtype(wanted[name].dtype))
    return arrays


def check_headers(folder: Path, manifest: Manifest) -> None:
    """Check that Orbax holds the manifest's arrays and no others; no data is read.

    Raises:
        CorruptError: Orbax's own files are damaged.
        MismatchError: naming the tensor and the two values.
    """
    wanted = {n: t for n, t in manifest.tensors() if _has_numbers(t)}
    if not wanted:
        return
    with _quiet(), _checkpointer(_orbax()) as checkpointer, _explained(folder):
        found = checkpointer.metadata(folder / FOLDER).item_metadata.tree
        _check(folder, found, wanted)


def _orbax() -> Any:
    """Import Orbax when it is needed: it takes a second."""
    import orbax.checkpoint as ocp

    return ocp


@contextmanager
def _checkpointer(ocp: Any) -> Iterator[Any]:
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
        yield checkpointer
    finally:
        checkpointer.close()


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Let Ctrl-C take effect after the block; a second one does at once.

    Orbax writes from threads of its own, which an exception here does not stop: they
    would make the folder again after it was removed.
    """
    handler = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or not callable(handler):
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []

    def later(number: int, frame: FrameType | None) -> None:
        if caught:
            handler(number, frame)
        caught.append((number, frame))

    signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(*caught[0])


def _settle(folder: Path, calm: float = 0.5, patience: float = 30) -> None:
    """Remove a folder until nobody makes it again for ``calm`` seconds.

    After one write failed, TensorStore's threads still go through the others.
    """
    end = time.monotonic() + patience
    last = time.monotonic()
    while time.monotonic() < min(last + calm, end):
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            last = time.monotonic()
        time.sleep(calm / 10)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax from logging what is also raised, and from warning of the expected.

    After a failed write its other threads each report to an event loop that is gone.
    """
    logger = logging.getLogger("absl")
    level, hook = logger.level, sys.unraisablehook

    def report(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = report
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn what Orbax raises at damaged files into errors that name the folder."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise CorruptError(
            f"{folder / FOLDER} cannot be read by Orbax: {_first_line(error)}; fetch "
            "or save the checkpoint again"
        ) from error


def _check(
    folder: Path, found: Any, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    found = found if isinstance(found, Mapping) else {}
    odd = sorted(set(found) ^ set(wanted))
    if odd:
        lacks = "lacks" if odd[0] in wanted else "has the unexpected"
        raise MismatchError(
            f"{folder / FOLDER} {lacks} {odd[0]!a} (jaxq.json lists {len(wanted)} "
            f"arrays, Orbax {len(found)}); they belong to different checkpoints"
        )
    for name, tensor in wanted.items():
        has = (tuple(found[name].shape), np.dtype(found[name].dtype))
        expected = (tuple(tensor.shape), _stored_dtype(tensor))
        if has != expected:
            raise MismatchError(
                f"{folder / FOLDER}: {name!a} is {has[0]} {has[1]}, but jaxq.json says "
                f"{expected[0]} {expected[1]}; they belong to different checkpoints"
            )


def _saved_place(metadata: Any) -> Sharding:
    """Return the sharding an array was saved with, or the first device."""
    try:
        place = metadata.sharding.to_jax_sharding()
    except (ValueError, AttributeError):
        place = None
    return place or SingleDeviceSharding(jax.local_devices()[0])


def _restore_args(ocp: Any, tensor: jax.ShapeDtypeStruct, place: Sharding) -> Any:
    dtype = _stored_dtype(tensor)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
    return ocp.ArrayRestoreArgs(
        restore_type=jax.Array, sharding=place, global_shape=tensor.shape, dtype=dtype
    )


def _stored_dtype(tensor: jax.ShapeDtypeStruct) -> np.dtype:
    """Return the dtype on disk."""
    name = np.dtype(tensor.dtype).name
    if name in VIEWED:
        return np.dtype(np.uint8)
    name = WIDENED.get(name, name)
    return np.dtype(getattr(ml_dtypes, name, name))


def _convert(array: Any, dtype: np.dtype) -> Any:
    """Return an array in its dtype on disk, or back from it; sharded as it is."""
    if array.dtype == dtype:
        return array
    if array.dtype.name in VIEWED or dtype.name in VIEWED:
        return array.view(dtype)
    return array.astype(dtype)


def _has_numbers(tensor: jax.ShapeDtypeStruct) -> bool:
    """Whether there is anything to store: Orbax refuses arrays without elements."""
    return 0 not in tensor.shape


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
