"""Solvers: from a weight, statistics and a spec to a `QTensor`."""

from jaxq.solvers.rtn import rtn as rtn
from jaxq.solvers.table import SOLVERS as SOLVERS
from jaxq.solvers.table import solve as solve
