"""Evaluate a jaxpr in which some values are quantized or watched parameters.

Equations that meet no such leaf are evaluated by JAX itself, in runs as long as
possible. Views of a leaf stay leaves; products run `jaxq.ops`; control flow is replayed
with its leaves inside; everything else gets the dequantized array, and is recorded.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend import core as jexc

from jaxq.layer import Layer
from jaxq.lift.control_rules import CONTROL_RULES
from jaxq.lift.leaf import Leaf, is_leaf
from jaxq.lift.product_rules import PRODUCT_RULES
from jaxq.lift.use import Use
from jaxq.lift.view_rules import LAYER_RULES, VIEW_RULES, split
from jaxq.lift.weight import Weight
from jaxq.ops import Choice
from jaxq.qtensor import QTensor
from jaxq.views import ViewError
from pallas_kernels.target import Target

# (parameter path, activation) -> a pytree of arrays to collect, or None
Tap = Callable[[str, jax.Array], Any]


@dataclasses.dataclass
class Replay:
    """One replay of one jaxpr.

    Attributes:
        debug_info: of the traced function, for the jaxprs made here.
        tap: called with the activation at each product, or None.
        target: the chip to choose kernels for; None for the one this runs on.
        uses: what met what, in the order of execution.
        taps: what ``tap`` returned, by parameter path, one entry per use; inside a scan
            stacked over its steps.
    """

    debug_info: Any
    tap: Tap | None = None
    target: Target | None = None
    uses: list[Use] = dataclasses.field(default_factory=list)
    taps: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

    def run(self, closed: Any, inputs: Sequence[Any]) -> list[Any]:
        """Evaluate a (closed or open) jaxpr on arrays and leaves."""
        jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))
        leaves = {v for v, value in env.items() if is_leaf(value)}
        pending: list[Any] = []
        for eqn in jaxpr.eqns:
            if not any(_is_var(v) and v in leaves for v in eqn.invars):
                pending.append(eqn)
                continue
            self._flush(pending, env)
            outs = self._equation(eqn, [_read(env, v) for v in eqn.invars])
            for v, value in zip(eqn.outvars, outs, strict=True):
                env[v] = value
                if is_leaf(value):
                    leaves.add(v)
        self._flush(pending, env)
        return [_read(env, v) for v in jaxpr.outvars]

    def arrays(self, values: Iterable[Any], op: str) -> list[Any]:
        """Dequantize every leaf among ``values``, and record that ``op`` needed it."""
        return [self._array(value, op, "no fused rule") for value in values]

    def _array(self, value: Any, op: str, reason: str) -> Any:
        """Return a leaf as an array, and record why."""
        if isinstance(value, Weight):
            self.uses.append(Use(value.path, op))
            return value.value
        if isinstance(value, QTensor | Layer):
            value = value.taken() if isinstance(value, Layer) else value
            choice = Choice("dequantize", ((op, reason),))
            self.uses.append(Use(_name(value), op, choice=choice))
            return value.dequantize()
        return value

    def _equation(self, eqn: Any, values: list[Any]) -> list[Any]:
        """Evaluate one equation that meets a leaf."""
        name, first = eqn.primitive.name, values[0]
        alone = sum(map(is_leaf, values)) == 1
        if name in CONTROL_RULES:
            return CONTROL_RULES[name](self, eqn, values)
        if alone and name in LAYER_RULES and isinstance(first, QTensor | Layer):
            layer = LAYER_RULES[name](first, eqn, values[1:])
            if layer is not None:
                return [layer]
        if name != "dot_general":
            values = [v.taken() if isinstance(v, Layer) else v for v in values]
            first = values[0]
        if name in PRODUCT_RULES and not is_outer(eqn):
            # of two leaves, the second is the weight and the first an activation
            if not alone:
                values = [*self.arrays([first], name), *values[1:]]
            return [PRODUCT_RULES[name](self, eqn, values)]
        if alone and is_leaf(first):
            if name in VIEW_RULES:
                return [self._view(eqn, first, values[1:])]
            if name == "split":
                return self._split(eqn, first)
        return self.float_equations(eqn, self.arrays(values, name))

    def _view(self, eqn: Any, leaf: QTensor | Weight, rest: list[Any]) -> Any:
        """Take a view of a leaf; where there is none, dequantize it."""
        name = eqn.primitive.name
        rows = name == "gather" and rest[0].ndim > 1
        if isinstance(leaf, Weight):
            labels = VIEW_RULES[name].labels(leaf.axes, eqn, leaf.value.shape)
            view = leaf.view(lambda a: self.float_equation(eqn, [a, *rest]), labels)
            if name == "rev":
                return view.turned(eqn.params["dimensions"])
            if not rows:
                return view
            # the axes taken whole; a start index along one (from vmap) is always 0
            gone = eqn.params["dimension_numbers"].collapsed_slice_dims
            sizes = zip(eqn.params["slice_sizes"], leaf.value.shape, strict=True)
            row = [i for i, (n, m) in enumerate(sizes) if n == m and i not in gone]
            self.product(leaf, "gather", row, None)
            return view.value
        try:
            quantized = VIEW_RULES[name].quantized(leaf, eqn, rest)
        except ViewError as reason:
            return self.float_equation(
                eqn, [self._array(leaf, name, str(reason)), *rest]
            )
        if not rows:
            return quantized
        self.product(leaf, "gather", (), None, Choice("xla.gather_rows"))
        return quantized.dequantize()

    def _split(self, eqn: Any, leaf: QTensor | Weight) -> list[Any]:
        """Split a leaf into leaves; where a block would be cut, dequantize it."""
        if isinstance(leaf, Weight):
            parts = self.float_equations(eqn, [leaf.value])
            return [dataclasses.replace(leaf, value=part) for part in parts]
        try:
            return split(leaf, tuple(eqn.params["sizes"]), eqn.params["axis"])
        except ViewError as reason:
            array = self._array(leaf, "split", str(reason))
            return self.float_equations(eqn, [array])

    def product(
        self,
        leaf: Leaf,
        op: str,
        contracting: Sequence[int],
        x: jax.Array | None,
        choice: Choice | None = None,
        batch: Sequence[int] = (),
        convolution: tuple[Sequence[int], int] = ((), 1),
    ) -> None:
        """Record a product, and hand its activation to the tap.

        Of a convolution there are also the axes of its window, and its feature groups.
        """
        window, groups = convolution
        if isinstance(leaf, Weight):
            path, contracted = leaf.path, leaf.original(contracting)
            window = leaf.original(window)
            stacked = tuple(sorted({*leaf.stacked, *leaf.original(batch)}))
        else:
            leaf = leaf.stack if isinstance(leaf, Layer) else leaf
            path, contracted, stacked = _name(leaf), tuple(contracting), ()
        shape = None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype)
        more = (shape, choice, tuple(window), groups)
        self.uses.append(Use(path, op, contracted, stacked, *more))
        if self.tap is not None and x is not None:
            collected = self.tap(path, x)
            if collected is not None:
                self.taps.setdefault(path, []).append(collected)

    def inside(
        self, fn: Callable[..., Any]
    ) -> Callable[..., tuple[Any, dict[str, list[Any]]]]:
        """Return ``fn`` returning also the taps that were collected while it ran."""

        def framed(*args: Any) -> tuple[Any, dict[str, list[Any]]]:
            outer, self.taps = self.taps, {}
            try:
                out = fn(*args)
                return out, self.taps
            finally:
                self.taps = outer

        return framed

    def keep(self, taps: dict[str, list[Any]]) -> None:
        """Add the taps of an inner frame to this one."""
        for path, collected in taps.items():
            self.taps.setdefault(path, []).extend(collected)

    def float_equation(self, eqn: Any, values: list[Any]) -> Any:
        """Evaluate one equation of one result on arrays."""
        return self.float_equations(eqn, values)[0]

    def float_equations(self, eqn: Any, values: list[Any]) -> list[Any]:
        """Evaluate one equation on arrays (and on watched parameters as such)."""
        arrays = [v.value if isinstance(v, Weight) else v for v in values]
        pairs = zip(eqn.invars, arrays, strict=True)
        env = {v: array for v, array in pairs if _is_var(v)}
        self._flush([eqn], env)
        return [env.get(v) for v in eqn.outvars]

    def _flush(self, pending: list[Any], env: dict[Any, Any]) -> None:
        """Evaluate a run of equations that meet no leaf, as one jaxpr."""
        if not pending:
            return
        made: dict[Any, None] = {}
        needed: dict[Any, None] = {}
        for eqn in pending:
            used = (v for v in eqn.invars if _is_var(v) and v not in made)
            needed.update(dict.fromkeys(used))
            kept = (v for v in eqn.outvars if not isinstance(v, jexc.DropVar))
            made.update(dict.fromkeys(kept))
        run = jexc.Jaxpr(
            (),
            list(needed),
            list(made),
            list(pending),
            frozenset().union(*(eqn.effects for eqn in pending)),
            debug_info=self.debug_info,
        )
        outs = jax.core.eval_jaxpr(run, (), *(env[v] for v in needed))
        env.update(zip(made, outs, strict=True))
        pending.clear()


def is_outer(eqn: Any) -> bool:
    """Whether a ``dot_general`` sums over nothing: a broadcast multiplication."""
    dimensions = eqn.params.get("dimension_numbers")
    return eqn.primitive.name == "dot_general" and not dimensions[0][0]


def _is_var(v: Any) -> bool:
    return not isinstance(v, jexc.Literal)


def _read(env: dict[Any, Any], v: Any) -> Any:
    return env[v] if _is_var(v) else v.val


def _name(q: QTensor) -> str:
    """Return the parameter's path, which is empty for a bare parameter."""
    return "?" if q.name is None else q.name
