"""What a report says, as plain numbers; nothing here knows HTML."""

import dataclasses

import numpy as np

from jaxq.report.evidence import Evidence

OUTLIER_SIGMAS = 6.0  # beyond so many standard deviations a value is an outlier


@dataclasses.dataclass(frozen=True)
class Result:
    """What one recipe made of the model.

    Attributes:
        recipe: its name; ``float`` for the model itself.
        bits: stored bits per weight over all parameters.
        nbytes: stored bytes.
        perplexity: on the evaluation text.
        kl: ``KL(float ‖ this)`` per token, nats.
        top1: share of tokens where both find the same likeliest.
        seconds: to quantize.
        tokens_per_second: of the evaluation's forward pass.
        quantizes_activations: whether products also round the other operand.
    """

    recipe: str
    bits: float
    nbytes: int
    perplexity: float
    kl: float = 0.0
    top1: float = 1.0
    seconds: float = 0.0
    tokens_per_second: float = float("nan")
    quantizes_activations: bool = False


@dataclasses.dataclass(frozen=True)
class MatrixError:
    """What one recipe cost one matrix.

    Attributes:
        recipe: the recipe's name.
        path: the parameter's path.
        kind: the path without the layer's number: the row of a heat map.
        layer: the layer's number; None outside of layers.
        weight: ``‖W − Ŵ‖ / ‖W‖``.
        output: ``‖XW − XŴ‖ / ‖XW‖`` on real activations X, as the product runs.
    """

    recipe: str
    path: str
    kind: str
    layer: int | None
    weight: float
    output: float


@dataclasses.dataclass(frozen=True)
class Distribution:
    """A histogram of values in units of their standard deviation.

    Attributes:
        title: what was counted.
        edges: ``bins + 1`` edges, in standard deviations from 0.
        counts: values per bin.
        sigma: the standard deviation.
        largest: the largest magnitude, in standard deviations.
        largest_at: the parameter that has it.
        outliers: values beyond `OUTLIER_SIGMAS`.
    """

    title: str
    edges: np.ndarray
    counts: np.ndarray
    sigma: float
    largest: float
    largest_at: str
    outliers: int

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())


@dataclasses.dataclass(frozen=True)
class Channels:
    """The largest magnitude of each input channel of one matrix.

    Attributes:
        title: the matrix.
        largest: ``max |x|`` over tokens, per channel.
    """

    title: str
    largest: np.ndarray


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything on the page.

    Attributes:
        model: its name.
        facts: short (name, value) pairs: parameters, text, tokens, machine.
        results: one per recipe, the float model first.
        errors: one per matrix and recipe.
        weights: histograms of the weights.
        activations: histograms of the inputs of the products.
        channels: the inputs' channels.
        prompt: what the sample continues.
        sample: the text that a quantized model made.
        sample_recipe: which one.
        evidence: of recipes that saw data: (name, what it did to each weight).
    """

    model: str
    facts: tuple[tuple[str, str], ...]
    results: tuple[Result, ...]
    errors: tuple[MatrixError, ...] = ()
    weights: tuple[Distribution, ...] = ()
    activations: tuple[Distribution, ...] = ()
    channels: tuple[Channels, ...] = ()
    prompt: str = ""
    sample: str = ""
    sample_recipe: str = ""
    evidence: tuple[tuple[str, Evidence], ...] = ()
