"""Solvers: from a weight, statistics and a spec to a `QTensor`. One row each."""

from collections.abc import Callable

from jaxq.qtensor import QTensor
from jaxq.solvers.rtn import rtn as rtn

SOLVERS: dict[str, Callable[..., QTensor]] = {
    "rtn": rtn,
}
