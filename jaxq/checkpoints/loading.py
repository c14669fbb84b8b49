"""`load`: a folder that `save` wrote, back into a tree of parameters."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, Sharding

from jaxq.checkpoints import data_files, manifest, parameter, placement, structure
from jaxq.checkpoints.backends import BACKENDS
from jaxq.checkpoints.errors import MismatchError
from jaxq.qtensor import QTensor, is_qtensor


def load(
    path: str | os.PathLike[str],
    *,
    like: Any = None,
    shardings: Any = None,
    verify: bool = True,
) -> Any:
    """Read the parameters that `save` wrote.

    Files are mapped into memory and copied to their devices one array at a time.

    Args:
        path: the folder.
        like: a tree with the structure to restore, for containers that are not dicts,
            lists or tuples; abstract leaves (from `jax.eval_shape`) are enough. Where
            it has an array, a `QTensor` of that shape and dtype is welcome too. Leaves
            that are sharded over a mesh say where to load to.
        shardings: a `jax.sharding.Sharding` for everything, or a tree of them (a prefix
            of the parameters' tree will do). At a `QTensor` it is the weight's, which
            the codes follow, and the scales where their number divides; or a `QTensor`
            of shardings. By default: the first device, or with Orbax where each array
            was, if the same devices are here.
        verify: whether to compare the SHA-256 of every data file, at the price of
            reading it twice. Sizes and headers are checked always.

    Returns:
        The tree. 64-bit arrays are NumPy's unless JAX has ``jax_enable_x64``.

    Raises:
        MissingFileError: the folder or one of its files is missing.
        CorruptError: a file is truncated or was altered.
        MismatchError: files, manifest, ``like`` or ``shardings`` do not fit together.
        VersionError: a newer jaxq wrote it.
    """
    folder = Path(path).absolute()
    found = manifest.read(folder)
    data_files.check_sizes(folder, found)
    if like is None:
        tree = structure.build(found.tree, lambda leaf_path: leaf_path)
        places: dict[str, Sharding | None] = {}
    else:
        tree, places = _match(like, found.params, folder)
    if shardings is not None:
        places = placement.from_shardings(tree, found.params, shardings)
    arrays = BACKENDS[found.backend].read(folder, found, places, verify)

    def restore(leaf_path: str) -> Any:
        return parameter.rebuild(leaf_path, found.params[leaf_path], arrays.__getitem__)

    if like is None:  # unlike jax.tree.map, keeps the order of the keys
        return structure.build(found.tree, restore)
    return jax.tree.map(restore, tree)


def load_abstract(path: str | os.PathLike[str]) -> Any:
    """Return the tree that `load` would, with shapes and dtypes in place of numbers.

    Only the manifest is read. Useful to decide on shardings, or to plan.

    Args:
        path: the folder.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    found = manifest.read(Path(path).absolute())
    return structure.build(found.tree, found.params.__getitem__)


def _match(
    like: Any, params: Mapping[str, parameter.Abstract], folder: Path
) -> tuple[Any, dict[str, Sharding | None]]:
    """Return ``like`` with paths for leaves, and where its leaves want to be."""
    leaves = structure.flatten(like)
    lacking, unexpected = set(leaves) - set(params), set(params) - set(leaves)
    if lacking or unexpected:
        raise MismatchError(
            f"{folder} and like do not hold the same parameters: "
            f"{_some(lacking)} only in like, {_some(unexpected)} only in the "
            "checkpoint; load without like to see what there is"
        )
    places: dict[str, Sharding | None] = {}
    for path, leaf in leaves.items():
        _compare(path, parameter.abstract(path, leaf), params[path], folder)
        places.update(placement.of_parameter(path, params[path], _place(leaf)))
    treedef = jax.tree.structure(like, is_leaf=is_qtensor)
    return jax.tree.unflatten(treedef, list(leaves)), places


def _compare(
    path: str, wanted: parameter.Abstract, held: parameter.Abstract, folder: Path
) -> None:
    """Raise unless ``held`` can take the place of ``wanted``."""
    if isinstance(held, QTensor) and isinstance(wanted, jax.ShapeDtypeStruct):
        fits = (wanted.shape, wanted.dtype) == (held.shape, held.dtype)
    else:
        fits = parameter.same(wanted, held)
    if not fits:
        raise MismatchError(
            f"{folder}: {path!r} is {parameter.describe(held)}, but like has "
            f"{parameter.describe(wanted)}; change like, or load without it"
        )


def _place(leaf: Any) -> Any:
    """Return where a leaf of ``like`` lies, if that is on a mesh."""

    def one(a: Any) -> Any:
        sharding = getattr(a, "sharding", None)
        real = isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
        return sharding if real else None

    return jax.tree.map(one, leaf)


def _some(paths: set[str]) -> str:
    names = ", ".join(map(repr, sorted(paths)[:3]))
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return f"{names}{more}" if paths else "nothing"
