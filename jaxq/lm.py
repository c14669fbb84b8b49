"""`LM`: a language model with its tokenizer, float or quantized, in one object."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.evaluate import (
    bits_per_weight,
    cut_windows,
    parameter_count,
    stored_bytes,
)
from jaxq.lift import quantized
from jaxq.pipeline import Progress, quantize_with_evidence
from jaxq.plan import Plan, plan
from jaxq.presets import as_recipe
from jaxq.qtensor import QTensor, is_qtensor
from jaxq.recipe import Recipe
from jaxq.relayout import relayout_params
from jaxq.spec import QuantSpec

if TYPE_CHECKING:  # flax and tokenizers take a second to import: only when needed
    from tokenizers import Tokenizer

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo_model"

CALIBRATION_TOKENS = 512
CALIBRATION_SEQUENCES = 128
# Tokens that run at once. On a CPU so few that the attention's scores stay in the cache:
# the demo model calibrates in a tenth less time than with 4096.
BATCH_TOKENS = {"cpu": 1024}
BATCH_TOKENS_ELSEWHERE = 4096

TIMINGS = "timings.json"

# Carried along when a model is saved, so that the copy is complete.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)

Calibration = str | Sequence[str] | np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True, repr=False)
class LM:
    """A causal language model: parameters, function, shape and tokenizer.

    Immutable: `quantize` returns another one. Made by `load_model`.

    Attributes:
        params: Flax variables ``{"params": {...}}``; leaves are arrays or `QTensor`s.
        apply: ``apply(params, token_ids[B, T]) -> float32[B, T, vocab]``, compiled once
            per shape and structure; takes quantized and float parameters.
        forward: the plain float function behind ``apply``.
        config: the model's shape, for example ``config.context``.
        tokenizer: a `tokenizers.Tokenizer`, or None where the folder had none.
        eos: the tokens that end a text.
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
    eos: tuple[int, ...] = ()
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

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text, ``int32[tokens]``, as the tokenizer has them.

        Raises:
            ValueError: when the model has no tokenizer.
        """
        tokenizer = self._need_tokenizer()
        return np.asarray(tokenizer.encode(text).ids, np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones left out.

        Raises:
            ValueError: when the model has no tokenizer.
        """
        return self._need_tokenizer().decode(list(map(int, tokens)))

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> str:
        """Return the text that the model continues ``prompt`` with.

        Args:
            prompt: any text; an empty one begins with the token that ends texts.
            max_new_tokens: at most so many tokens; fewer when the text ends.
            temperature: 0 takes the likeliest token every time; otherwise tokens are
                drawn, from logits divided by it.
            top_k: draw among the k likeliest tokens only.
            top_p: draw among the likeliest tokens that together reach this probability.
            seed: the same seed gives the same text.

        Raises:
            ValueError: when prompt and new tokens exceed the model's context, or a
                setting is out of its range.
        """
        pieces = self.stream(
            prompt,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        return "".join(pieces)

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Iterator[str]:
        """Yield the text of `generate` piece by piece, as it is made."""
        from jaxq.generation import Sampling, stream

        sampling = Sampling(temperature, top_k, top_p, seed)
        start = self._prompt_tokens(prompt)
        steps = stream(
            self.apply,
            self.params,
            self.config,
            [start],
            max_new_tokens,
            sampling,
            self.eos,
        )
        made: list[int] = []
        shown = ""
        for tokens in steps:
            made.append(int(tokens[0]))
            text = self.decode(made)
            # Bytes of an unfinished character decode to a replacement: wait for more.
            if not text.endswith("�"):
                yield text[len(shown) :]
                shown = text
        yield self.decode(made)[len(shown) :]

    def plan(
        self, cfg: str | Recipe | QuantSpec, group_size: int | None = None
    ) -> Plan:
        """Say what `quantize` would do to every parameter; reads no weights."""
        return plan(
            self.forward, self.params, cfg, _example_tokens(), group_size=group_size
        )

    def quantize(
        self,
        cfg: str | Recipe | QuantSpec,
        calibration: Calibration | None = None,
        group_size: int | None = None,
        *,
        progress: Progress | None = None,
    ) -> "LM":
        """Return this model with quantized weights.

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
        recipe = as_recipe(cfg, group_size)
        batches, about = self.calibration_batches(recipe, calibration)
        done = quantize_with_evidence(
            self.params, recipe, self.forward, batches, progress=progress
        )
        return dataclasses.replace(
            self,
            params=done.params,
            recipe=recipe,
            evidence={e.path: e.to_dict() for e in done.evidence},
            calibration=about,
        )

    def calibration_batches(
        self, recipe: Recipe, calibration: Calibration | None
    ) -> tuple[list[tuple[jax.Array]], dict[str, Any]]:
        """Return what a recipe is calibrated on, and a description of it.

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
            return [(_example_tokens(),)], {}
        tokens = self.calibration_tokens(calibration)
        about = {
            "sequences": len(tokens),
            "tokens": int(tokens.size),
            "sha256": hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).hexdigest(),
            "mode": "sequential",
        }
        return _batches(tokens), about

    def calibration_tokens(self, calibration: Calibration) -> np.ndarray:
        """Return ``int32[sequences, tokens]`` of a text, several, or tokens.

        Texts are joined into one stream and cut into at most 128 windows of at most 512
        tokens.

        Raises:
            ValueError: on an empty text, an array of another rank, or tokens that the
                model does not know.
        """
        if isinstance(calibration, str):
            calibration = [calibration]
        if isinstance(calibration, np.ndarray | jax.Array):
            return _checked_tokens(np.asarray(calibration), self.config.vocab_size)
        stream = [self.encode(text) for text in calibration]
        tokens = np.concatenate(stream) if stream else np.zeros(0, np.int32)
        length = min(CALIBRATION_TOKENS, int(self.config.context))
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
            f"LM({self.name}, {parameter_count(self.params):,} parameters, {how}, "
            f"{self.bits_per_weight:.3f} bits/weight, {self.nbytes:,} bytes)"
        )

    def _need_tokenizer(self) -> "Tokenizer":
        if self.tokenizer is None:
            raise ValueError(
                f"{self.name} has no tokenizer: put its tokenizer.json into the "
                f"model's folder"
            )
        return self.tokenizer

    def _prompt_tokens(self, prompt: str) -> list[int]:
        tokens = self.encode(prompt).tolist()
        return tokens or list(self.eos[:1])


