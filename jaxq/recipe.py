"""Recipes: where what is quantized, as data."""

import dataclasses
import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxq.lift.use import SITE_OPS
from jaxq.method import Chain, Method, Options, hashable
from jaxq.names import lookup, unknown
from jaxq.observers import OBSERVERS
from jaxq.solvers import SOLVERS
from jaxq.spec import QuantSpec
from jaxq.transforms import TRANSFORMS

# the observers that a static activation scale can be made of
RANGES = {name: row for name, row in OBSERVERS.items() if row().bounds is not None}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What happens to the parameters that a pattern matches.

    Attributes:
        match: a glob on the parameter's path (``*`` also crosses ``/``), or a regular
            expression after ``re:``, which must match the whole path.
        weight: the spec of the weight; None leaves it float.
        activation: the spec by which products quantize the other operand, or None.
        static: whether the activation's scale is calibrated once (needs calibration
            data) instead of computed for every call; or how its range is found: a key
            of `jaxq.observers.OBSERVERS` that gives bounds (True: ``minmax``). Of an
            activation whose scales are quantized in turn, the scale of the scales.
        solver: a key of `jaxq.solvers.SOLVERS`; or what `jaxq.chain`, `jaxq.gptq` and
            the like return, which then also gives the options and transforms.
        options: keyword arguments of the solver, as sorted pairs (a mapping is taken).
        transforms: what re-parametrizes before the solver: names of
            `jaxq.transforms.TRANSFORMS`, each with its options.
        ops: only parameters met by one of these operations (``gather``,
            ``dot_general``, ...); empty: any.
        required: whether matching nothing is an error.

    Raises:
        ValueError: naming the rule, what is wrong with it and what it may say.

    Example:
        >>> rule = Rule("*/attention/*", QuantSpec("int4", 64), options={"clip": "mse"})
        >>> rule.matches("params/layer_0/attention/query/kernel")
        True
    """

    match: str = "*"
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    static: bool | str = False
    solver: Any = "rtn"  # a name, once the rule is made
    options: Options = ()
    transforms: tuple[tuple[str, Options], ...] = ()
    ops: tuple[str, ...] = ()
    required: bool = True

    def __post_init__(self) -> None:
        """Normalize the containers, and reject what cannot be meant."""
        self._unpack_method()
        options = dict(self.options)
        pairs = tuple((k, hashable(options[k])) for k in sorted(options))
        object.__setattr__(self, "options", pairs)
        ops = (self.ops,) if isinstance(self.ops, str) else tuple(self.ops)
        object.__setattr__(self, "ops", ops)
        self._check_types()
        lookup(SOLVERS, self.solver, "solver")
        if isinstance(self.static, str):
            lookup(RANGES, self.static, "way to find a static range")
        if self.weight is not None and self.weight.outliers is not None:
            raise ValueError(
                f"rule {self.match!r} gives its weight outliers="
                f"{self.weight.outliers:g}, which is about activations: give it to "
                f"activation=, or leave it out"
            )
        if self.transforms and self.weight is None:
            raise ValueError(
                f"rule {self.match!r} transforms but leaves the weight float; give it "
                f"a weight spec, or drop the transforms"
            )
        for op in self.ops:
            if op not in SITE_OPS:
                raise unknown(op, SITE_OPS, "operation")
        if self.activation is not None and self.weight is None:
            raise ValueError(
                f"rule {self.match!r} quantizes the activation but leaves the weight "
                f"float; give it a weight spec, or drop the activation"
            )
        if self.static and not (self.activation and self.activation.static_number):
            raise ValueError(
                f"rule {self.match!r} asks for a static activation scale, which is one "
                f"number: give activation=QuantSpec(..., block='tensor'), or scales "
                f"that are quantized in turn, scale=QuantSpec(..., block='tensor')"
            )
        if self.match.startswith("re:"):
            try:
                re.compile(self.match[3:])
            except re.error as error:
                raise ValueError(f"rule {self.match!r}: {error}") from error

    def _unpack_method(self) -> None:
        """Take apart what `jaxq.chain` made, and normalize the transforms."""
        method: Any = self.solver
        transforms: list[Method] = []
        if isinstance(method, Method):
            method = Chain((), method)
        if isinstance(method, Chain):
            if self.options or self.transforms:
                raise ValueError(
                    f"rule {self.match!r} has solver={method!r}, which says all: drop "
                    f"options= and transforms="
                )
            object.__setattr__(self, "solver", method.solver.name)
            object.__setattr__(self, "options", method.solver.options)
            transforms = list(method.transforms)
        for item in self.transforms:
            name, options = (item, ()) if isinstance(item, str) else item
            lookup(TRANSFORMS, name, "transform")
            transforms.append(Method(name, options))
        pairs = tuple((m.name, m.options) for m in transforms)
        object.__setattr__(self, "transforms", pairs)

    @property
    def method(self) -> str:
        """Transforms and solver with their options, in one line."""
        steps = (*self.transforms, (self.solver, self.options))
        return " + ".join(repr(Method(*step)) for step in steps)

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics of activations that its solver asks for."""
        solver = SOLVERS[self.solver]
        return (*solver.needs, *solver.optional(dict(self.options)))

    @property
    def needs_data(self) -> bool:
        """Whether it can do nothing without calibration data."""
        return bool(self.needs or self.transforms or self.static)

    @property
    def is_tuned(self) -> bool:
        """Whether the weight is tuned together with its block."""
        return SOLVERS[self.solver].tunes

    def _check_types(self) -> None:
        """Raise on a pattern that is no text, or a spec that is no spec."""
        if not isinstance(self.match, str):
            raise ValueError(
                f"match={self.match!r} must be text: a glob, or 're:' and a regular "
                f"expression (in YAML, quote it)"
            )
        for name in ("weight", "activation"):
            spec = getattr(self, name)
            if spec is not None and not isinstance(spec, QuantSpec):
                raise ValueError(
                    f"rule {self.match!r}: {name}={spec!r} must be a QuantSpec (in a "
                    f"file, a mapping like {{format: int8}}) or None"
                )

    def matches(self, path: str, ops: Sequence[str] = ()) -> bool:
        """Whether the rule is about a parameter met by ``ops``."""
        if self.ops and not set(self.ops) & set(ops):
            return False
        if self.match.startswith("re:"):
            return re.fullmatch(self.match[3:], path) is not None
        return fnmatch.fnmatchcase(path, self.match)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, as plain data."""
        out: dict[str, Any] = {"match": self.match}
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if isinstance(value, QuantSpec):
                value = value.to_dict()
            elif field.name == "options":
                value = {k: _plain(v) for k, v in value}
            elif field.name == "transforms":
                value = [[n, {k: _plain(v) for k, v in o}] for n, o in value]
            out[field.name] = _plain(value)
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Rule":
        """Invert `to_dict`.

        Raises:
            ValueError: on an unknown key, or a value the constructor refuses.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for key in data:
            if key not in known:
                raise unknown(key, known, "rule field")
        fields = dict(data)
        for key in ("weight", "activation"):
            if isinstance(fields.get(key), Mapping):
                fields[key] = QuantSpec.from_dict(fields[key])
        return cls(**fields)


