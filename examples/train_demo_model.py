"""Trains the demo model that jaxq ships: a small Llama on the Python documentation.

    python examples/train_demo_model.py DOCS --work WORK --minutes 75

DOCS is the folder of reStructuredText sources that Debian's `python3.11-doc` installs
(`/usr/share/doc/python3.11/html/_sources`, PSF licence). Needs the `demo` model's
ingredients only: jax, flax, optax, tokenizers, safetensors.

The schedule follows the clock: the learning rate falls on a cosine to zero as the budget
of minutes is used up, however fast the machine is. WORK holds a checkpoint, written
every few minutes, from which an interrupted run goes on. `--export-only` writes the
model of the last checkpoint.
"""

import argparse
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
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxq.models.llama import Llama, LlamaConfig

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
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta2: float = 0.95
    clip: float = 1.0


@dataclass(frozen=True)
class Corpus:
    """The three texts; a file is in exactly one of train and held-out."""

    train: list[str]
    held_out: list[str]
    held_out_names: list[str]
    calibration: list[str]


def read_corpus(folder: Path, seed: int) -> Corpus:
    """Splits whole files, drawing the held-out ones from every chapter in proportion."""
    files = sorted(folder.rglob("*.rst.txt"))
    if not files:
        sys.exit(f"{folder} holds no *.rst.txt; install python3.11-doc and name its html/_sources")
    texts = {str(f.relative_to(folder)): f.read_text("utf-8") for f in files}
    texts = {k: v for k, v in texts.items() if Path(k).name not in NOTHING_BUT_NOTICES}
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
    streams = [np.array([end, *e.ids], np.uint16) for e in tokenizer.encode_batch(texts)]
    return np.concatenate(streams)


def batch_at(stream: np.ndarray, cursor: int, rows: int, context: int, seed: int) -> np.ndarray:
    """Returns `[rows, context + 1]` windows; the whole stream is seen once per epoch.

    `cursor` counts windows; an epoch's order and offset depend on its number alone, so a
    resumed run sees what an uninterrupted one would.
    """
    per_epoch = (len(stream) - context - 1) // context
    windows = []
    for index in range(cursor, cursor + rows):
        epoch, place = divmod(index, per_epoch)
        rng = np.random.default_rng([seed, context, epoch])
        offset = int(rng.integers(context))
        order = _permutation(seed, context, epoch, per_epoch)
        begin = offset + int(order[place]) * context
        windows.append(stream[begin : begin + context + 1])
    return np.stack([w for w in windows]).astype(np.int32)


_ORDERS: dict[tuple[int, int, int, int], np.ndarray] = {}


def _permutation(seed: int, context: int, epoch: int, count: int) -> np.ndarray:
    key = (seed, context, epoch, count)
    if key not in _ORDERS:
        _ORDERS.clear()
        _ORDERS[key] = np.random.default_rng([seed, context, epoch, 1]).permutation(count)
    return _ORDERS[key]


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
    """`x @ w` whose gradients, too, are matmuls of bfloat16 operands with float32 sums."""
    return _contract(x, w, (x.ndim - 1, 0))


def _matmul_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return matmul(x, w), (x, w)


