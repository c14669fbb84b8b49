"""The kinds of values a replay treats as parameters."""

from typing import Any

from jaxq.layer import Layer
from jaxq.lift.weight import Weight
from jaxq.qtensor import QTensor

Leaf = QTensor | Layer | Weight


def is_leaf(x: Any) -> bool:
    """Whether a value is a quantized or watched parameter."""
    return isinstance(x, Leaf)
