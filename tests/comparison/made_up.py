"""A comparison made of chosen numbers, for tests of how it is shown."""

import dataclasses

from jaxq.comparison import Calibration, Comparison, Row, Run, Text
from jaxq.presets import PRESETS

MACHINE = {"device": "cpu", "platform": "cpu", "python": "3.11", "jaxq": "0.1.0"}


def row(name, bits, kls, perplexities, base="w4a16", **more):
    """A recipe whose runs have these losses; one alone has no seed."""
    seeds = range(len(kls)) if len(kls) > 1 else [None]
    runs = [
        Run(seed, bits, int(bits * 1e6 / 8), perplexity, kl, 0.9, 12.25, 4000.0, **more)
        for seed, kl, perplexity in zip(seeds, kls, perplexities, strict=True)
    ]
    return Row(dataclasses.replace(PRESETS[base], name=name), tuple(runs))


ROWS = (
    row("w8a8", 8.111, [0.001], [10.01], base="w8a8"),
    row("w4a16", 4.75, [0.03], [10.4]),
    row("gptq", 4.75, [0.010, 0.012, 0.014], [10.1, 10.2, 10.3]),
    row("awq", 4.76, [0.011, 0.014, 0.0125], [10.1, 10.15, 10.2]),
    row("w2a16 <&>", 2.5, [0.9], [31.0]),
)
DRAWS = Calibration("cd" * 32, 93_156, 128, 512, (0, 1, 2))


def comparison(rows=ROWS, calibration=DRAWS):
    """The comparison of these rows."""
    whole = Run(None, 16.0, 2_000_000, 10.0, tokens_per_second=5000.0)
    text = Text("ab" * 32, 88_474, 24, 512)
    return Comparison("toy", 1_000_000, whole, rows, text, calibration, MACHINE)
