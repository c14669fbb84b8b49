"""`Convertible`: a model to convert: its tensors one by one, and what goes with them.

From a folder only what is being written is in memory: a tensor, or a layer where scales
of inputs are folded, which concerns the modules of one layer.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.checkpoints import Stored, is_jaxq_checkpoint
from jaxq.checkpoints.errors import CheckpointError
from jaxq.checkpoints.huggingface import read_config
from jaxq.codecs import open_model, read_leaves
from jaxq.fold import EDGES, fold, has_input_scales
from jaxq.heap import one_at_a_time
from jaxq.lift import quantized
from jaxq.lm import DEMO, load_model
from jaxq.model import Model
from jaxq.qtensor import QTensor, is_qtensor

FLOAT, JAXQ = "float", "jaxq"
# What a layer is checked on: sequences, tokens, words, and how large embeddings are.
CHECKED, WORDS, SPREAD = (2, 32), 64, 0.02


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor on its way.

    Attributes:
        name: as the target has it.
        value: an array or a `QTensor`, as jaxq has it.
        is_layer: it is the weight of a layer, not a table, a norm or a bias.
        is_inner: it is in a block, not in a head or an embedding.
        transposed: the target has it the other way round.
        note: what was lost in reading; empty: nothing.
    """

    name: str
    value: Any
    is_layer: bool
    is_inner: bool
    transposed: bool
    note: str = ""

    @classmethod
    def of(cls, name: str, slot: Any, value: Any, note: str = "") -> "Leaf":
        """Return what goes into a slot."""
        is_layer = slot.transposed or slot.path[-1] == "kernel"
        return cls(name, value, is_layer, bool(block_of(name)), slot.transposed, note)


@dataclasses.dataclass(frozen=True)
class Convertible:
    """A model to convert.

    Attributes:
        codec: the format it is in.
        config: its `config.json`, without what a format wrote into it.
        leaves: its tensors.
        nbytes: about how many bytes it has.
        folder: where its side files lie, or None.
        files: texts of side files by name.
        notes: of the reading, by tensor; complete when all leaves were taken.
    """

    codec: str
    config: Mapping[str, Any]
    leaves: Iterator[Leaf]
    nbytes: int
    folder: Path | None
    files: Mapping[str, str]
    notes: dict[str, str]


def opened(source: str | Path | Model, to: str, requantize: bool) -> Convertible:
    """Return a model to convert; a folder's tensors are read as they are needed.

    Args:
        source: a model, or what `jaxq.load_model` takes.
        to: the format it shall have.
        requantize: whether weights whose input scales cannot be folded take them in.

    Raises:
        CheckpointError: it is damaged, or has no config.
    """
    if is_foreign(source):
        return _of_others(Path(str(source)))
    if isinstance(source, Model) or not _is_stored(source):
        return _in_memory(source, to, requantize)
    return _of_ours(Path(source), to, requantize)


def is_foreign(source: str | Path | Model) -> bool:
    """Whether a source is a folder that another library wrote."""
    return not isinstance(source, Model) and not (
        str(source) == DEMO or is_jaxq_checkpoint(source)
    )


def block_of(name: str) -> str:
    """Return the block that a tensor is in, ``model.layers.3``; empty: in none."""
    parts = name.split(".")
    numbers = (i for i, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[: next(numbers, -1) + 1])


def config_of(lm: Model) -> dict[str, Any]:
    """Return a model's `config.json`, parsed.

    Raises:
        CheckpointError: it has none.
    """
    text = lm.files.get("config.json")
    if text is None:
        raise CheckpointError(
            f"{lm.name} has no config.json among its files, which every other format "
            "needs: load it from a folder that has one"
        )
    return json.loads(text)


def _is_stored(source: str | Path) -> bool:
    """Whether a source is a folder whose parameters can be read one at a time."""
    from jaxq.checkpoints import manifest

    return str(source) != DEMO and manifest.read(source).backend == "safetensors"


def _of_others(path: Path) -> Convertible:
    """Open a folder of another library."""
    from jaxq.models import find_family

    hf_config, checkpoint = open_model(path)
    family = find_family(hf_config)
    config = family.read_config(hf_config)
    slots = family.slots(config, checkpoint)
    today = dict(zip(slots, family.slots(config), strict=True))
    notes: dict[str, str] = {}

    def leaves() -> Iterator[Leaf]:
        for leaf in read_leaves(checkpoint, slots, None, family.unread(config)):
            if leaf.note:
                notes[leaf.name] = leaf.note
            yield Leaf.of(today[leaf.name], leaf.slot, leaf.value, leaf.note)

    folder = path.parent if path.is_file() else path
    return Convertible(
        codec=checkpoint.codec,
        config=_plain_config(hf_config),
        leaves=leaves(),
        nbytes=sum(p.stat().st_size for p in folder.iterdir() if p.is_file()),
        folder=folder,
        files={},
        notes=notes,
    )


def _of_ours(folder: Path, to: str, requantize: bool) -> Convertible:
    """Open a folder that `jaxq.save` wrote."""
    stored, config = Stored(folder), read_config(folder)
    scaled = has_input_scales(dict(stored.manifest.params))
    return Convertible(
        codec=JAXQ,
        config=_plain_config(config),
        leaves=_all_leaves(
            config,
            lambda path: stored["/".join(path)],
            folded=scaled and to != FLOAT,
            partly=requantize,
        ),
        nbytes=sum(file.bytes for file in stored.manifest.files.values()),
        folder=folder,
        files={},
        notes={},
    )


