"""`Encoder`: texts in, one vector per text out, from a float or quantized model."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.checkpoints.errors import CheckpointError
from jaxq.checkpoints.huggingface import read_json
from jaxq.encoder_presets import as_encoder_recipe
from jaxq.model import (
    CALIBRATION_SEQUENCES,
    CALIBRATION_TOKENS,
    Calibration,
    CalibrationData,
    Model,
    described,
    rows_at_once,
)
from jaxq.recipe import Recipe
from jaxq.spec import QuantSpec
from jaxq.texts import attended, checked_texts, cut_texts, next_power, padded, within

SENTENCES = "sentences.json"  # what is kept of sentence-transformers' files
TEXTS_AT_ONCE = 32
SHORTEST = 16

_MODULE = "sentence_transformers.models."
_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How the vectors of tokens become the vector of a text.

    Attributes:
        mode: a key of `POOLS`.
        normalize: whether vectors are scaled to length 1.
        max_tokens: longer texts are cut to this; None is the model's context.
        cased: whether texts are taken as they are, and not in small letters.
    """

    mode: str = "mean"
    normalize: bool = False
    max_tokens: int | None = None
    cased: bool = True


@dataclasses.dataclass(frozen=True, repr=False)
class Encoder(Model):
    """An encoder, such as BERT.

    Immutable: `quantize` returns another one. Made by `load_model`.
    ``apply(params, tokens[B, T], mask[B, T] = None, segments[B, T] = None)`` returns
    ``float32[B, T, hidden]``, the last hidden states, or ``float32[B, T, vocab]`` where
    the architecture has a head for masked tokens. Other attributes: see `Model`.

    Attributes:
        pooling: how vectors of tokens become those of texts.
    """

    pooling: Pooling = Pooling()

    def encode(self, texts: str | Sequence[str]) -> np.ndarray:
        """Return the vectors of texts, as sentence-transformers has them.

        Args:
            texts: one, or several.

        Returns:
            ``float32[hidden]`` for one text, ``float32[texts, hidden]`` for several.

        Raises:
            ValueError: when the model has no tokenizer, or computes logits.

        Example:
            >>> import jaxq
            >>> model = jaxq.load_model("all-MiniLM-L6-v2")  # doctest: +SKIP
            >>> small = model.quantize("w8a8")  # doctest: +SKIP
            >>> a, b = small.encode(["cat", "kitten"])  # doctest: +SKIP
            >>> float(a @ b)  # doctest: +SKIP
            0.79
        """
        if isinstance(texts, str):
            return self.encode([texts])[0]
        ids = [self._cut(text) for text in texts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        rows: dict[int, np.ndarray] = {}
        for start in range(0, len(order), TEXTS_AT_ONCE):
            some = order[start : start + TEXTS_AT_ONCE]
            rows |= zip(some, self._vectors([ids[i] for i in some]), strict=True)
        vectors = [rows[i] for i in range(len(ids))]
        return np.stack(vectors) if vectors else np.zeros((0, 0), np.float32)

    def inputs(self, tokens: jax.Array) -> tuple[jax.Array, ...]:
        """Return what ``apply`` takes for texts without padding."""
        return (tokens, jnp.ones(tokens.shape, bool))

    def recipe_for(
        self, cfg: str | Recipe | QuantSpec, group_size: int | None = None
    ) -> Recipe:
        """Return the recipe that ``cfg`` stands for: see `jaxq.encoder_presets`."""
        return as_encoder_recipe(cfg, group_size)

    def batched(self, calibration: Calibration) -> CalibrationData:
        """Return calibration texts as `encode` reads them, padding masked.

        Every text is a sequence of its own, with the tokens that the tokenizer puts
        around it, cut where it is too long; no more texts are taken than have 65,536
        tokens together. One string is cut into texts at its empty lines, or at the ends
        of lines where it has none. Arrays are taken as they are, all tokens counting.

        Batches of the most frequent length come first: what looks at a few batches
        alone looks at those.

        Raises:
            ValueError: when there is no text, or no tokenizer; on an array of another
                rank, or tokens that the model does not know.
            TypeError: on anything else.
        """
        if isinstance(calibration, np.ndarray | jax.Array):
            return super().batched(calibration)
        texts = checked_texts(calibration)
        if isinstance(calibration, str):
            texts = cut_texts(calibration)
        ids = within(map(self._cut, texts), CALIBRATION_SEQUENCES * CALIBRATION_TOKENS)
        if not ids:
            raise ValueError("calibration= holds no text: give some dozens of them")
        by_width: dict[int, list[list[int]]] = {}
        for one in ids:
            by_width.setdefault(self._width(len(one)), []).append(one)
        batches, masks = [], []
        for width in sorted(by_width, key=lambda w: -w * len(by_width[w])):
            some = by_width[width]
            rows = min(rows_at_once(width), next_power(len(some)))
            for start in range(0, len(some), rows):
                part = some[start : start + rows]
                tokens, mask = padded(part, rows, width)
                batches.append((jnp.asarray(tokens), jnp.asarray(attended(mask))))
                masks.append(jnp.asarray(mask))
        return CalibrationData(batches, masks, described(ids))

    def _cut(self, text: str) -> list[int]:
        """Return the tokens of a text, the last ones left out where it is too long."""
        context = int(self.config.context)
        longest = min(self.pooling.max_tokens or context, context)
        tokenizer = self._need_tokenizer()
        tokenizer.no_padding()
        tokenizer.enable_truncation(longest)
        return tokenizer.encode(text if self.pooling.cased else text.lower()).ids

    def _width(self, length: int) -> int:
        """Return to how many tokens a text of this length is padded."""
        width = max(SHORTEST, next_power(length))
        return min(width, max(int(self.config.context), 1))

    def _vectors(self, ids: list[list[int]]) -> np.ndarray:
        """Return the vectors of a batch, padded to one of a few shapes."""
        width = self._width(max(map(len, ids)))
        tokens, mask = padded(ids, next_power(len(ids)), width)
        seen = jnp.asarray(attended(mask))
        states = self.apply(self.params, jnp.asarray(tokens), seen)
        if states.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"{self.name} computes logits, not vectors: name the architecture "
                f"without a head in its config.json, such as 'BertModel'"
            )
        some = slice(0, len(ids))
        pooled = POOLS[self.pooling.mode](np.asarray(states)[some], mask[some])
        if self.pooling.normalize:
            length = np.linalg.norm(pooled, axis=-1, keepdims=True)
            pooled = pooled / np.maximum(length, 1e-12)
        return pooled.astype(np.float32)


