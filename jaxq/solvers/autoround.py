"""AutoRound: rounding and ranges learned by sign descent on a block's output."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.qtensor import QTensor
from jaxq.solvers.relaxation import (
    Ranges,
    Variables,
    anchored,
    neutral,
    relaxed,
    settled,
)

PyTree = Any
Weights = dict[str, Any]
Run = Callable[[Weights, PyTree], PyTree]

# a block's range may shrink to a quarter and double
SMALLEST, LARGEST = 0.25, 2.0


class Problem(NamedTuple):
    """One weight to tune.

    Attributes:
        weight: float32, what is rounded: best what GPTQ made of the original
            (`Solved.compensated`). Where its nearest code is not the one of ``start``,
            the element begins as ``start`` has it.
        start: the quantized weight to start from.
    """

    weight: jax.Array
    start: QTensor


class Samples(NamedTuple):
    """What a block is tuned on: ``B`` batches of one shape, on a leading axis.

    Attributes:
        inputs: what the block gets from the quantized prefix, leaves ``[B, ...]``.
        targets: what the float block makes of the float stream, leaves ``[B, ...]``.
        mask: how much an element of the targets counts, of their structure, leaves
            ``[B, ...]`` where trailing axes may be missing. 0 for padding. None: all
            alike.
    """

    inputs: PyTree
    targets: PyTree
    mask: PyTree = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long, how fast, and on how much to tune.

    Attributes:
        steps: of descent.
        lr: the first step of ``v``, in gaps between codes; decays linearly to 0. With
            ``1 / steps`` all steps together are half a gap, which reaches every
            neighbour: AutoRound's choice, which starts from rounding to nearest.
        range_lr: the first step of a range, relative.
        batch: how many of the batches of `Samples` a step sees.
        momentum: of the gradient, before its sign is taken.
        checks: how often the loss is judged, to keep the best.
        ranges: what is learned of the blocks' ranges; see `neutral`. With "scale"
            codes stay what GPTQ arranged; from rounding to nearest "ends" gain more.

    Raises:
        ValueError: naming the field, its value and what it may be.
    """

    steps: int = 100
    lr: float = 0.005
    range_lr: float = 0.001
    batch: int = 8
    momentum: float = 0.9
    checks: int = 5
    ranges: Ranges = "scale"

    def __post_init__(self) -> None:
        """Reject what could tune nothing."""
        for name in ("steps", "batch", "checks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("lr", "range_lr"):
            rate = getattr(self, name)
            if not isinstance(rate, float | int) or not 0 < rate <= 1:
                raise ValueError(f"{name}={rate!r} must be a number in (0, 1]")
        if self.ranges not in get_args(Ranges):
            raise ValueError(f"ranges={self.ranges!r} is not one of {get_args(Ranges)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must lie in [0, 1)")


TUNING = frozenset(field.name for field in dataclasses.fields(Settings))


class Tuned(NamedTuple):
    """What `tune` returns. Losses are relative: squared error over squared target.

    Attributes:
        weights: the tuned weights by name.
        start_loss: of the start, on what judges.
        best_loss: of ``weights``, on what judges: at most ``start_loss``.
        best_step: how many steps led to ``weights``; 0: nothing beat the start.
        losses: ``float32[steps]``, of every step's batches before the step.
        checked: ``float32[checks]``, on what judges, while tuning.
    """

    weights: dict[str, QTensor]
    start_loss: jax.Array
    best_loss: jax.Array
    best_step: jax.Array
    losses: jax.Array
    checked: jax.Array


def tune(
    run: Run,
    problems: Mapping[str, Problem],
    samples: Samples,
    settings: Settings = Settings(),
    *,
    fixed: Weights | None = None,
    held: Samples | None = None,
    key: jax.Array,
) -> Tuned:
    """Tune the weights of one block so that its output is the float block's.

    ``min over v, α, β, γ of ‖run(ŵ, x) − y‖² / ‖y‖²`` by steps along the sign of the
    gradient, with ``ŵ`` of `relaxed`, ``v`` kept in [−½, ½]. What is stored is what is
    optimized: scales are rounded to their dtype and zeros to integers in every step. At
    the start and ``checks`` times the loss is judged, on samples that were held out or
    on all, and the best of those is returned, so that tuning never makes it worse.

    Everything is one compiled scan. A second block compiles nothing if ``run`` is the
    same object, the names are the same, and shapes, specs and settings are equal.

    Args:
        run: ``run(weights, x)``, the output of the block for one batch ``x``, without
            its leading axis; differentiable in the float32 ``weights``.
        problems: the weights to tune, by the names that ``run`` knows.
        samples: the batches.
        settings: how.
        fixed: further weights that ``run`` knows, passed on as they are.
        held: what judges instead of ``samples``: batches of their shape that no step
            sees.
        key: decides the order of the batches.

    Raises:
        ValueError: without a problem or a batch; when shapes disagree; when a name is
            both tuned and fixed.

    Example:
        >>> from jaxq.quantize import quantize
        >>> from jaxq.spec import QuantSpec
        >>> w = jnp.sin(jnp.arange(64.0)).reshape(16, 4)
        >>> x = jnp.cos(jnp.outer(jnp.arange(8.0), jnp.arange(16.0)))[None]
        >>> problem = Problem(w, quantize(w, QuantSpec("int3", block=16)))
        >>> run = lambda weights, x: x @ weights["w"]
        >>> tuned = tune(run, {"w": problem}, Samples(x, x @ w), key=jax.random.key(0))
        >>> bool(tuned.best_loss < tuned.start_loss)
        True

    References:
        Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for
        the Quantization of LLMs", section 3. That keeps the best batch, seen by
        chance, and learns the ends of ranges; see `jaxq.solvers.relaxation`.
    """
    fixed = fixed or {}
    _check(problems, samples, fixed)
    if held is not None:
        _check(problems, held, fixed)
    # a name is part of a compiled function's key, and every layer's is another
    nameless = {
        name: Problem(p.weight, dataclasses.replace(p.start, name=None))
        for name, p in problems.items()
    }
    tuned = _tune(run, nameless, samples, settings, fixed, held, key)
    named = {
        name: dataclasses.replace(q, name=problems[name].start.name)
        for name, q in tuned.weights.items()
    }
    return tuned._replace(weights=named)


@functools.partial(jax.jit, static_argnames=("run", "settings"))
def _tune(
    run: Run,
    problems: dict[str, Problem],
    samples: Samples,
    settings: Settings,
    fixed: Weights,
    held: Samples | None,
    key: jax.Array,
) -> Tuned:
    """Tune, traced and compiled once per shape."""
    block = _Block.of(run, problems, samples, fixed)
    judge = block if held is None else block.on(held)
    starts = {name: problem.start for name, problem in problems.items()}
    variables = {name: neutral(q, settings.ranges) for name, q in starts.items()}
    best = _Best(variables, judge.error(variables), jnp.int32(0))
    start_loss = best.loss

    def step(state: Any, now: _Step) -> tuple[Any, Any]:
        variables, velocity, best = state
        loss, gradient = block.slope(variables, now.chosen)
        velocity = jax.tree.map(
            lambda m, g: settings.momentum * m + g, velocity, gradient
        )
        variables = _descend(variables, velocity, now)
        best, checked = lax.cond(
            now.check, judge.compare, _skip, best, variables, now.number
        )
        return (variables, velocity, best), (loss, checked)

    velocity = jax.tree.map(jnp.zeros_like, variables)
    steps = _schedule(settings, block.batches, key)
    (_, _, best), (losses, checked) = lax.scan(step, (variables, velocity, best), steps)
    weights = {
        name: settled(block.anchors[name], q, best.variables[name])
        for name, q in starts.items()
    }
    checked = checked[np.flatnonzero(_checks(settings))]
    return Tuned(weights, start_loss, best.loss, best.step, losses, checked)


class _Best(NamedTuple):
    """The best variables so far, their error as judged, and after which step."""

    variables: dict[str, Variables]
    loss: jax.Array
    step: jax.Array


class _Step(NamedTuple):
    """What differs between steps: its batches, rates, and whether it is checked."""

    number: jax.Array
    chosen: jax.Array
    rate: jax.Array
    range_rate: jax.Array
    check: jax.Array


@dataclasses.dataclass(frozen=True)
class _Block:
    """The error of a block's output as a function of the variables."""

    run: Run
    problems: dict[str, Problem]
    samples: Samples
    fixed: Weights
    anchors: dict[str, jax.Array]
    energy: list[jax.Array]

    @classmethod
    def of(
        cls,
        run: Run,
        problems: dict[str, Problem],
        samples: Samples,
        fixed: Weights,
    ) -> "_Block":
        """Anchor the weights, and take the energy of the targets."""
        anchors = {name: anchored(*problem) for name, problem in problems.items()}
        return cls(run, problems, samples, fixed, anchors, _energy(samples))

    def on(self, samples: Samples) -> "_Block":
        """Return the same of other samples."""
        return dataclasses.replace(self, samples=samples, energy=_energy(samples))

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return len(jax.tree.leaves(self.samples.targets)[0])

    def weights(self, variables: dict[str, Variables]) -> Weights:
        """Return the weights at a point, differentiable."""
        return {
            name: relaxed(self.anchors[name], problem.start, variables[name])
            for name, problem in self.problems.items()
        }

    def batch_error(self, weights: Weights, batch: Samples) -> jax.Array:
        """Return a batch's squared error over the mean batch's squared target."""
        outputs = self.run({**self.fixed, **weights}, batch.inputs)
        difference = jax.tree.map(_minus, outputs, batch.targets)
        squares = _squares(difference, batch.mask)
        parts = [a / b for a, b in zip(squares, self.energy, strict=True)]
        return sum(parts[1:], parts[0]) / len(parts)

    def error(self, variables: dict[str, Variables]) -> jax.Array:
        """Return the mean error of all batches."""
        each = functools.partial(self.batch_error, self.weights(variables))
        return jnp.mean(lax.map(each, self.samples))

    def slope(
        self, variables: dict[str, Variables], chosen: jax.Array
    ) -> tuple[jax.Array, dict[str, Variables]]:
        """Return the mean error of some batches, and the gradient of their sum."""
        weights, pull_back = jax.vjp(lambda v: _transposed(self.weights(v)), variables)

        def of_batch(weights: Weights, batch: Samples) -> jax.Array:
            return self.batch_error(_transposed(weights), batch)

        def add(total: Any, index: jax.Array) -> tuple[Any, None]:
            batch = jax.tree.map(lambda a: a[index], self.samples)
            one = jax.value_and_grad(of_batch)(weights, batch)
            return jax.tree.map(jnp.add, total, one), None

        nothing = jnp.float32(0), jax.tree.map(jnp.zeros_like, weights)
        (error, gradient), _ = lax.scan(add, nothing, chosen)
        (gradient,) = pull_back(gradient)
        return error / len(chosen), gradient

    def compare(
        self, best: _Best, variables: dict[str, Variables], number: jax.Array
    ) -> tuple[_Best, jax.Array]:
        """Return the better of the best and these variables, and the error of these."""
        now = _Best(variables, self.error(variables), number)
        choose = functools.partial(jnp.where, now.loss < best.loss)
        return jax.tree.map(choose, now, best), now.loss


def _skip(best: _Best, variables: Any, number: jax.Array) -> tuple[_Best, jax.Array]:
    """Return what `_Block.compare` returns, of a step that is not checked."""
    return best, jnp.float32(jnp.nan)


def _descend(
    variables: dict[str, Variables], direction: dict[str, Variables], now: _Step
) -> dict[str, Variables]:
    """Take a step along the sign, within bounds."""

    def move(x: Any, d: Any, rate: jax.Array, low: float, high: float) -> Any:
        return None if x is None else jnp.clip(x - rate * jnp.sign(d), low, high)

    return {
        name: Variables(
            move(x.rounding, direction[name].rounding, now.rate, -0.5, 0.5),
            *(
                move(a, d, now.range_rate, SMALLEST, LARGEST)
                for a, d in zip(x[1:], direction[name][1:], strict=True)
            ),
        )
        for name, x in variables.items()
    }


def _checks(settings: Settings) -> np.ndarray:
    """Return after which steps the loss is judged: the last, and evenly."""
    marks = np.arange(1, settings.steps + 1) * settings.checks // settings.steps
    return np.diff(marks, prepend=0) > 0


def _schedule(settings: Settings, batches: int, key: jax.Array) -> _Step:
    """Return the steps, stacked: every batch once before any is seen again."""
    steps, size = settings.steps, min(settings.batch, batches)
    rounds = -(-steps * size // batches)
    order = jax.vmap(lambda k: jax.random.permutation(k, batches))
    chosen = order(jax.random.split(key, rounds)).reshape(-1)[: steps * size]
    decay = 1 - jnp.arange(steps, dtype=jnp.float32) / steps
    return _Step(
        number=jnp.arange(1, steps + 1, dtype=jnp.int32),
        chosen=chosen.reshape(steps, size),
        rate=jnp.float32(settings.lr) * decay,
        range_rate=jnp.float32(settings.range_lr) * decay,
        check=jnp.asarray(_checks(settings)),
    )


def _energy(samples: Samples) -> list[jax.Array]:
    """Return the mean batch's sum of squares, of every leaf of the targets."""
    energy = lax.map(lambda s: _squares(s.targets, s.mask), samples)
    return jax.tree.map(jnp.mean, energy)


def _transposed(weights: Weights) -> Weights:
    """Return the weights with their last two axes swapped.

    A gradient of these is the product that JAX writes for a weight without the swap
    that follows it. On CPUs that takes a fifth off a step.
    """
    return {
        name: jnp.swapaxes(w, -1, -2) if w.ndim > 1 else w
        for name, w in weights.items()
    }


def _minus(output: jax.Array, target: jax.Array) -> jax.Array:
    """Return the difference in float32."""
    return output.astype(jnp.float32) - target.astype(jnp.float32)


def _squares(tree: PyTree, mask: PyTree) -> list[jax.Array]:
    """Return the sum of squares of every leaf, weighted by the mask's."""

    def total(x: jax.Array, weight: jax.Array | None) -> jax.Array:
        squares = jnp.square(x.astype(jnp.float32))
        if weight is not None:
            weight = weight.reshape(weight.shape + (1,) * (x.ndim - weight.ndim))
            squares = squares * weight.astype(jnp.float32)
        return jnp.sum(squares)

    leaves = jax.tree.leaves(tree)
    weights = [None] * len(leaves) if mask is None else jax.tree.leaves(mask)
    return [total(x, weight) for x, weight in zip(leaves, weights, strict=True)]


def _check(problems: Mapping[str, Problem], samples: Samples, fixed: Weights) -> None:
    """Raise unless there is something to tune, and something to tune it on."""
    if not problems:
        raise ValueError("problems is empty: give at least one weight to tune")
    for name, (weight, start) in problems.items():
        if weight.shape != start.shape:
            raise ValueError(
                f"the weight {name!r} has shape {weight.shape} and its start "
                f"{start.shape}: give what the start was made of"
            )
    both = sorted(set(problems) & set(fixed))
    if both:
        raise ValueError(f"{both} are both tuned and fixed: give each name once")
    lengths = {len(leaf) for leaf in jax.tree.leaves(samples)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"the leaves of samples have leading axes of {sorted(lengths)}: give the "
            f"same number of batches, at least 1, in inputs, targets and mask"
        )