def _in_memory(source: str | Path | Model, to: str, requantize: bool) -> Convertible:
    """Return a model that is in memory."""
    lm = source if isinstance(source, Model) else load_model(source)
    config = config_of(lm)
    return Convertible(
        codec=lm.codec if lm.codec != "float" else JAXQ,
        config=_plain_config(config),
        leaves=_all_leaves(
            config,
            lambda path: at(lm.params, path),
            folded=has_input_scales(lm.params) and to != FLOAT,
            partly=requantize,
            notes=lm.notes,
        ),
        nbytes=lm.nbytes,
        folder=None,
        files=lm.files,
        notes=dict(lm.notes),
    )


def _all_leaves(
    hf_config: Mapping[str, Any],
    read: Callable[[tuple[str, ...]], Any],
    *,
    folded: bool,
    partly: bool,
    notes: Mapping[str, str] = {},
) -> Iterator[Leaf]:
    """Yield the tensors of a model, its input scales folded or as they are."""
    from jaxq.models import find_family

    family = find_family(hf_config)
    config = family.read_config(hf_config)
    logits = None
    if folded and family.name in EDGES:
        logits = logits_of_block(family, config)

    def fold_block(tree: Any) -> Any:
        (name,) = tree["params"]
        check = logits if name.startswith("layers_") else None
        return fold(tree, family.name, check, partly=partly)

    slots = family.slots(config)
    return leaves_of(slots, read, fold_block if folded else None, notes)


def leaves_of(
    slots: Mapping[str, Any],
    read: Callable[[tuple[str, ...]], Any],
    fold_block: Callable[..., Any] | None,
    notes: Mapping[str, str] = {},
) -> Iterator[Leaf]:
    """Yield tensors, in the order of their slots.

    Args:
        slots: where they are, by name.
        read: returns the parameter of a path.
        fold_block: returns the tree of a block without input scales; or None.
        notes: of the tensors.
    """

    def together(item: tuple[str, Any]) -> Any:
        name, slot = item
        return (fold_block and block_of(name)) or slot.path

    def groups() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        for _, group in itertools.groupby(slots.items(), together):
            held = dict(group)
            tree = nested({slot.path: read(slot.path) for slot in held.values()})
            if fold_block and has_input_scales(tree):
                tree = fold_block(tree)
            yield held, tree
            del tree  # or it would be held while the next is read

    for held, tree in one_at_a_time(groups()):
        for name, slot in held.items():
            value = at(tree, slot.path)
            if slot.place is not None:
                value = _part(value, slot.place)
            yield Leaf.of(name, slot, value, notes.get(name, ""))
        del tree, value


def logits_of_block(family: Any, config: Any) -> Callable[[Any], jax.Array]:
    """Return what computes logits of one block, on float activations.

    The block stands in a model of its own, between a table and a head of a few random
    words. Small embeddings leave most of what comes out to the block.
    """
    small = dataclasses.replace(
        config,
        num_layers=1,
        vocab_size=WORDS,
        tied=False,
        windows=config.windows[:1],
    )
    shapes = family.abstract(small)["params"]
    shapes.pop("layers_0")
    rng = np.random.default_rng(0)
    around = jax.tree.map(
        lambda s: SPREAD * rng.normal(size=s.shape) if s.ndim > 1 else np.ones(s.shape),
        shapes,
    )
    sequences, length = CHECKED
    length = min(length, int(config.context))
    tokens = rng.integers(0, WORDS, (sequences, length)).astype(np.int32)
    apply = quantized(family.module(small).apply)

    def logits(params: Any) -> jax.Array:
        (block,) = params["params"].values()
        dtype = jax.tree.leaves(block, is_leaf=is_qtensor)[0].dtype
        whole = jax.tree.map(lambda a: a.astype(dtype), around) | {"layers_0": block}
        plain = jax.tree.map(_float_activation, whole, is_leaf=is_qtensor)
        return apply({"params": plain}, jnp.asarray(tokens))

    return logits


def _float_activation(leaf: Any) -> Any:
    """Return a weight that leaves its input float, and is compiled for but once."""
    if not isinstance(leaf, QTensor):
        return leaf
    return dataclasses.replace(
        leaf,
        activation=None,
        activation_scale=None,
        activation_zero=None,
        name=None,
    )


def nested(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Return a tree of dicts, of leaves by path."""
    tree: dict[str, Any] = {}
    for (*branches, last), leaf in leaves.items():
        inner = tree
        for key in branches:
            inner = inner.setdefault(key, {})
        inner[last] = leaf
    return tree


def at(tree: Any, path: tuple[str, ...]) -> Any:
    """Return the leaf at a path."""
    for key in path:
        tree = tree[key]
    return tree


def _part(value: Any, place: int) -> Any:
    """Return one of several stacked weights."""
    if not isinstance(value, QTensor):
        return value[place]
    rank = value.ndim
    return jax.tree.map(lambda a: a[place] if a.ndim == rank else a, value)


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != "quantization_config"}