def timings(evidence: Mapping[str, Any]) -> dict[str, str]:
    """Return the file that says how many seconds each weight took, if any did.

    It stands apart from the manifest, which is the same for every run.
    """
    seconds = {p: round(e["seconds"], 3) for p, e in evidence.items() if "seconds" in e}
    return {TIMINGS: json.dumps(seconds, indent=1) + "\n"} if seconds else {}


def load_model(
    path: str | Path, dtype: Any = None, *, weights: bool = True, lazy: bool = False
) -> LM:
    """Load a language model, float or quantized, from a folder.

    Args:
        path: a Hugging Face folder (``config.json``, safetensors, ``tokenizer.json``),
            float or quantized by another library (`jaxq.codecs.CODECS`); a GGUF file; a
            folder that `LM.save` wrote, or the word ``demo`` for the small model that
            comes with jaxq (write ``./demo`` for a folder of that name).
        dtype: of float parameters, and of what quantized ones stand for; None keeps the
            checkpoint's, in which the model then also computes.
        weights: False reads no weights: the parameters are `jax.ShapeDtypeStruct`s,
            enough for `LM.plan`. (Quantized models are always read.)
        lazy: True reads every tensor of a float model when it is needed, again and
            again: for `jaxq.quantize_to`, which never holds the whole model.

    Raises:
        FileNotFoundError: the folder or a part of it is missing.
        ValueError: a file is damaged, or the model is of a kind that is not known.

    Example:
        >>> import jaxq
        >>> lm = jaxq.load_model("demo")  # doctest: +SKIP
        >>> lm.quantize("w4a16").generate("import ")  # doctest: +SKIP
    """
    from jaxq.huggingface import read_tokenizer

    is_demo = str(path) == DEMO
    folder = DEMO_FOLDER if is_demo else Path(path)
    read = _read_abstract if not weights and _is_float(folder) else _read_model
    module, config, hf_config, about = read(folder, dtype, lazy)
    if weights and not lazy:
        about["params"] = relayout_params(about["params"])
    forward = module.apply
    name = DEMO if is_demo else folder.resolve().name
    folder = folder.parent if folder.is_file() else folder
    files = {
        name: (folder / name).read_text("utf-8")
        for name in SIDE_FILES
        if (folder / name).is_file()
    }
    if about.get("codec", "float") != "float":  # what is saved will be ours
        plain = {k: v for k, v in hf_config.items() if k != "quantization_config"}
        files["config.json"] = json.dumps(plain, indent=2) + "\n"
    return LM(
        apply=quantized(forward),
        forward=forward,
        config=config,
        tokenizer=read_tokenizer(folder),
        eos=_end_of_text(files, hf_config),
        files=files,
        name=name,
        folder=folder,
        **about,
    )