def _matmul_backward(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    rows, errors = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return _contract(errors, w, (1, 1)).reshape(x.shape), _contract(rows, errors, (0, 0))


matmul.defvjp(_matmul_forward, _matmul_backward)


def training_dot(x: jax.Array, w: jax.Array, *unused: Any, **also_unused: Any) -> jax.Array:
    """The `dot_general` of the projections while training."""
    return matmul(x, w)


def cross_entropy(module: Llama, params: Any, batch: jax.Array) -> jax.Array:
    """Returns the mean negative log likelihood of tokens 1.. given those before, in nats."""
    logits = module.apply(params, batch[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return losses.mean()


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW without its learning rate, which follows the clock and comes with each step."""

    def decays(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.scale_by_adam(b2=settings.beta2),
        optax.add_decayed_weights(settings.weight_decay, mask=decays),
    )


def learning_rate(settings: Settings, step: int, progress: float) -> float:
    """Linear warm-up by steps, then a cosine to zero by the share of the budget used."""
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    return settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


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
    from safetensors import safe_open

    with safe_open(path, "np") as f:
        notes = json.loads(f.metadata()["notes"])
    leaves = load_file(path)
    flat = [jnp.asarray(leaves[k]) for k in sorted(leaves)]
    return jax.tree.unflatten(jax.tree.structure(like), flat), notes


def train(settings: Settings, corpus: Corpus, tokenizer: Tokenizer, work: Path) -> tuple[Any, dict]:
    """Trains until the minutes are spent; returns the parameters and the notes."""
    stream, held_out = encode(tokenizer, corpus.train), encode(tokenizer, corpus.held_out)
    cfg = model_config(settings)
    module = Llama(cfg, dtype=jnp.bfloat16, dot_general=training_dot)
    exact = Llama(cfg, dtype=jnp.float32)
    params = module.init(jax.random.key(settings.seed), jnp.zeros((1, 8), jnp.int32))
    optimizer = make_optimizer(settings)
    state = (params, optimizer.init(params))
    notes: dict[str, Any] = {
        "step": 0, "seconds": 0.0, "cursor": {}, "curve": [],
        "train_tokens_per_epoch": len(stream), "tokens_seen": 0,
    }
    path = work / "state.safetensors"
    if path.exists():
        state, notes = load_state(path, state)
        print(f"resumed at step {notes['step']}", flush=True)

    @jax.jit
    def update(state: Any, batch: jax.Array, rate: jax.Array) -> tuple[Any, jax.Array]:
        params, inner = state
        loss, grads = jax.value_and_grad(lambda p: cross_entropy(module, p, batch))(params)
        steps, inner = optimizer.update(grads, inner, params)
        return (jax.tree.map(lambda p, s: p - rate * s, params, steps), inner), loss

    budget, since, saved, losses = settings.minutes * 60, time.monotonic(), 0.0, []
    while (progress := notes["seconds"] / budget) < 1.0:
        context = settings.context if progress >= settings.lengthen_at else settings.short_context
        rows = settings.tokens_per_step // context
        cursor = notes["cursor"].get(str(context), 0)
        batch = batch_at(stream, cursor, rows, context, settings.seed)
        rate = learning_rate(settings, notes["step"], progress)
        state, loss = update(state, jnp.asarray(batch), jnp.float32(rate))
        losses.append(float(loss))
        now = time.monotonic()
        notes["seconds"] += now - since
        since = now
        notes["step"] += 1
        notes["cursor"][str(context)] = cursor + rows
        notes["tokens_seen"] += rows * context
        if notes["step"] % 20 == 0:
            mean = float(np.mean(losses))
            losses = []
            notes["curve"].append([notes["step"], round(mean, 4)])
            print(f"step {notes['step']} loss {mean:.4f} rate {rate:.2e} "
                  f"context {context} {notes['seconds'] / 60:.1f} min", flush=True)
        if notes["seconds"] - saved > 240 or notes["seconds"] >= budget:
            saved = notes["seconds"]
            save_state(path, state, notes)
    notes["eval_nats"] = evaluate(exact, state[0], held_out, settings.context)
    save_state(path, state, notes)
    print(f"held-out {notes['eval_nats']:.4f} nats, perplexity {math.exp(notes['eval_nats']):.3f}")
    return state[0], notes


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("docs", type=Path, help="folder of *.rst.txt files")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--minutes", type=float, default=75.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    settings = Settings(minutes=args.minutes, seed=args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(args.docs, settings.seed)
    saved = args.work / "tokenizer.json"
    if not saved.exists():
        train_tokenizer(corpus.train, settings.vocab).save(str(saved))
    tokenizer = Tokenizer.from_file(str(saved))
    (args.work / "eval.txt").write_text("\n".join(corpus.held_out), "utf-8")
    (args.work / "calibration.txt").write_text("\n".join(corpus.calibration), "utf-8")
    (args.work / "settings.json").write_text(json.dumps(asdict(settings), indent=2))
    (args.work / "held_out.json").write_text(json.dumps(corpus.held_out_names, indent=2))
    train(settings, corpus, tokenizer, args.work)


if __name__ == "__main__":
    main()
