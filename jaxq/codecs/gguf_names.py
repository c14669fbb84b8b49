"""The names of tensors, between GGUF and Hugging Face; experts share one in GGUF."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from jaxq.checkpoints.errors import CheckpointError, UnsupportedError
from jaxq.codecs.gguf_architectures import ARCHITECTURES, NAMES, Architecture

LEAVES = ("weight", "bias")


class Part(NamedTuple):
    """Where a tensor of Hugging Face's lies.

    Attributes:
        tensor: its name in GGUF.
        place: which of the matrices stacked there it is; None: all of it.
    """

    tensor: str
    place: int | None = None

    @property
    def flat(self) -> bool:
        """Whether it is a matrix of one row, which lies there as a vector."""
        return self.tensor.endswith(".ffn_gate_inp_shexp.weight")

    @property
    def wide(self) -> bool:
        """Whether llama.cpp asks for float32, if it is float at all."""
        words = (".ffn_gate_inp", "position_embd", "token_types")
        return any(word in self.tensor for word in words)


def architecture_of(name: object, tensors: Iterable[str], where: str) -> Architecture:
    """Return the row of a file.

    Args:
        name: its ``general.architecture``.
        tensors: the names in it.
        where: the file, for messages.

    Raises:
        UnsupportedError: it is not known.
    """
    held = set(tensors)
    for row in ARCHITECTURES:
        if row.gguf == name and (row.sign is None or row.sign in held):
            return row
    raise UnsupportedError(
        f"{where}: general.architecture is {str(name)[:80]!a}; GGUF files are read "
        f"of {', '.join(NAMES)}"
    )


def hf_names(
    tensor: str, shape: tuple[int, ...], row: Architecture, experts: int
) -> dict[str, Part]:
    """Return Hugging Face's names of what a tensor of a file holds.

    Args:
        tensor: its name in the file.
        shape: of the tensor.
        row: whose file.
        experts: in a layer.

    Raises:
        CheckpointError: it stacks something else than the matrices of all experts.
        UnsupportedError: no such model has it.
    """
    stem, _, leaf = tensor.rpartition(".")
    if stem in row.top and leaf in LEAVES:
        return {f"{row.top[stem]}.{leaf}": Part(tensor)}
    layer = re.fullmatch(r"(\w+|\w+\.\w+)\.(\d{1,4})\.(\w+)(?:\.(\d{1,5}))?", stem)
    if layer and leaf in LEAVES and layer[1] in row.stacks:
        blocks, inside = row.stacks[layer[1]]
        before, name, place = f"{blocks}.{int(layer[2])}", layer[3], layer[4]
        if name in inside and place is None:
            return {f"{before}.{inside[name]}.{leaf}": Part(tensor)}
        if name in row.experts and place is None and leaf == "weight":
            if len(shape) != 3 or shape[0] != experts or 0 in shape:
                raise CheckpointError(
                    f"{tensor!r} has the shape {shape}, which are no {experts} matrices"
                )
            inner = [row.experts[name].format(i) for i in range(experts)]
            return {
                f"{before}.{n}.{leaf}": Part(tensor, i) for i, n in enumerate(inner)
            }
        # before April 2024 every expert had tensors of its own
        alone = row.experts.get(f"{name}_exps")
        if alone is not None and place is not None and leaf == "weight":
            return {f"{before}.{alone.format(int(place))}.{leaf}": Part(tensor)}
    raise UnsupportedError(
        f"{tensor[:80]!a} is a tensor that no {row.name} has in GGUF"
    )


def gguf_name(name: str, row: Architecture) -> Part:
    """Return where a tensor of Hugging Face's is written.

    Raises:
        UnsupportedError: GGUF has no place for it.
    """
    stem, _, leaf = name.rpartition(".")
    for ours, theirs in row.top.items():
        if stem == theirs:
            return Part(f"{ours}.{leaf}")
    for before, (blocks, inside) in row.stacks.items():
        layer = re.fullmatch(rf"{re.escape(blocks)}\.(\d+)\.(.+)", stem)
        if layer is None:
            continue
        for ours, theirs in inside.items():
            if layer[2] == theirs:
                return Part(f"{before}.{layer[1]}.{ours}.{leaf}")
        for ours, theirs in row.experts.items():
            pattern = re.escape(theirs).replace(r"\{\}", r"(\d+)")
            if found := re.fullmatch(pattern, layer[2]):
                return Part(f"{before}.{layer[1]}.{ours}.{leaf}", int(found[1]))
    raise UnsupportedError(f"GGUF has no name for {name!r} of a {row.name}")
