"""`Model`: parameters, function, shape and tokenizer in one object, and quantizing it.

What all models have; `jaxq.lm.LM`, `jaxq.encoder.Encoder` and
`jaxq.encoder_decoder.EncoderDecoder` add what they are for.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.evaluate import (
    bits_per_weight,
    cut_windows,
    parameter_count,
    stored_bytes,
)
from jaxq.pipeline import Progress, quantize_with_evidence
from jaxq.plan import Plan, plan
from jaxq.presets import as_recipe
from jaxq.qtensor import QTensor, is_qtensor
from jaxq.recipe import Recipe
from jaxq.relayout import relayout_params
from jaxq.spec import QuantSpec
from jaxq.texts import checked_texts

if TYPE_CHECKING:  # tokenizers takes a second to import: only when needed
    from tokenizers import Tokenizer

CALIBRATION_TOKENS = 512
CALIBRATION_SEQUENCES = 128
# Tokens that run at once. On a CPU so few that the attention's scores stay in the
# cache: the demo model calibrates in a tenth less time than with 4096.
BATCH_TOKENS = {"cpu": 1024}
BATCH_TOKENS_ELSEWHERE = 4096

TIMINGS = "timings.json"

Calibration = str | Sequence[str] | np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True, repr=False)
class Model:
    """Parameters, function, shape and tokenizer.

    Immutable: `quantize` returns another one. Made by `load_model`.

    Attributes:
        params: Flax variables ``{"params": {...}}``; leaves are arrays or `QTensor`s.
        apply: ``apply(params, *inputs)``, compiled once per shape and structure; takes
            quantized and float parameters.
        forward: the plain float function behind ``apply``.
        config: the model's shape, for example ``config.context``.
        tokenizer: a `tokenizers.Tokenizer`, or None where the folder had none.
        files: the texts of the files that lie beside the weights, by name.
        name: for tables and messages.
        recipe: what it was quantized with, or None.
        evidence: of every quantized weight, by path, as plain data: what calibration
            saw and what rounding cost (see `jaxq.Evidence`).
        calibration: what it was calibrated on, as plain data; empty without data.
        folder: where its weights were read from, or None.
        notes: what was not taken as it is from a checkpoint that another library
            quantized, and why, by tensor.
        codec: the format its weights were read from, such as ``gptq``, or ``float``.
    """

    params: Any
    apply: Callable[..., Any]
    forward: Callable[..., Any]
    config: Any
    tokenizer: "Tokenizer | None"
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    name: str = "model"
    recipe: Recipe | None = None
    evidence: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    calibration: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path | None = None
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    codec: str = "float"

    @property
    def fallbacks(self) -> dict[str, str]:
        """The weights that are not what the recipe asked for, and why."""
        found = ((path, e.get("fallback")) for path, e in self.evidence.items())
        return {path: why for path, why in found if why}

    @property
    def nbytes(self) -> int:
        """Stored bytes of all parameters."""
        return stored_bytes(self.params)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over all parameters, float ones included."""
        return bits_per_weight(self.params)

    @property
    def is_quantized(self) -> bool:
        """Whether any parameter is a `QTensor`."""
        leaves = jax.tree.leaves(self.params, is_leaf=is_qtensor)
        return any(isinstance(leaf, QTensor) for leaf in leaves)

    def tokens_of(self, text: str) -> np.ndarray:
        """Return the tokens of a text, ``int32[tokens]``, as the tokenizer has them.

        Raises:
            ValueError: when the model has no tokenizer.
        """
        return np.asarray(self._need_tokenizer().encode(text).ids, np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones left out.

        Raises:
            ValueError: when the model has no tokenizer.
        """
        return self._need_tokenizer().decode(list(map(int, tokens)))

    def inputs(self, tokens: jax.Array) -> tuple[jax.Array, ...]:
        """Return what ``apply`` takes for texts, ``int32[sequences, tokens]``."""
        return (tokens,)

    def plan(
        self, cfg: str | Recipe | QuantSpec, group_size: int | None = None
    ) -> Plan:
        """Say what `quantize` would do to every parameter; reads no weights."""
        recipe = self.recipe_for(cfg, group_size)
        return plan(self.forward, self.params, recipe, *self._example())

    def recipe_for(
        self, cfg: str | Recipe | QuantSpec, group_size: int | None = None
    ) -> Recipe:
        """Return the recipe that ``cfg`` stands for with a model of this kind."""
        return as_recipe(cfg, group_size)

    def quantize(
        self,
        cfg: str | Recipe | QuantSpec,
        calibration: Calibration | None = None,
        group_size: int | None = None,
        *,
        progress: Progress | None = None,
    ) -> Self:
        """Return this model with quantized weights.

        They lie as this machine's kernels want them (`jaxq.relayout_params`); saved
        files do not depend on that.

        Args:
            cfg: a preset's name, a `Recipe`, or a `QuantSpec` for every product.
            calibration: for recipes that need data: a text, several texts, or
                ``int[sequences, tokens]``.
            group_size: replaces the recipe's group size.
            progress: called after every parameter, see `jaxq.quantize_params`.

        Raises:
            ValueError: when the model is quantized already, a weight is not finite, or
                a recipe needs data and there is none.
        """
        recipe = self.recipe_for(cfg, group_size)
        data = self.calibration_data(recipe, calibration)
        done = quantize_with_evidence(
            self.params,
            recipe,
            self.forward,
            data.batches,
            masks=data.masks,
            progress=progress,
        )
        return dataclasses.replace(
            self,
            params=relayout_params(done.params),
            recipe=recipe,
            evidence={e.path: e.to_dict() for e in done.evidence},
            calibration=data.about,
        )

    def calibration_data(
        self, recipe: Recipe, calibration: Calibration | None
    ) -> "CalibrationData":
        """Return what a recipe is calibrated on.

        Without data, for a recipe that needs none, one batch that shows the shapes.

        Raises:
            ValueError: when the recipe needs data and there is none.
        """
        needy = [rule for rule in recipe.rules if rule.weight and rule.needs_data]
        if calibration is None and needy:
            what = "its static activation scale" if needy[0].static else needy[0].method
            raise ValueError(
                f"rule {needy[0].match!r} of recipe {recipe.name!r} needs data for "
                f"{what}: give calibration= a text, or int[sequences, tokens]"
            )
        if calibration is None or not needy:
            return CalibrationData([self._example()])
        return self.batched(calibration)

    def batched(self, calibration: Calibration) -> "CalibrationData":
        """Return calibration data as batches; raises as `calibration_tokens` does."""
        tokens = self.calibration_tokens(calibration)
        batches = [self.inputs(batch) for batch in _batches(tokens)]
        return CalibrationData(batches, about=described(list(tokens)))

    def calibration_tokens(self, calibration: Calibration) -> np.ndarray:
        """Return ``int32[sequences, tokens]`` of a text, several, or tokens.

        Texts are joined into one stream and cut into at most 128 windows of at most 512
        tokens.

        Raises:
            ValueError: on an empty text, an array of another rank, sequences longer
                than the model's context, or tokens that the model does not know.
            TypeError: on anything else.
        """
        context = int(self.config.context)
        if isinstance(calibration, np.ndarray | jax.Array):
            return _checked_tokens(
                np.asarray(calibration), self.config.vocab_size, context
            )
        stream = [self.tokens_of(text) for text in checked_texts(calibration)]
        tokens = np.concatenate(stream) if stream else np.zeros(0, np.int32)
        length = min(CALIBRATION_TOKENS, context)
        return cut_windows(tokens, length, CALIBRATION_SEQUENCES)

    def save(
        self,
        path: str | Path,
        *,
        backend: str = "safetensors",
        overwrite: bool = False,
    ) -> Path:
        """Write a folder that `load_model` reads: weights, config and tokenizer.

        Written completely or not at all, see `jaxq.save`.

        Args:
            path: the folder; made, with its parents.
            backend: how the weights are stored, ``safetensors`` or ``orbax``.
            overwrite: whether a checkpoint that is there is replaced.

        Returns:
            The folder.

        Raises:
            FileExistsError: when the folder is there already.
            OSError: when the disk is full or not writable.
        """
        from jaxq.checkpoints.saving import save

        return save(
            path,
            self.params,
            recipe=self.recipe,
            metadata=self.metadata(),
            extra_files={**self.files, **timings(self.evidence)},
            backend=backend,
            overwrite=overwrite,
        )

    def metadata(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the evidence, the same for every run."""
        if not self.evidence:
            return {}
        rows = {
            path: {name: value for name, value in row.items() if name != "seconds"}
            for path, row in self.evidence.items()
        }
        return {"evidence": rows, "calibration": dict(self.calibration)}

    def __repr__(self) -> str:
        """Say name, size and recipe in one line."""
        how = self.codec if self.recipe is None else self.recipe.name
        return (
            f"{type(self).__name__}({self.name}, "
            f"{parameter_count(self.params):,} parameters, {how}, "
            f"{self.bits_per_weight:.3f} bits/weight, {self.nbytes:,} bytes)"
        )

    def _need_tokenizer(self) -> "Tokenizer":
        if self.tokenizer is None:
            raise ValueError(
                f"{self.name} has no tokenizer: put its tokenizer.json into the "
                f"model's folder"
            )
        return self.tokenizer

    def _example(self) -> tuple[jax.Array, ...]:
        """Return inputs that show the shapes, for tracing."""
        return self.inputs(jnp.zeros((1, 8), jnp.int32))


@dataclasses.dataclass(frozen=True)
class CalibrationData:
    """What a model is calibrated on.

    Attributes:
        batches: tuples of the function's arguments.
        masks: for every batch which tokens count, ``bool[sequences, tokens]``; None:
            all do.
        about: a description, as plain data.
    """

    batches: list[tuple[jax.Array, ...]]
    masks: list[jax.Array] | None = None
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def described(sequences: Sequence[Any]) -> dict[str, Any]:
    """Return how many sequences and tokens there are, and a hash of them."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(np.asarray(sequence, "<i4").tobytes())
    return {
        "sequences": len(sequences),
        "tokens": sum(map(len, sequences)),
        "sha256": digest.hexdigest(),
        "mode": "sequential",
    }


def timings(evidence: Mapping[str, Any]) -> dict[str, str]:
    """Return the file that says how many seconds each weight took, if any did.

    It stands apart from the manifest, which is the same for every run.
    """
    seconds = {p: round(e["seconds"], 3) for p, e in evidence.items() if "seconds" in e}
    return {TIMINGS: json.dumps(seconds, indent=1) + "\n"} if seconds else {}


def rows_at_once(length: int) -> int:
    """Return how many sequences of a length run at once."""
    budget = BATCH_TOKENS.get(jax.default_backend(), BATCH_TOKENS_ELSEWHERE)
    return max(1, budget // length)


def _batches(tokens: np.ndarray) -> list[jax.Array]:
    """Cut sequences into batches."""
    rows = rows_at_once(tokens.shape[1])
    starts = range(0, len(tokens), rows)
    return [jnp.asarray(tokens[i : i + rows]) for i in starts]


def _checked_tokens(tokens: np.ndarray, vocab: int, context: int) -> np.ndarray:
    """Return tokens as ``int32[sequences, tokens]`` that the model knows."""
    if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"calibration is {tokens.dtype}{list(tokens.shape)}: give a text, texts, "
            f"or integers [sequences, tokens]"
        )
    if tokens.shape[1] > context:
        raise ValueError(
            f"calibration has sequences of {tokens.shape[1]} tokens, and the model "
            f"reads at most {context} at once: cut them into shorter ones"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab:
        raise ValueError(
            f"calibration holds the token {low if low < 0 else high}, but the model "
            f"knows 0 to {vocab - 1}: is the tokenizer another's?"
        )
    return tokens.astype(np.int32)
