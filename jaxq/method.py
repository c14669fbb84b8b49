"""Methods by name: transforms and a solver, chained, as data that a recipe keeps."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from jaxq.names import lookup, unknown
from jaxq.solvers import SOLVERS
from jaxq.transforms import TRANSFORMS

Options = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Method:
    """One transform or solver, with its options.

    Attributes:
        name: a key of `jaxq.transforms.TRANSFORMS` or `jaxq.solvers.SOLVERS`.
        options: its keyword arguments, as sorted pairs (a mapping is taken).

    Raises:
        ValueError: on an unknown name, or an option that the method does not have.

    Example:
        >>> Method("gptq", {"damping": 0.01})
        gptq(damping=0.01)
    """

    name: str
    options: Options = ()

    def __post_init__(self) -> None:
        """Normalize the options, and reject what the method does not know."""
        options = dict(self.options)
        pairs = tuple((k, hashable(options[k])) for k in sorted(options))
        object.__setattr__(self, "options", pairs)
        functions = {name: row.candidates for name, row in TRANSFORMS.items()}
        functions |= {name: row.run for name, row in SOLVERS.items()}
        known = option_names(lookup(functions, self.name, "method"))
        for option in options:
            if known is not None and option not in known:
                raise unknown(option, known, f"option of {self.name}:")

    @property
    def is_transform(self) -> bool:
        """Whether it re-parametrizes rather than rounds."""
        return self.name in TRANSFORMS

    def __repr__(self) -> str:
        """Return it as a call."""
        options = ", ".join(f"{k}={v}" for k, v in self.options)
        return f"{self.name}({options})" if options else self.name


@dataclasses.dataclass(frozen=True)
class Chain:
    """Transforms, then a solver.

    Attributes:
        transforms: applied in order.
        solver: rounds what they leave.
    """

    transforms: tuple[Method, ...]
    solver: Method

    def __repr__(self) -> str:
        """Return the methods, joined."""
        return " + ".join(map(repr, (*self.transforms, self.solver)))


def chain(*methods: "Method | str") -> Chain:
    """Return transforms and the solver that follows them as one method.

    Args:
        *methods: transforms in order, then one solver (round to nearest when none is
            given).

    Raises:
        ValueError: when nothing is given, or a solver stands before the end.

    Example:
        >>> chain(Method("smoothquant", {"alpha": 0.5}), "gptq")
        smoothquant(alpha=0.5) + gptq
    """
    found = tuple(m if isinstance(m, Method) else Method(m) for m in methods)
    if not found:
        raise ValueError("chain() needs at least one transform or solver")
    if found[-1].is_transform:
        found = (*found, Method("rtn"))
    for early in found[:-1]:
        if not early.is_transform:
            raise ValueError(
                f"{early.name!r} rounds the weight, so nothing can follow it: put it "
                f"last in chain(...)"
            )
    return Chain(found[:-1], found[-1])


def rtn(**options: Any) -> Method:
    """Return round to nearest as a method; see `jaxq.solvers.rtn`."""
    return Method("rtn", tuple(options.items()))


def bcq(**options: Any) -> Method:
    """Return binary coding as a method; see `jaxq.solvers.bcq`."""
    return Method("bcq", tuple(options.items()))


def gptq(**options: Any) -> Method:
    """Return GPTQ as a method; see `jaxq.solvers.gptq`."""
    return Method("gptq", tuple(options.items()))


def autoround(**options: Any) -> Method:
    """Return block tuning as a method; see `jaxq.solvers.autoround`."""
    return Method("autoround", tuple(options.items()))


def awq(**options: Any) -> Method:
    """Return AWQ's scale search as a method; see `jaxq.transforms.awq`."""
    return Method("awq", tuple(options.items()))


def smoothquant(alpha: float | str = 0.5) -> Method:
    """Return SmoothQuant as a method; see `jaxq.transforms.smoothquant`."""
    return Method("smoothquant", (("alpha", alpha),))


def split(ratio: float = 0.02) -> Method:
    """Return outlier channel splitting as a method; see `jaxq.transforms.split`."""
    return Method("split", (("ratio", ratio),))


def option_names(function: Callable[..., Any]) -> tuple[str, ...] | None:
    """Return the options a function takes; None when it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return tuple(
        p.name
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name not in ("axis", "stacked")
    )


def hashable(value: Any) -> Any:
    """Return an option as a rule keeps it: lists become tuples."""
    return tuple(map(hashable, value)) if isinstance(value, list | tuple) else value
