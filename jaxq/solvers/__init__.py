"""Solvers: from a weight, statistics and a spec to a `QTensor`."""

from jaxq.solvers.base import Solved as Solved
from jaxq.solvers.base import Solver as Solver
from jaxq.solvers.base import Statistics as Statistics
from jaxq.solvers.bcq import bcq as bcq
from jaxq.solvers.gptq import gptq as gptq
from jaxq.solvers.layer_loss import layer_loss as layer_loss
from jaxq.solvers.rtn import rtn as rtn
from jaxq.solvers.table import SOLVERS as SOLVERS
from jaxq.solvers.table import solve as solve
from jaxq.solvers.table import solve_with as solve_with
