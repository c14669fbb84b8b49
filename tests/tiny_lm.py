"""A tiny Llama folder with a tokenizer, made in a moment, for tests of whole models."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

from jaxq.checkpoints.huggingface import write_folder
from jaxq.models import find_family

TEXT = "import os\nfor name in os.listdir('.'):\n    print(name)\n" * 12

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 256,
    "dtype": "float32",
}


def byte_tokenizer(begin: bool = False) -> Tokenizer:
    """A token per byte; with `begin`, token 257 goes before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<begin>"])
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<begin> $A", special_tokens=[("<begin>", 257)]
        )
    return tokenizer


def random_params(shapes: Any, seed: int = 0) -> Any:
    """Weights large enough that the model's predictions are not uniform."""
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    made = [jnp.asarray(0.2 * rng.normal(size=s.shape), s.dtype) for s in leaves]
    return jax.tree.unflatten(treedef, made)


def write_tiny(folder: Path, *, seed: int = 0, begin: bool = False, **changes: Any):
    """Write the model; `changes` replace keys of its config. Returns the folder."""
    hf_config = CONFIG | changes
    family = find_family(hf_config)
    config = family.read_config(hf_config)
    dtype = jnp.dtype(hf_config["dtype"])
    params = random_params(family.abstract(config, dtype), seed)
    extra = {"tokenizer.json": byte_tokenizer(begin).to_str()}
    write_folder(folder, hf_config, family.slots(config), params, extra=extra)
    return folder