def generate(lm: LM, prompt: str, max_new_tokens: int = 64, **settings: Any) -> str:
    """Return the text that ``lm`` continues ``prompt`` with; see `LM.generate`.

    Args:
        lm: a model, such as `load_model` returns.
        prompt: any text.
        max_new_tokens: at most so many tokens.
        **settings: ``temperature``, ``top_k``, ``top_p`` and ``seed``.
    """
    return lm.generate(prompt, max_new_tokens, **settings)


_Read = tuple[Any, Any, Mapping[str, Any], dict[str, Any]]


def _is_float(folder: Path) -> bool:
    """Whether a folder's config says that its weights are floats."""
    from jaxq.checkpoints.huggingface import read_config
    from jaxq.checkpoints.manifest import is_jaxq_checkpoint
    from jaxq.codecs import find_config, find_gguf

    if is_jaxq_checkpoint(folder) or find_gguf(folder) is not None:
        return False
    return find_config(folder, read_config(folder)) is None


def _read_abstract(folder: Path, dtype: Any, lazy: bool) -> _Read:
    """Return module, config, config.json and the parameters by shape alone."""
    from jaxq.checkpoints.huggingface import read_config
    from jaxq.models import find_family

    del lazy
    hf_config = read_config(folder)
    family = find_family(hf_config)
    config = family.read_config(hf_config)
    params = family.abstract(config, dtype or _config_dtype(folder))
    return family.module(config), config, hf_config, {"params": params}


def _read_model(folder: Path, dtype: Any, lazy: bool) -> _Read:
    """Return module, config, config.json, and the parameters with what is known."""
    from jaxq.checkpoints import manifest
    from jaxq.checkpoints.huggingface import read_config
    from jaxq.checkpoints.loading import load
    from jaxq.huggingface import load_huggingface
    from jaxq.models import find_family

    if not manifest.is_jaxq_checkpoint(folder):
        model = load_huggingface(folder, dtype, lazy=lazy)
        about = {
            "params": model.params,
            "notes": model.notes,
            "codec": model.codec,
        }
        return model.module, model.config, model.hf_config, about
    found = manifest.read(folder)
    hf_config = read_config(folder)
    family = find_family(hf_config)
    config = family.read_config(hf_config)
    about = _history(folder, found.recipe, found.metadata)
    params = {"params": load(folder)}
    return family.module(config), config, hf_config, params | about


def _history(folder: Path, recipe: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return recipe and evidence of a quantized checkpoint."""
    file = folder / TIMINGS
    seconds = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    evidence = {
        path: row | ({"seconds": seconds[path]} if path in seconds else {})
        for path, row in metadata.get("evidence", {}).items()
    }
    return {
        "recipe": None if recipe is None else Recipe.from_dict(recipe),
        "evidence": evidence,
        "calibration": metadata.get("calibration", {}),
    }


def _config_dtype(folder: Path) -> Any:
    """Return the dtype that a Hugging Face config says the weights have."""
    hf_config = json.loads((folder / "config.json").read_text("utf-8"))
    return jnp.dtype(hf_config.get("dtype") or hf_config.get("torch_dtype", "float32"))


def _end_of_text(
    files: Mapping[str, str], hf_config: Mapping[str, Any]
) -> tuple[int, ...]:
    """Return the tokens that end a text; the generation config has the first word."""
    generation = json.loads(files.get("generation_config.json", "{}"))
    ids = generation.get("eos_token_id", hf_config.get("eos_token_id"))
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)


def _example_tokens() -> jax.Array:
    """Return tokens that show a language model's shapes, for tracing."""
    return jnp.zeros((1, 8), jnp.int32)


def _batches(tokens: np.ndarray) -> list[tuple[jax.Array]]:
    """Cut sequences into batches."""
    budget = BATCH_TOKENS.get(jax.default_backend(), BATCH_TOKENS_ELSEWHERE)
    rows = max(1, budget // tokens.shape[1])
    starts = range(0, len(tokens), rows)
    return [(jnp.asarray(tokens[i : i + rows]),) for i in starts]


def _checked_tokens(tokens: np.ndarray, vocab: int) -> np.ndarray:
    """Return tokens as ``int32[sequences, tokens]`` that the model knows."""
    if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"calibration is {tokens.dtype}{list(tokens.shape)}: give a text, texts, "
            f"or integers [sequences, tokens]"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab:
        raise ValueError(
            f"calibration holds the token {low if low < 0 else high}, but the model "
            f"knows 0 to {vocab - 1}: is the tokenizer another's?"
        )
    return tokens.astype(np.int32)
