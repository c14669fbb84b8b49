"""Read a Hugging Face `config.json` strictly: a key that is not understood is refused.

A key nobody reads may still change the computation, and a model that computes something
else is worse than one that does not load. So every key is read, or listed as harmless,
or listed with the only values implemented; everything else stops with its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxq.models.activations import ACTIVATIONS

MOST_PARTS = 10_000

# Keys that say how to train, store, serve or name a model, not what it computes.
HARMLESS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "activation_dropout",
        "architectures",
        "attention_dropout",
        "attention_probs_dropout_prob",
        "attn_implementation",
        "attn_pdrop",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "classifier_dropout_prob",
        "decoder_start_token_id",
        "do_sample",
        "dropout",
        "dropout_rate",
        "dtype",
        "embd_pdrop",
        "embedding_dropout",
        "eos_token_id",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "hidden_dropout",
        "hidden_dropout_prob",
        "id2label",
        "init_std",
        "initializer_factor",
        "initializer_range",
        "is_llama_config",
        "label2id",
        "layerdrop",
        "masked_softmax_fusion",
        "max_length",
        "max_new_tokens",
        "model_type",
        "n_ctx",
        "name_or_path",
        "num_beams",
        "offset_alibi",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "output_router_logits",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "quantization_config",
        "resid_pdrop",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "sep_token_id",
        "seq_length",
        "skip_bias_add",
        "slow_but_exact",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "temperature",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    }
)


class ConfigError(ValueError):
    """A `config.json` that is incomplete or asks for what is not implemented."""


@dataclass
class Keys:
    """A config of which every key must be asked for.

    Attributes:
        config: the parsed `config.json`.
        family: whose config it is; for messages.
        defaults: what Hugging Face takes where a key is missing.
    """

    config: Mapping[str, Any]
    family: str
    defaults: Mapping[str, Any]
    seen: set[str] = field(default_factory=set)

    def get(self, key: str, otherwise: Any = None) -> Any:
        """Return the value of `key`, or its default where it is missing or null."""
        self.seen.add(key)
        value = self.config.get(key)
        return self.defaults.get(key, otherwise) if value is None else value

    def given(self, key: str) -> Any:
        """Return the value of `key` as written: null stays None; else the default."""
        self.seen.add(key)
        return self.config.get(key, self.defaults.get(key))

    def size(self, key: str, otherwise: int | None = None) -> int:
        """Return a positive integer.

        Raises:
            ConfigError: it is missing, or no positive integer.
        """
        value = self.get(key, otherwise)
        if value is None:
            raise ConfigError(
                f"config.json has no {key!r}, which every {self.family} model needs; "
                "add it, or fetch the file again"
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"config.json: {key!r} is {value!r}; it must be a positive integer"
            )
        return value

    def count(self, key: str, otherwise: int | None = None) -> int:
        """Return a number of layers or experts, each of which is gone through.

        Raises:
            ConfigError: as of `size`, and when there are more than `MOST_PARTS`.
        """
        value = self.size(key, otherwise)
        if value > MOST_PARTS:
            raise ConfigError(
                f"config.json: {key!r} is {value}; no model has more than {MOST_PARTS}"
            )
        return value

    def require(self, key: str, *allowed: Any) -> None:
        """Refuse values of `key` other than those implemented; missing is fine.

        Raises:
            ConfigError: the value is another.
        """
        value = self.given(key)
        if value is not None and value not in allowed:
            raise ConfigError(
                f"config.json: {key!r} is {value!r}, which changes the computation; "
                f"{self.family} is implemented with "
                f"{' or '.join(map(repr, allowed))} only"
            )

    def number(self, key: str, otherwise: float | None = None) -> float | None:
        """Return a number, or None where there is none.

        Raises:
            ConfigError: it is something else.
        """
        value = self.get(key, otherwise)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"config.json: {key!r} is {value!r}; it must be a number")
        return float(value)

    def flag(self, key: str, otherwise: bool = False) -> bool:
        """Return whether a switch is on.

        Raises:
            ConfigError: it is neither on nor off.
        """
        value = self.get(key, otherwise)
        if not isinstance(value, bool):
            raise ConfigError(
                f"config.json: {key!r} is {value!r}; it must be true or false"
            )
        return value

    def activation(self, key: str, otherwise: str) -> str:
        """Return the name of an activation function.

        Raises:
            ConfigError: it is not implemented.
        """
        name = self.get(key, otherwise)
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise ConfigError(
                f"config.json: {key!r} is {name!r}, which changes the computation; "
                f"implemented are {', '.join(ACTIVATIONS)}"
            )
        return name

    def refuse_unread(self) -> None:
        """Refuse keys that nobody read.

        Raises:
            ConfigError: there are some whose value is not null.
        """
        unread = sorted(
            key
            for key, value in self.config.items()
            if value is not None and key not in self.seen and key not in HARMLESS
        )
        if unread:
            listed = ", ".join(f"{key} = {self.config[key]!r}" for key in unread)
            raise ConfigError(
                f"config.json has keys that {self.family} does not know and that may "
                f"change the computation: {listed}. If they do not, remove them (or "
                "set them to null); if they do, this model needs a family of its own"
            )
