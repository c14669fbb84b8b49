"""Trains the demo model that jaxq ships: a small Llama on the Python documentation.

    python examples/train_demo_model.py DOCS --work WORK --out jaxq/demo_model

DOCS is the folder of reStructuredText sources that Debian's `python3.11-doc` installs
(`/usr/share/doc/python3.11/html/_sources`, PSF licence). Needs jax, flax, optax,
tokenizers and safetensors.

The schedule follows the clock: the learning rate falls on a cosine to zero as the
budget of minutes is used up, however fast the machine is. WORK holds a checkpoint,
written every few minutes, from which an interrupted run goes on; `--export-only` writes
the model of the last one.
"""

import argparse
import functools
import json
import math
import os
import platform
import random
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxq.checkpoints.huggingface import write_folder
from jaxq.huggingface import load_huggingface
from jaxq.models import FAMILIES, Llama, LlamaConfig

END = "<|endoftext|>"
HELD_OUT_BYTES = 290_000
NOTHING_BUT_NOTICES = {"license.rst.txt", "copyright.rst.txt", "contents.rst.txt"}


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on besides the text."""

    minutes: float
    seed: int = 0
    vocab: int = 2048
    tokens_per_step: int = 4096
    context: int = 512
    short_context: int = 256  # trained on first: attention costs half as much
    lengthen_at: float = 0.8  # progress from which the whole context is used
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    beta2: float = 0.95
    clip: float = 2.0


@dataclass(frozen=True)
class Corpus:
    """The three texts; a file is in exactly one of train and held-out."""

    train: list[str]
    held_out: list[str]
    held_out_names: list[str]
    calibration: list[str]


def read_corpus(folder: Path, seed: int) -> Corpus:
    """Splits whole files; the held-out ones come from every chapter in proportion."""
    files = sorted(folder.rglob("*.rst.txt"))
    if not files:
        sys.exit(f"{folder} holds no *.rst.txt; install python3.11-doc first")
    files = [f for f in files if f.name not in NOTHING_BUT_NOTICES]
    texts = {str(f.relative_to(folder)): f.read_text("utf-8") for f in files}
    total = sum(len(t.encode()) for t in texts.values())
    draw = random.Random(seed)
    held: list[str] = []
    for chapter in sorted({k.split("/")[0] for k in texts if "/" in k}):
        names = [k for k in texts if k.startswith(chapter + "/")]
        draw.shuffle(names)
        share = sum(len(texts[k].encode()) for k in names) / total * HELD_OUT_BYTES
        for name in names:
            size = len(texts[name].encode())
            if 2_000 < size <= share:
                held.append(name)
                share -= size
    rest = sorted(set(texts) - set(held))
    draw.shuffle(rest)
    calibration, room = [], HELD_OUT_BYTES
    for name in rest:
        size = len(texts[name].encode())
        if size <= min(room, 40_000):
            calibration.append(texts[name])
            room -= size
    return Corpus([texts[k] for k in rest], [texts[k] for k in held], held, calibration)


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Learns a byte-level BPE from the training text alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Returns one stream of tokens in which every text begins with the end token."""
    end = tokenizer.token_to_id(END)
    encoded = tokenizer.encode_batch(texts)
    return np.concatenate([np.array([end, *e.ids], np.uint16) for e in encoded])


@functools.cache
def epoch_order(seed: int, context: int, epoch: int, count: int) -> tuple[int, Any]:
    """Returns where an epoch's windows begin and in which order they come."""
    offset = np.random.default_rng([seed, context, epoch]).integers(context)
    order = np.random.default_rng([seed, context, epoch, 1]).permutation(count)
    return int(offset), order


def batch_at(
    stream: np.ndarray, cursor: int, rows: int, context: int, seed: int
) -> np.ndarray:
    """Returns `[rows, context + 1]` windows; an epoch goes through the whole stream.

    `cursor` counts windows; an epoch's order and offset depend on its number alone, so
    a resumed run sees what an uninterrupted one would.
    """
    per_epoch = (len(stream) - context - 1) // context
    windows = []
    for index in range(cursor, cursor + rows):
        epoch, place = divmod(index, per_epoch)
        offset, order = epoch_order(seed, context, epoch, per_epoch)
        begin = offset + int(order[place]) * context
        windows.append(stream[begin : begin + context + 1])
    return np.stack(windows).astype(np.int32)


