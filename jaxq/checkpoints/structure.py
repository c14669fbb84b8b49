"""The structure of a tree as plain data: what is a dict, a list, a tuple, a leaf.

A node is a string (a leaf: its path), null (an empty place), or an object with one key:
``{"dict": [[key, node], ...]}``, ``{"frozen_dict": ...}``, ``{"list": [node, ...]}``,
``{"tuple": [...]}`` or ``{"other": [[name, node], ...]}``. The last is any other
container (an NNX State, an Equinox module, a named tuple). No file can name the class
to build, so it reads back as a dict of its children, or as itself through ``like``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.tree_util import DictKey, SequenceKey, keystr, tree_flatten_with_path

from jaxq.checkpoints.errors import CorruptError, UnsupportedError
from jaxq.checkpoints.strict_json import shorten
from jaxq.qtensor import is_qtensor

MAX_DEPTH = 100
Node = Any
KeyPath = tuple[Any, ...]


def path_string(path: Sequence[Any]) -> str:
    """Join a key path with "/": ``params/Dense_0/kernel``."""
    return keystr(tuple(path), simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree (arrays, `QTensor`s, plain values) by their path.

    Raises:
        UnsupportedError: two leaves have the same path, or JAX cannot flatten the tree.
    """
    try:
        flat, _ = tree_flatten_with_path(tree, is_leaf=is_qtensor)
    except (ValueError, TypeError) as error:
        raise UnsupportedError(f"the tree cannot be flattened: {error}") from error
    leaves: dict[str, Any] = {}
    for path, leaf in flat:
        name = path_string(path)
        if name in leaves:
            raise UnsupportedError(
                f"two leaves of the tree have the path {name!r}; rename a key"
            )
        leaves[name] = leaf
    return leaves


def describe(tree: Any, path: KeyPath = ()) -> Node:
    """Return the structure of a tree as a node; see the module.

    Raises:
        UnsupportedError: the tree nests too deep.
    """
    if len(path) > MAX_DEPTH:
        raise UnsupportedError(
            f"{path_string(path)[:80]!r}... lies more than {MAX_DEPTH} levels deep; "
            "save a flatter tree"
        )
    if tree is None:
        return None
    if _is_leaf(tree):
        return path_string(path)
    if _is_dict(tree):
        kind = "dict" if type(tree) is dict else "frozen_dict"
        return {kind: [[k, describe(v, (*path, DictKey(k)))] for k, v in tree.items()]}
    if type(tree) in (list, tuple):
        children = [describe(v, (*path, SequenceKey(i))) for i, v in enumerate(tree)]
        return {type(tree).__name__: children}
    below, _ = tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    return {
        "other": [[path_string(key), describe(v, (*path, *key))] for key, v in below]
    }


def build(node: Node, leaf: Callable[[str], Any]) -> Any:
    """Invert `describe`: the tree whose leaves are ``leaf(path)``."""
    if node is None:
        return None
    if isinstance(node, str):
        return leaf(node)
    ((kind, children),) = node.items()
    if kind in ("list", "tuple"):
        built = [build(child, leaf) for child in children]
        return built if kind == "list" else tuple(built)
    entries = {key: build(child, leaf) for key, child in children}
    if kind == "frozen_dict":
        from flax.core import FrozenDict

        return FrozenDict(entries)
    return entries


def leaf_paths(node: Node, where: str, depth: int = 0) -> list[str]:
    """Return the paths of a node's leaves, checking that it is a node at all.

    Raises:
        CorruptError: naming what is no node.
    """
    if depth > MAX_DEPTH:
        raise CorruptError(f"{where}: the tree is deeper than {MAX_DEPTH} levels")
    if node is None:
        return []
    if isinstance(node, str):
        return [node]
    if not isinstance(node, dict) or len(node) != 1:
        raise CorruptError(f"{where}: the tree has {shorten(node)} for a node")
    ((kind, children),) = node.items()
    if kind in ("dict", "frozen_dict", "other"):
        children = _values(children, kind, where)
    elif kind not in ("list", "tuple") or not isinstance(children, list):
        raise CorruptError(f"{where}: the tree has {shorten(node)} for a node")
    return [path for child in children for path in leaf_paths(child, where, depth + 1)]


def _values(entries: Any, kind: str, where: str) -> list[Node]:
    """Return the nodes of ``[[key, node], ...]``, whose keys are unique."""
    if not isinstance(entries, list) or not all(
        isinstance(e, list) and len(e) == 2 and isinstance(e[0], str | int)
        for e in entries
    ):
        raise CorruptError(
            f"{where}: the tree has {shorten(entries)} for the entries of a {kind}"
        )
    keys = [key for key, _ in entries]
    if len(set(keys)) != len(keys) or len({isinstance(k, str) for k in keys}) > 1:
        raise CorruptError(
            f"{where}: the tree repeats or mixes keys in {shorten(entries)}"
        )
    return [node for _, node in entries]


def _is_dict(tree: Any) -> bool:
    """Whether this is a dict or Flax's frozen one, with keys that JSON can hold."""
    frozen = type(tree).__name__ == "FrozenDict" and isinstance(tree, Mapping)
    if type(tree) is not dict and not frozen:
        return False
    return all(isinstance(key, str | int) for key in tree)


def _is_leaf(tree: Any) -> bool:
    return is_qtensor(tree) or jax.tree_util.all_leaves([tree])
