"""Evidence: for every quantized tensor, proof of what calibration did to it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What was done to one weight, and what it cost on the calibration data.

    Attributes:
        path: the parameter's path; a scanned parameter has one entry per step.
        method: transforms and solver, as the recipe names them.
        tokens: how many tokens reached it; for experts the sum, for a convolution the
            patches.
        loss: ``tr(Δ H Δᵀ) / (tokens · outputs)``, the mean squared error of its
            product, against the float weight.
        rtn_loss: the same of its own round to nearest (the spec's full range).
        damping: the share of the Gram's mean diagonal that was added, or None.
        order: in which order columns were solved, or None.
        seconds: spent on it, compilation included.
        fallback: why it is not what the recipe asked for, or None.
        note: anything else worth knowing, or None.
        experts: tokens of each stacked weight, empty without a stack.
        block_loss: squared error of the block's output relative to each token's size,
            before and after tuning, on batches that no step saw where there are 16 or
            more; or None.
    """

    path: str
    method: str
    tokens: int
    loss: float | None = None
    rtn_loss: float | None = None
    damping: float | None = None
    order: str | None = None
    seconds: float = 0.0
    fallback: str | None = None
    note: str | None = None
    experts: tuple[int, ...] = ()
    block_loss: tuple[float, float] | None = None

    @property
    def ratio(self) -> float | None:
        """The loss as a share of round to nearest's."""
        if self.loss is None or not self.rtn_loss:
            return None
        return self.loss / self.rtn_loss

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without what is not known.

        A loss that overflowed is not known: JSON has no word for infinity.
        """
        fields = dataclasses.asdict(self)
        for name in ("loss", "rtn_loss"):
            if fields[name] is not None and not math.isfinite(fields[name]):
                fields[name] = None
        if self.block_loss and not all(map(math.isfinite, self.block_loss)):
            fields["block_loss"] = None
        fields["solver"] = fields.pop("method")
        kept = ("tokens", "loss", "rtn_loss", "damping", "order", "seconds", "fallback")
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
            if name in (*kept, "solver") or value
            if name != "path"
        }


def scarcity(tokens: int, inputs: int, experts: Sequence[int] = ()) -> str | None:
    """Return what to say of a weight that saw less data than it has inputs, or None.

    Its Gram matrix has then fewer directions than the weight: a loss near 0 on those
    says nothing of others.

    Example:
        >>> scarcity(2, 256)
        '2 tokens for 256 inputs: its loss says little; give more calibration data'
        >>> scarcity(300, 256) is None
        True
    """
    advice = "its loss says little; give more calibration data"
    if not experts:
        return (
            f"{tokens} tokens for {inputs} inputs: {advice}"
            if tokens < inputs
            else None
        )
    few = sum(0 < count < inputs for count in experts)
    if not few:
        return None
    return f"{few} experts saw fewer tokens than their {inputs} inputs: {advice}"
