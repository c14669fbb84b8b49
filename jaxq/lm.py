"""`LM`: a language model with its tokenizer, float or quantized; `load_model`."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.encoder import Encoder, read_pooling, write_pooling
from jaxq.encoder_decoder import EncoderDecoder
from jaxq.kvcache import FLOAT, Cache, CacheExplanation, empty_cache, explain_cache
from jaxq.lift import quantized
from jaxq.model import TIMINGS, Model
from jaxq.recipe import Recipe
from jaxq.relayout import relayout_params
from pallas_kernels.target import Target

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo_model"

# Carried along when a model is saved, so that the copy is complete.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclasses.dataclass(frozen=True, repr=False)
class LM(Model):
    """A causal language model.

    Immutable: `quantize` returns another one. Made by `load_model`.
    ``apply(params, token_ids[B, T])`` returns ``float32[B, T, vocab]``; for the other
    attributes see `Model`.

    Attributes:
        eos: the tokens that end a text.
        cache: what keys and values are kept as, a key of `jaxq.kvcache.CACHES`; see
            `with_cache`.
    """

    eos: tuple[int, ...] = ()
    cache: str = FLOAT

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text, ``int32[tokens]``, as the tokenizer has them.

        Raises:
            ValueError: when the model has no tokenizer.
        """
        return self.tokens_of(text)

    def with_cache(self, cache: str) -> Self:
        """Return this model with its keys and values kept as something else.

        Its ``apply`` then reads a text through such a cache, too, so that
        `jaxq.perplexity` and `jaxq.evaluate.evaluate_text` measure what that costs. The
        kernels of TPUs and GPUs attend in bfloat16, those of float32 models, too.

        Args:
            cache: ``"float"``, or ``"int8"`` or ``"int4"``: a scale per token and head.

        Raises:
            ValueError: there is no such cache, or the model's heads cannot be packed
                so.

        Example:
            >>> lm = jaxq.load_model("demo").with_cache("int8")  # doctest: +SKIP
            >>> lm.generate("import ")  # doctest: +SKIP
        """
        from jaxq.generation import ThroughCache

        plain = self._plain_apply()
        apply = plain if cache == FLOAT else ThroughCache(plain, self.config, cache)
        return dataclasses.replace(self, apply=apply, cache=cache)

    def empty_cache(
        self, tokens: int, batch: int = 1, *, target: Target | None = None
    ) -> Cache:
        """Return a cache for texts of so many tokens, to give to ``apply``.

        ``apply(params, tokens, positions, cache)`` returns logits and the longer cache.

        Args:
            tokens: per text.
            batch: texts.
            target: the chip that attention to a quantized cache runs on; by default
                this one.
        """
        from jaxq.generation import float_dtype

        dtype = float_dtype(self.params)
        return empty_cache(self.config, batch, tokens, dtype, self.cache, target)

    def explain_cache(
        self,
        slots: int | None = None,
        batch: int = 1,
        *,
        tokens: int = 1,
        target: Target | None = None,
    ) -> CacheExplanation:
        """Say which kernel attends to the cache in each layer, and its bytes.

        Nothing is computed.

        Args:
            slots: tokens the cache has room for; the model's context by default.
            batch: texts.
            tokens: how many are read at once: 1 is a step of writing.
            target: the chip to say it for; by default this one.
        """
        room = int(self.config.context) if slots is None else slots
        held = jax.eval_shape(lambda: self.empty_cache(room, batch, target=target))
        return explain_cache(self.apply, self.params, held, tokens)

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        cache: str | None = None,
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
            cache: what keys and values are kept as, ``"float"``, ``"int8"`` or
                ``"int4"``; the model's own (see `with_cache`) by default.

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
            cache=cache,
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
        cache: str | None = None,
    ) -> Iterator[str]:
        """Yield the text of `generate` piece by piece, as it is made."""
        from jaxq.generation import Sampling, stream

        sampling = Sampling(temperature, top_k, top_p, seed)
        start = self._prompt_tokens(prompt)
        steps = stream(
            self._plain_apply(),
            self.params,
            self.config,
            [start],
            max_new_tokens,
            sampling,
            self.eos,
            self.cache if cache is None else cache,
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

    def _plain_apply(self) -> Callable[..., Any]:
        """Return what reads a text through no cache if none is given.

        All models that `with_cache` made of one share it, and so what it compiled.
        """
        from jaxq.generation import ThroughCache

        apply = self.apply
        return apply.apply if isinstance(apply, ThroughCache) else apply

    def _prompt_tokens(self, prompt: str) -> list[int]:
        tokens = self.encode(prompt).tolist()
        return tokens or list(self.eos[:1])


def load_model(
    path: str | Path, dtype: Any = None, *, weights: bool = True, lazy: bool = False
) -> Any:
    """Load a model, float or quantized, from a folder.

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

    Returns:
        An `LM` for causal language models, an `Encoder` for BERT and its like, an
        `EncoderDecoder` for T5.

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
    family, config, hf_config, about = read(folder, dtype, lazy)
    if weights and not lazy:
        about["params"] = relayout_params(about["params"])
    forward = family.module(config).apply
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
    whole: dict[str, Any] = {"apply": quantized(forward), "forward": forward, **about}
    whole |= {"tokenizer": read_tokenizer(folder), "folder": folder, "name": name}
    whole |= {"config": config, "files": files}
    if family.kind == "encoder":
        pooling = read_pooling(folder)
        whole["files"] = files | write_pooling(pooling)
        return Encoder(**whole, pooling=pooling)
    kind = EncoderDecoder if family.kind == "encoder-decoder" else LM
    return kind(**whole, eos=_end_of_text(files, hf_config))


def load_lm(path: str | Path, dtype: Any = None, **options: bool) -> LM:
    """Load a causal language model; see `load_model`.

    Raises:
        ValueError: the model is of another kind; also as there.
    """
    model = load_model(path, dtype, **options)
    if not isinstance(model, LM):
        raise ValueError(
            f"{model.name} is a model of the kind {type(model).__name__}, which has no "
            "next token to predict; give a causal language model"
        )
    return model


def generate(lm: LM, prompt: str, max_new_tokens: int = 64, **settings: Any) -> str:
    """Return the text that ``lm`` continues ``prompt`` with; see `LM.generate`.

    Args:
        lm: a model, such as `load_model` returns.
        prompt: any text.
        max_new_tokens: at most so many tokens.
        **settings: ``temperature``, ``top_k``, ``top_p``, ``seed`` and ``cache``.
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
    """Return family, config, config.json and the parameters by shape alone."""
    from jaxq.checkpoints.huggingface import read_config
    from jaxq.models import find_family

    del lazy
    hf_config = read_config(folder)
    family = find_family(hf_config)
    config = family.read_config(hf_config)
    params = family.abstract(config, dtype or _config_dtype(folder))
    return family, config, hf_config, {"params": params}


def _read_model(folder: Path, dtype: Any, lazy: bool) -> _Read:
    """Return family, config, config.json, and the parameters with what is known."""
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
        return model.family, model.config, model.hf_config, about
    found = manifest.read(folder)
    hf_config = read_config(folder)
    family = find_family(hf_config)
    config = family.read_config(hf_config)
    about = _history(folder, found.recipe, found.metadata)
    params = {"params": load(folder)}
    return family, config, hf_config, params | about


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