def _plain(value: Any) -> Any:
    """Return a field as files keep it: tuples become lists."""
    return list(map(_plain, value)) if isinstance(value, tuple) else value


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An ordered list of rules; the first that matches a parameter wins.

    Attributes:
        name: for tables and manifests.
        rules: in order of precedence.

    Example:
        >>> keep_head = Rule("*lm_head*")
        >>> recipe = Recipe("mine", (keep_head, Rule("*", QuantSpec("int8"))))
        >>> recipe == Recipe.from_dict(recipe.to_dict())
        True
    """

    name: str
    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        """Normalize the container."""
        object.__setattr__(self, "rules", tuple(self.rules))
        if not self.rules:
            raise ValueError(f"recipe {self.name!r} has no rules: it would do nothing")

    def rule_for(self, path: str, ops: Sequence[str] = ()) -> Rule | None:
        """Return the first rule about a parameter, or None."""
        return next((rule for rule in self.rules if rule.matches(path, ops)), None)

    def with_group_size(self, size: int) -> "Recipe":
        """Return the recipe with another group size wherever weights have groups.

        Raises:
            ValueError: when no rule has groups.
        """
        rules, changed = [], False
        for rule in self.rules:
            if rule.weight is not None and isinstance(rule.weight.block, int):
                weight = dataclasses.replace(rule.weight, block=size)
                rule, changed = dataclasses.replace(rule, weight=weight), True
            rules.append(rule)
        if not changed:
            raise ValueError(
                f"group size {size} was asked for, but no rule of recipe {self.name!r} "
                f"has groups; its weights have one scale per channel or tensor"
            )
        return Recipe(f"{self.name}-g{size}", tuple(rules))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for YAML or JSON."""
        return {"name": self.name, "rules": [rule.to_dict() for rule in self.rules]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
        """Invert `to_dict`.

        Raises:
            ValueError: naming the key or value that is wrong.
        """
        for key in data:
            if key not in ("name", "rules"):
                raise unknown(key, ("name", "rules"), "recipe field")
        rules = data.get("rules")
        if not isinstance(rules, list) or not all(
            isinstance(r, Mapping) for r in rules
        ):
            raise ValueError("a recipe needs 'rules': a list of rules, each a mapping")
        return cls(str(data.get("name", "recipe")), tuple(map(Rule.from_dict, rules)))

    def dump(self, path: str | Path) -> None:
        """Write the recipe as YAML, or as JSON when the name ends in ``.json``."""
        text = (
            json.dumps(self.to_dict(), indent=2)
            if _is_json(path)
            else yaml.safe_dump(self.to_dict(), sort_keys=False)
        )
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Read a recipe from YAML, or from JSON when the name ends in ``.json``.

        Raises:
            ValueError: naming the file and what is wrong in it.
        """
        kind, parse = ("JSON", json.loads) if _is_json(path) else ("YAML", _read_yaml)
        try:
            data = parse(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{path} is not {kind}: {error}") from error
        if not isinstance(data, Mapping):
            raise ValueError(f"{path} holds no recipe: give 'name' and 'rules'")
        try:
            return cls.from_dict(data)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


def _is_json(path: str | Path) -> bool:
    """Whether a file's name says that it holds JSON."""
    return str(path).endswith(".json")


def _read_yaml(text: str) -> Any:
    """Parse YAML without constructing anything but plain data."""
    return yaml.safe_load(text)