def _mean(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    weights = mask[..., None].astype(np.float32)
    return (states * weights).sum(1) / np.maximum(weights.sum(1), 1e-9)


def _first(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    del mask
    return states[:, 0]


def _largest(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask[..., None], states, -np.inf).max(1)


POOLS: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "mean": _mean,
    "cls": _first,
    "max": _largest,
}


def read_pooling(folder: Path) -> Pooling:
    """Read how a folder's model pools: from sentence-transformers' files, or ours.

    Without any, vectors are the mean of the tokens', not normalized.

    Raises:
        CheckpointError: a file is damaged, or asks for what is not implemented.
    """
    if (folder / SENTENCES).is_file():
        return Pooling(**read_json(folder / SENTENCES))
    if not (folder / "modules.json").is_file():
        return Pooling()
    modules = _read_modules(folder / "modules.json")
    found: dict[str, Any] = {"normalize": False}
    for module in modules:
        kind = str(module.get("type", "")).removeprefix(_MODULE)
        if kind == "Pooling":
            path = folder / str(module.get("path")) / "config.json"
            found["mode"] = _read_mode(path)
        elif kind == "Normalize":
            found["normalize"] = True
        elif kind != "Transformer":
            raise CheckpointError(
                f"{folder / 'modules.json'} has a module {module.get('type')!r}; "
                "implemented are Transformer, Pooling and Normalize"
            )
    settings = folder / "sentence_bert_config.json"
    written = read_json(settings) if settings.is_file() else {}
    return Pooling(
        **found,
        max_tokens=written.get("max_seq_length"),
        cased=not written.get("do_lower_case", False),
    )


def write_pooling(pooling: Pooling) -> dict[str, str]:
    """Return the file that `read_pooling` reads, by name."""
    text = json.dumps(dataclasses.asdict(pooling), indent=2) + "\n"
    return {SENTENCES: text}


def _read_modules(path: Path) -> list[dict[str, Any]]:
    try:
        modules = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise CheckpointError(f"{path} holds no list of modules")
    return modules


def _read_mode(path: Path) -> str:
    written = read_json(path)
    flags = [k for k, on in written.items() if k.startswith("pooling_mode_") and on]
    mode = written.get("pooling_mode")  # newer versions name it
    named = [mode] if isinstance(mode, str) else [_MODES.get(flag) for flag in flags]
    if len(named) != 1 or named[0] not in POOLS:
        raise CheckpointError(
            f"{path} pools by {mode or flags}; implemented is one of {', '.join(POOLS)}"
        )
    return str(named[0])
