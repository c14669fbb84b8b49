"""`Family`: one architecture: its config, its names in checkpoints and its module.

The variables of a module are named as its checkpoints name their tensors, so the map
between the two is a rule, the same in both directions:
`params/layers_3/mlp/up_proj/kernel` is `model.layers.3.mlp.up_proj.weight`.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxq.models.hf_config import Keys

# Modules of which there are several are `layers_3` here and `layers.3` there.
_NUMBERED = re.compile(r"(layers|layer|h|block)_(\d+)")
STACK = "experts"  # the module whose variables are stacked over the experts
# BERT's norms were written with TensorFlow's names, and some checkpoints still are.
_OLD_NORMS = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

CAUSAL, ENCODER, ENCODER_DECODER = "causal", "encoder", "encoder-decoder"


class Slot(NamedTuple):
    """Where a checkpoint's tensor goes.

    Attributes:
        path: in the variables, `("params", "layers_0", "mlp", "up_proj", "kernel")`.
        shape: in the checkpoint, where a matmul's weight is `[out, in]`.
        transposed: the variable is the tensor transposed.
        place: the tensor's place in a variable that stacks several (experts), or None.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool
    place: int | None = None


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: of the row in `FAMILIES`.
        architecture: Hugging Face's class, as `architectures` lists it.
        module: the Flax module class, called as `module(config, dtype)`.
        read: reads the config of the module; says by `Keys` what it does not know.
        defaults: what Hugging Face takes where a key of the config is missing.
        model_type: Hugging Face's `model_type`; None where it is the name.
        prefix: goes before the names of all variables but those `outside`.
        outside: modules whose names have no prefix.
        kind: what it computes, `CAUSAL`, `ENCODER` or `ENCODER_DECODER`.
        in_out: the checkpoint's matmul weights are `[in, out]`, like the variables, but
            for those `outside`.
        unused: endings of the names of tensors that may be there and are not read.
    """

    name: str
    architecture: str
    module: Callable[..., nn.Module]
    read: Callable[[Keys], Any]
    defaults: Mapping[str, Any]
    model_type: str | None = None
    prefix: str = "model."
    outside: frozenset[str] = frozenset({"lm_head"})
    kind: str = CAUSAL
    in_out: bool = False
    unused: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def read_config(self, config: Mapping[str, Any]) -> Any:
        """Translate a parsed `config.json` into the config of the module.

        Raises:
            ConfigError: a size is missing or senseless, or a key asks for what
                is not implemented or not known.
        """
        keys = Keys(config, self.name, self.defaults)
        keys.require("is_encoder_decoder", self.kind == ENCODER_DECODER)
        read = self.read(keys)
        keys.refuse_unread()
        return read

    def example(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Return what the module takes, by shape alone."""
        tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        return (tokens, tokens) if self.kind == ENCODER_DECODER else (tokens,)

    def abstract(self, config: Any, dtype: Any = jnp.float32) -> Any:
        """Return the variables as `ShapeDtypeStruct`s, without making any."""
        module = self.module(config)
        key = jax.eval_shape(lambda: jax.random.key(0))
        variables = jax.eval_shape(module.init, key, *self.example())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), variables)

    def slots(
        self, config: Any, held: Collection[str] | None = None
    ) -> dict[str, Slot]:
        """Return the checkpoint's tensors by name, and where each one goes.

        Args:
            config: of the module.
            held: the names that a checkpoint has; where it leaves the prefix out, or
                writes the names as they were once, so do the slots. None is for writing
                one: the names of today.
        """
        leaves, _ = jax.tree_util.tree_flatten_with_path(self.abstract(config))
        slots: dict[str, Slot] = {}
        for keys, leaf in leaves:
            path = tuple(key.key for key in keys)
            for name, slot in self._slots_of(path, leaf.shape):
                slots[self._as_held(name, held or ())] = slot
        return slots

    def unread(self, config: Any) -> tuple[str, ...]:
        """Return endings of names that a checkpoint may hold and that are not read."""
        heads = tuple(f"{head}.weight" for head in sorted(self.outside))
        return self.unused + (heads if config.tied else ())

    def _slots_of(
        self, path: tuple[str, ...], shape: tuple[int, ...]
    ) -> Iterator[tuple[str, Slot]]:
        """Yield the tensors that a variable is made of."""
        if path[-2] == STACK:
            for place in range(shape[0]):
                whole = (*path[:-1], str(place), path[-1], "kernel")
                yield self._name(whole), Slot(path, shape[:0:-1], True, place)
            return
        in_out = self.in_out and path[1] not in self.outside  # GPT-2's head is Linear
        transposed = path[-1] == "kernel" and not in_out
        yield (
            self._name(path),
            Slot(path, shape[::-1] if transposed else shape, transposed),
        )

    def _name(self, path: tuple[str, ...]) -> str:
        outside = path[1] in self.outside
        return checkpoint_name(path, "" if outside else self.prefix)

    def _as_held(self, name: str, held: Collection[str]) -> str:
        """Return the spelling of a name that a checkpoint has, or the name."""
        bare, half = name.removeprefix(self.prefix), name.removeprefix("model.")
        for spelling in (name, bare, half, _old(name), _old(bare)):
            if spelling in held:
                return spelling
        return name


def checkpoint_name(path: tuple[str, ...], prefix: str | None = None) -> str:
    """Return what Hugging Face calls the variable at `path`.

    Args:
        path: of the variable, from the root.
        prefix: goes before; None is that of Llama and its relatives.

    >>> checkpoint_name(("params", "layers_3", "self_attn", "q_proj", "kernel"))
    'model.layers.3.self_attn.q_proj.weight'
    """
    _, *modules, leaf = path
    stem = ".".join(_NUMBERED.sub(r"\1.\2", module) for module in modules)
    if prefix is None:
        prefix = "" if modules[0] == "lm_head" else "model."
    return f"{prefix}{stem}.{'bias' if leaf == 'bias' else 'weight'}"


def _old(name: str) -> str:
    for new, old in _OLD_NORMS.items():
        if name.endswith(new):
            return name.removesuffix(new) + old
    return name
