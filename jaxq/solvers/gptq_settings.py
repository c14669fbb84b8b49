"""The options of GPTQ."""

import dataclasses
from typing import Any

from jaxq.names import lookup, unknown
from jaxq.solvers.order import ORDERS
from jaxq.solvers.scale_search import check_search

CORRECTIONS = ("gptaq", "target")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of `jaxq.solvers.gptq`.

    Attributes:
        block_size: rows whose errors are spread at once; changes speed, not results.
        damping: added to the diagonal of the Hessian, as a share of its mean. When the
            matrix cannot be factored it grows tenfold, up to 1.
        order: which rows are rounded first: ``"activation"`` (those of the largest
            activations: later ones make up for them), ``"group"`` (whole groups by
            their largest, and likewise inside), ``"natural"``.
        static_groups: whether scales are those of the weight as it was. False: chosen
            when a group begins, from weights that make up for the groups before it.
        search: how ranges are chosen: ``"absmax"``, ``"mse"``, ``"importance"`` (errors
            weighed by the diagonal of the Gram matrix), ``"conditional"`` (by what
            remains of it once later rows make up for a row, ``M_kk²``), ``"output"``
            (by the group's block of the Gram matrix); see `jaxq.solvers.scale_search`.
        search_options: of the search, as pairs.
        sweeps: how often scales and codes are refined afterwards (see
            `jaxq.solvers.refine`); each costs about twice what GPTQ does.
        drift: by how much the rows also make up for the drift of the quantized prefix
            (GPTAQ's alpha, there 0.25); above 0 it needs ``statistics.drift``.
        correction: how: ``"gptaq"`` (earlier rows' drift, by the rows to come), or
            ``"target"`` (round ``W + alpha H⁻¹ Dᵀ W``, the least squares solution).
        compensated: whether the updated weights are returned.
    """

    block_size: int = 128
    damping: float = 0.05
    order: str = "activation"
    static_groups: bool = True
    search: str = "conditional"
    search_options: tuple[tuple[str, Any], ...] = ()
    sweeps: int = 0
    drift: float = 0.0
    correction: str = "gptaq"
    compensated: bool = False

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Settings":
        """Return settings; what is none of theirs is an option of the search.

        Raises:
            UnknownNameError: on an option that neither has.
            ValueError: naming the option, its value and its limits.
        """
        names = [f.name for f in dataclasses.fields(cls) if f.name != "search_options"]
        mine = {k: v for k, v in options.items() if k in names}
        rest = tuple(sorted((k, v) for k, v in options.items() if k not in names))
        return cls(**mine, search_options=rest)

    def __post_init__(self) -> None:
        """Reject what cannot be meant."""
        lookup(ORDERS, self.order, "order")
        check_search(self.search, self.search_options)
        if self.correction not in CORRECTIONS:
            raise unknown(self.correction, CORRECTIONS, "correction")
        for name, least in (("block_size", 1), ("sweeps", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={value!r} must be an integer >= {least}")
        for name, usual in (("damping", "0.01 to 0.1 is"), ("drift", "0.25 is")):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must lie in [0, 1]; {usual} usual")
        if self.drift and self.sweeps and self.correction == "gptaq":
            raise ValueError(
                f"sweeps={self.sweeps} would undo what correction='gptaq' fed forward: "
                f"use correction='target', or sweeps=0"
            )
        if self.order == "activation" and not self.static_groups:
            raise ValueError(
                "order='activation' mixes the rows of all groups, so a group never "
                "begins: use static_groups=True, or order='group' or 'natural'"
            )