def model_config(settings: Settings) -> LlamaConfig:
    """Returns the demo model's shape: 5.2 million parameters."""
    return LlamaConfig(
        vocab_size=settings.vocab,
        hidden_size=256,
        intermediate_size=768,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        context=settings.context,
        norm_eps=1e-5,
        tied=True,
    )


def _contract(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    dims = (((axes[0],), (axes[1],)), ((), ()))
    y = jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
    return y.astype(a.dtype)


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x @ w` whose gradients, too, are sums in float32 of bfloat16 operands."""
    return _contract(x, w, (x.ndim - 1, 0))


def _matmul_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[Any, Any]]:
    return matmul(x, w), (x, w)


def _matmul_backward(
    kept: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    rows, errors = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    to_x = _contract(errors, w, (1, 1)).reshape(x.shape)
    return to_x, _contract(rows, errors, (0, 0))


matmul.defvjp(_matmul_forward, _matmul_backward)


def training_dot(x: jax.Array, w: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """The `dot_general` of the projections while training."""
    return matmul(x, w)


def cross_entropy(module: Llama, params: Any, batch: jax.Array) -> jax.Array:
    """Returns the mean negative log likelihood of tokens 1.., in nats."""
    logits = module.apply(params, batch[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return losses.mean()


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """Muon for the projections, Adam for embedding and norms, at a rate of one.

    The true rate follows the clock and multiplies each step. `consistent_rms` gives
    Muon's steps the size of Adam's, so both go by the same rate (arXiv:2502.16982).
    """

    def dimensions(params: Any) -> Any:
        def of(path: Any, leaf: jax.Array) -> Any:
            named = path[-1].key == "kernel" and leaf.ndim == 2
            return optax.contrib.MuonDimensionNumbers() if named else None

        return jax.tree_util.tree_map_with_path(of, params)

    muon = optax.contrib.muon(
        1.0,
        weight_decay=settings.weight_decay,
        adam_b2=settings.beta2,
        adam_learning_rate=1.0,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=0.2,
    )
    return optax.chain(optax.clip_by_global_norm(settings.clip), muon)


def learning_rate(settings: Settings, step: int, progress: float) -> float:
    """Linear warm-up by steps; a cosine to zero by the share of the budget used."""
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    fall = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return settings.learning_rate * warm * fall


def evaluate(module: Llama, params: Any, stream: np.ndarray, context: int) -> float:
    """Returns nats per token over windows that do not overlap."""
    score = jax.jit(lambda p, b: cross_entropy(module, p, b))
    rows = 16
    count = (len(stream) - 1) // context // rows * rows
    windows = [stream[i * context : i * context + context + 1] for i in range(count)]
    batches = np.stack(windows).astype(np.int32).reshape(-1, rows, context + 1)
    return float(np.mean([score(params, jnp.asarray(b)) for b in batches]))


def save_state(path: Path, state: Any, notes: dict[str, Any]) -> None:
    """Writes the training state and its notes as one file, atomically."""
    leaves = {f"{i:04}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
    partial = path.with_suffix(".partial")
    save_file(leaves, partial, metadata={"notes": json.dumps(notes)})
    os.replace(partial, path)


def load_state(path: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """Reads what `save_state` wrote into the structure of `like`."""
    with safe_open(path, "np") as f:
        notes = json.loads(f.metadata()["notes"])
    leaves = load_file(path)
    flat = [jnp.asarray(leaves[k]) for k in sorted(leaves)]
    return jax.tree.unflatten(jax.tree.structure(like), flat), notes


def train(settings: Settings, corpus: Corpus, tokenizer: Tokenizer, path: Path) -> None:
    """Trains until the minutes are spent, leaving checkpoints at `path`."""
    stream = encode(tokenizer, corpus.train)
    module = Llama(model_config(settings), jnp.bfloat16, training_dot)
    optimizer = make_optimizer(settings)
    state, notes = begin(settings, optimizer, path)
    notes["train_tokens_per_epoch"] = len(stream)

    @jax.jit
    def update(state: Any, batch: jax.Array, rate: jax.Array) -> tuple[Any, jax.Array]:
        params, inner = state
        score = lambda p: cross_entropy(module, p, batch)
        loss, grads = jax.value_and_grad(score)(params)
        steps, inner = optimizer.update(grads, inner, params)
        return (jax.tree.map(lambda p, s: p + rate * s, params, steps), inner), loss

    budget, since, saved, losses = settings.minutes * 60, time.monotonic(), 0.0, []
    while (progress := notes["seconds"] / budget) < 1.0:
        long = progress >= settings.lengthen_at
        context = settings.context if long else settings.short_context
        rows = settings.tokens_per_step // context
        cursor = notes["cursor"].get(str(context), 0)
        batch = batch_at(stream, cursor, rows, context, settings.seed)
        rate = learning_rate(settings, notes["step"], progress)
        state, loss = update(state, jnp.asarray(batch), jnp.float32(rate))
        losses.append(float(loss))
        now = time.monotonic()
        notes["seconds"], since = notes["seconds"] + now - since, now
        notes["step"] += 1
        notes["cursor"][str(context)] = cursor + rows
        notes["tokens_seen"] += rows * context
        if notes["step"] % 20 == 0:
            report(notes, float(np.mean(losses)), rate, context)
            losses = []
        if notes["seconds"] - saved > 240:
            saved = notes["seconds"]
            save_state(path, state, notes)
    save_state(path, state, notes)


def begin(
    settings: Settings, optimizer: optax.GradientTransformation, path: Path
) -> tuple[Any, dict[str, Any]]:
    """Returns fresh parameters, optimizer state and notes, or those at `path`."""
    module = Llama(model_config(settings))
    tokens = jnp.zeros((1, 8), jnp.int32)
    params = module.init(jax.random.key(settings.seed), tokens)
    state = (params, optimizer.init(params))
    if path.exists():
        return load_state(path, state)
    notes = {"step": 0, "seconds": 0.0, "tokens_seen": 0, "cursor": {}, "curve": []}
    return state, notes


def report(notes: dict[str, Any], loss: float, rate: float, context: int) -> None:
    """Adds a point to the loss curve and prints it."""
    notes["curve"].append([notes["step"], round(loss, 4)])
    print(
        f"step {notes['step']} loss {loss:.4f} rate {rate:.2e} context {context} "
        f"{notes['seconds'] / 60:.1f} min",
        flush=True,
    )


def export(
    settings: Settings, corpus: Corpus, work: Path, docs: Path, out: Path
) -> None:
    """Writes the last checkpoint as a Hugging Face folder, with its provenance."""
    state, notes = begin(settings, make_optimizer(settings), work / "state.safetensors")
    family, config = FAMILIES["llama"], model_config(settings)
    texts = {
        "eval.txt": "\n".join(corpus.held_out),
        "calibration.txt": "\n".join(corpus.calibration),
        "tokenizer.json": (work / "tokenizer.json").read_text("utf-8"),
        "tokenizer_config.json": to_json(tokenizer_config(settings)),
        "generation_config.json": to_json(SPECIAL),
        "PSF-LICENSE.txt": psf_license(docs),
    }
    slots = family.slots(config)
    described = hugging_face_config(config)
    write_folder(out, described, slots, state[0], jnp.bfloat16, texts)
    model = load_huggingface(out, jnp.float32)
    ids = np.array(model.tokenizer.encode(texts["eval.txt"]).ids)
    nats = evaluate(model.module, model.params, ids, settings.context)
    notes["held_out"] = {
        "perplexity": math.exp(nats),
        "nats_per_token": nats,
        "tokens": len(ids),
        "bits_per_byte": nats
        * len(ids)
        / len(texts["eval.txt"].encode())
        / math.log(2),
    }
    page = provenance(settings, corpus, notes)
    (out / "PROVENANCE.md").write_text(page, "utf-8")
    print(to_json(notes["held_out"]))


SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def to_json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def tokenizer_config(settings: Settings) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": settings.context,
        "clean_up_tokenization_spaces": False,
    }


def hugging_face_config(config: LlamaConfig) -> dict[str, Any]:
    return SPECIAL | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
    }


def psf_license(docs: Path) -> str:
    """Returns the copyright notice and the licence that the text asks to be kept."""
    copyrights = (docs / "copyright.rst.txt").read_text("utf-8")
    notice = copyrights.split("-------")[0]
    text = (docs / "license.rst.txt").read_text("utf-8")
    begin = text.index("Terms and conditions for accessing or otherwise using Python")
    stop = text.index(".. _OtherLicenses:")
    return notice + text[begin:stop].replace("|release|", "3.11")


def provenance(settings: Settings, corpus: Corpus, notes: dict[str, Any]) -> str:
    """Returns the page that says where the model comes from."""
    held_out = notes["held_out"]
    packages = ("jax", "jaxlib", "flax", "optax", "tokenizers", "safetensors", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    epochs = notes["tokens_seen"] / notes["train_tokens_per_epoch"]
    shown = notes["curve"][:: max(len(notes["curve"]) // 24, 1)]
    if shown[-1] != notes["curve"][-1]:
        shown.append(notes["curve"][-1])
    curve = "\n".join(f"| {step} | {loss:.3f} |" for step, loss in shown)
    files = "\n".join(f"- {name}" for name in corpus.held_out_names)
    return PAGE.format(
        files_trained=len(corpus.train),
        bytes_trained=sum(len(text.encode()) for text in corpus.train),
        held_out_bytes=sum(len(text.encode()) for text in corpus.held_out),
        calibration_bytes=sum(len(text.encode()) for text in corpus.calibration),
        epoch=notes["train_tokens_per_epoch"],
        steps=notes["step"],
        tokens_seen=notes["tokens_seen"],
        epochs=epochs,
        minutes=notes["seconds"] / 60,
        settings=to_json(asdict(settings)).rstrip(),
        versions=f"Python {platform.python_version()}, {versions}",
        curve=curve,
        files=files,
        budget=settings.minutes,
        **held_out,
    )


PAGE = """# The demo model: where it comes from

A Llama of 5.2 million parameters (6 layers of width 256, 4 heads sharing 2 key/value
heads, tied embedding of 2048 tokens), stored in bfloat16. It was made to show what
quantization costs; it writes plausible reStructuredText and knows nothing.

## Text and licence

The documentation of Python 3.11 in its reStructuredText sources, as Debian's package
`python3.11-doc` installs them. Copyright © 2001-2023 Python Software Foundation; All
Rights Reserved. `PSF-LICENSE.txt` is its licence, which covers the model and the two
texts here as works derived from it. What was changed: the files were split in two sets,
joined, cut into tokens and used to train a language model; `eval.txt` and
`calibration.txt` are whole files, unchanged, one after another.

| part | bytes | used for |
|---|---|---|
| {files_trained} files | {bytes_trained} | tokenizer and training |
| `eval.txt` | {held_out_bytes} | never seen in training; perplexity |
| `calibration.txt` | {calibration_bytes} | a part of the training files; calibration |

`license.rst.txt`, `copyright.rst.txt` and `contents.rst.txt` are in neither. The
held-out files are drawn from every chapter in proportion to its size:

{files}

## Result

| held-out text (`eval.txt`, windows of 512 tokens, float32) | |
|---|---|
| perplexity per token | {perplexity:.4f} |
| nats per token | {nats_per_token:.5f} |
| bits per byte | {bits_per_byte:.4f} |
| tokens | {tokens} |

## Training

```
python examples/train_demo_model.py /usr/share/doc/python3.11/html/_sources \\
    --work WORK --minutes {budget:g} --out jaxq/demo_model
```

{steps} steps on {tokens_seen} tokens ({epochs:.2f} times the {epoch} tokens of the
training text) in {minutes:.0f} minutes on two shared cores of a CPU. The schedule
follows the clock, so another run takes other steps and ends at another loss. Weights
are float32, matmuls bfloat16. Muon (arXiv:2502.16982) for the projections, Adam for the
rest.

```json
{settings}
```

{versions}

| step | mean loss of the 20 steps before |
|---|---|
{curve}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("docs", type=Path, help="folder of *.rst.txt files")
    parser.add_argument("--work", type=Path, required=True, help="for checkpoints")
    parser.add_argument("--out", type=Path, help="where to write the model")
    parser.add_argument("--minutes", type=float, default=75.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export-only", action="store_true", help="train no further")
    args = parser.parse_args()
    settings = Settings(minutes=args.minutes, seed=args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(args.docs, settings.seed)
    saved = args.work / "tokenizer.json"
    if not saved.exists():
        train_tokenizer(corpus.train, settings.vocab).save(str(saved))
    if not args.export_only:
        path = args.work / "state.safetensors"
        train(settings, corpus, Tokenizer.from_file(str(saved)), path)
    if args.out:
        export(settings, corpus, args.work, args.docs, args.out)


if __name__ == "__main__":
    main()
