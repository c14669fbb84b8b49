"""A Hugging Face folder, float or quantized, as a Flax module and its parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
from tokenizers import Tokenizer

from jaxq.checkpoints.huggingface import (
    CheckpointError,
    lazy_tensors,
    read_json,
    read_tensors,
)
from jaxq.codecs import open_model, read_params
from jaxq.models.families import Family, find_family


@dataclass(frozen=True)
class HuggingFaceModel:
    """What a Hugging Face folder holds.

    Attributes:
        family: the architecture.
        config: its shape.
        module: the Flax module; `module.apply(params, tokens) -> logits`.
        params: its variables, `{"params": {...}}`.
        tokenizer: None where the folder has no `tokenizer.json`.
        hf_config: `config.json` as written.
        generation: `generation_config.json` as written; empty where there is none.
        codec: the format of its weights, such as `gptq`, or `float`.
        notes: what was not taken from the checkpoint as it is, and why, by tensor.
    """

    family: Family
    config: Any
    module: nn.Module
    params: dict[str, Any]
    tokenizer: Tokenizer | None
    hf_config: dict[str, Any]
    generation: dict[str, Any]
    codec: str = "float"
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def eos(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        ids = self.generation.get("eos_token_id", self.hf_config.get("eos_token_id"))
        if ids is None:
            return ()
        return tuple(ids) if isinstance(ids, list) else (ids,)


def load_huggingface(
    folder: str | Path, dtype: Any = None, *, lazy: bool = False
) -> HuggingFaceModel:
    """Load a model from a Hugging Face folder, tensor by tensor.

    Quantized weights stay as they are: they become `QTensor`s.

    Args:
        folder: holds `config.json` and safetensors, sharded or not; or a GGUF file.
        dtype: of the parameters; None keeps the checkpoint's. The model computes in the
            dtype of its parameters.
        lazy: whether the parameters of a float model are `LazyArray`s, read when asked.

    Raises:
        FileNotFoundError: the folder, its config or some of its weights are missing.
        ConfigError: the config asks for something that is not implemented.
        UnknownNameError: the architecture is not known.
        CheckpointError: a file is damaged or does not fit the config.
        UnsupportedError: the weights are in a format that is not known.
    """
    path = Path(folder)
    hf_config, checkpoint = open_model(path)
    path = path.parent if path.is_file() else path
    family = find_family(hf_config)
    config = family.read_config(hf_config)
    slots, unread = family.slots(config, checkpoint), family.unread(config)
    notes: dict[str, str] = {}
    if checkpoint.codec == "float":
        read = lazy_tensors if lazy else read_tensors
        params = read(path, slots, dtype, unread)
    else:
        params, notes = read_params(checkpoint, slots, dtype, unread)
    return HuggingFaceModel(
        family=family,
        config=config,
        module=family.module(config),
        params=params,
        tokenizer=read_tokenizer(path),
        hf_config=hf_config,
        generation=_read_generation(path),
        codec=checkpoint.codec,
        notes=notes,
    )


def read_tokenizer(folder: str | Path) -> Tokenizer | None:
    """Read `tokenizer.json`; None where there is none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return Tokenizer.from_buffer(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is no valid tokenizer: {error}") from error


def _read_generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}
