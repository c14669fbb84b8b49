"""A float Hugging Face folder as a Flax module and its parameters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
from tokenizers import Tokenizer

from jaxq.checkpoints.huggingface import (
    CheckpointError,
    lazy_tensors,
    read_config,
    read_json,
    read_tensors,
)
from jaxq.models.families import Family, find_family
from jaxq.models.llama import LlamaConfig


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
    """

    family: Family
    config: LlamaConfig
    module: nn.Module
    params: dict[str, Any]
    tokenizer: Tokenizer | None
    hf_config: dict[str, Any]
    generation: dict[str, Any]

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
    """Load a float model from a Hugging Face folder, tensor by tensor.

    Args:
        folder: holds `config.json` and safetensors, sharded or not.
        dtype: of the parameters; None keeps the checkpoint's. The model computes in the
            dtype of its parameters.
        lazy: whether parameters are `LazyArray`s, read when asked.

    Raises:
        FileNotFoundError: the folder, its config or some of its weights are missing.
        ConfigError: the config asks for something that is not implemented.
        UnknownNameError: the architecture is not known.
        CheckpointError: a file is damaged or does not fit the config, or the model is
            quantized already.
    """
    hf_config = read_config(folder)
    if hf_config.get("quantization_config"):
        method = hf_config["quantization_config"].get("quant_method", "an unnamed way")
        raise CheckpointError(
            f"{folder} is already quantized ({method}), and reading that is not "
            "implemented; load the float model it was made from"
        )
    family = find_family(hf_config)
    config = family.read_config(hf_config)
    ignore = ("rotary_emb.inv_freq",) + (("lm_head.weight",) if config.tied else ())
    read = lazy_tensors if lazy else read_tensors
    params = read(folder, family.slots(config), dtype, ignore)
    return HuggingFaceModel(
        family=family,
        config=config,
        module=family.module(config),
        params=params,
        tokenizer=read_tokenizer(folder),
        hf_config=hf_config,
        generation=_read_generation(Path(folder)),
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
