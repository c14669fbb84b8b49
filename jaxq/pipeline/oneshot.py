"""Calibrate on the float model, where a weight cannot be reached in sequence."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.lift import product_tapped
from jaxq.lift.product import Product
from jaxq.lift.program import Key
from jaxq.pipeline.checks import is_constant
from jaxq.pipeline.evidence import Evidence, scarcity
from jaxq.pipeline.rows import Layout
from jaxq.pipeline.solve import Task, losses, rounded, solve_task
from jaxq.pipeline.statistics import Seen, empty, merge, updated
from jaxq.pipeline.store import Store, read_leaf
from jaxq.qtensor import QTensor
from jaxq.scales import static_affine

NOTE = "calibrated in one shot on the float model: {why}"


def solve_in_one_shot(
    store: Store,
    params: Any,
    fn: Callable[..., Any] | None,
    batches: Sequence[Sequence[Any]],
) -> list[Evidence]:
    """Solve the weights that the program's groups skip, and settle them.

    Their statistics are summed over all the places where they stand, and over the steps
    of loops. What is never multiplied, or where no tap reaches, is rounded to nearest.
    """
    todo = [path for path in store.skipped if path not in store.done]
    tasks = {path: store.task(Key(path)) for path in todo}
    solved = {
        path
        for path, task in tasks.items()
        if not (store.rows[path].rounds or task.rule.transforms)
    }
    seen_of = {path for path in todo if path in solved or tasks[path].rule.static}
    if not todo or fn is None:
        return []
    seen = _observe(fn, jax.tree.map(read_leaf, params), batches, seen_of)
    out = []
    for path in todo:
        start = time.perf_counter()
        found = _fit(seen.get(path), tasks[path])
        why = store.skipped[path]
        q, evidence = _solve(tasks[path], found, why, path in solved)
        store.settle(Key(path), q)
        seconds = time.perf_counter() - start
        out.append(dataclasses.replace(evidence, seconds=seconds))
    return out


def _observe(
    fn: Callable[..., Any], params: Any, batches: Sequence[Any], paths: set[str]
) -> dict[str, Seen]:
    """Return the statistics of some parameters, over all their products."""

    def tap(product: Product, x: jax.Array, sizes: Any) -> Any:
        if product.use.path not in paths or product.whole is not None:
            return None
        layout = Layout.of(product)
        return updated(empty(x, layout, False), x, layout, None, sizes, None)[0]

    @functools.cache
    def steps(*constants: int) -> Callable[..., dict[str, list[Any]]]:
        return jax.jit(product_tapped(fn, tap), static_argnums=constants)

    total: dict[str, Seen] = {}
    for batch in batches:
        constants = (i for i, x in enumerate(batch, 1) if is_constant(x))
        for path, uses in steps(*constants)(params, *batch).items():
            for use in uses:
                if use is None:
                    continue
                known = total.get(path)
                total[path] = use if known is None else _added(known, use)
    return total


def _added(a: Seen, b: Seen) -> Seen:
    """Return both; a loop's statistics may have to be summed over its steps first."""
    while a.tokens.ndim > b.tokens.ndim:
        a = _over_steps(a)
    while b.tokens.ndim > a.tokens.ndim:
        b = _over_steps(b)
    return merge(a, b)


def _over_steps(seen: Seen) -> Seen:
    """Sum statistics over their leading axis."""
    parts = [jax.tree.map(lambda a, i=i: a[i], seen) for i in range(len(seen.tokens))]
    return functools.reduce(merge, parts)


def _fit(seen: Seen | None, task: Task) -> Seen | None:
    """Return statistics that fit the weight's stack, or None."""
    if seen is None or seen.gram.total.shape[-1] != task.width:
        return None
    while seen.tokens.ndim > len(task.stack):
        seen = _over_steps(seen)
    fits = seen.tokens.shape == task.stack or not seen.tokens.ndim
    return seen if fits else None


def _solve(
    task: Task, seen: Seen | None, why: str, solves: bool
) -> tuple[QTensor, Evidence]:
    """Solve one weight, or round it where nothing was seen or it cannot be solved."""
    name, method = str(task.key), task.rule.method
    if seen is not None and int(jnp.sum(seen.tokens)) == 0:
        seen = None
    if seen is None or not solves:
        reason = f"rounded to nearest: {why}"
        q = _activated(rounded(task), task, seen, why)
        return q, Evidence(name, method, 0, fallback=reason)
    statistics = task.fitted(seen.statistics())
    # no weight before it is quantized yet, so that nothing has moved
    statistics = statistics._replace(drift=jnp.zeros_like(statistics.gram))
    solved = solve_task(task, statistics)
    q = _activated(solved.weight, task, seen, why)
    loss, near = losses(task, q, statistics)
    ok = bool(jnp.all(solved.info.get("ok", jnp.asarray(True))))
    damping = solved.info.get("damping")
    tokens = int(jnp.sum(seen.tokens)) // task.groups
    scarce = scarcity(tokens, statistics.gram.shape[-1])
    return q, Evidence(
        name,
        method,
        tokens,
        float(loss),
        float(near),
        None if damping is None else float(jnp.max(damping)),
        fallback=None if ok else "rounded to nearest: its Gram matrix is unusable",
        note="; ".join(filter(None, (NOTE.format(why=why), scarce))),
    )


def _activated(q: QTensor, task: Task, seen: Seen | None, why: str) -> QTensor:
    """Return the weight with what the recipe says of its activation."""
    q = dataclasses.replace(q, activation=task.rule.activation)
    spec = task.rule.activation
    if not task.rule.static or spec is None:
        return q
    if seen is None:
        raise ValueError(
            f"no activation of {str(task.key)!r} was seen during calibration ({why}), "
            f"so it has no static scale: use a dynamic activation scale for it"
        )
    own = (-2, -1) if task.groups > 1 else -1
    low, high = jnp.min(seen.low, axis=own), jnp.max(seen.high, axis=own)
    scale, zero = static_affine(low, high, spec)
    lengths = [n if a in task.stacked else 1 for a, n in enumerate(task.weight.shape)]

    def fit(values: jax.Array) -> jax.Array:
        return jnp.broadcast_to(values.reshape(lengths if values.ndim else ()), lengths)

    return dataclasses.replace(
        q,
        activation_scale=fit(scale),
        activation_zero=None if zero is None else fit(zero),
    )
