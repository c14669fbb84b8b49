"""Weights that are solved as one are the weights solved one by one."""

import jax
import jax.numpy as jnp
import pytest

from jaxq import Rule, autoround, gptq, rtn
from jaxq.lift.program import Key
from jaxq.pipeline import beside
from jaxq.pipeline.beside import solve_all
from jaxq.pipeline.solve import Task, solve_task
from jaxq.solvers.base import Statistics
from jaxq.spec import QuantSpec

SPEC = QuantSpec("uint3", 16, symmetric=False, scale="bfloat16")


def task(name, columns=24, method=None, seed=0):
    rule = Rule("*", SPEC, solver=gptq(sweeps=1) if method is None else method)
    w = jax.random.normal(jax.random.key(seed), (64, columns))
    return Task(Key(name), rule, (0,), (), w)


def seen():
    x = jax.random.normal(jax.random.key(9), (256, 64))
    x = x @ jax.random.normal(jax.random.key(8), (64, 64))
    return Statistics(x.T @ x, jnp.int32(256))


def solved_shapes(monkeypatch):
    """The shapes of what is solved from now on, as they come."""
    shapes = []

    def counted(one, statistics):
        shapes.append(one.weight.shape)
        return solve_task(one, statistics)

    monkeypatch.setattr(beside, "solve_task", counted)
    return shapes


@pytest.mark.parametrize(
    "method", [None, autoround(), rtn(clip="importance")], ids=["gptq", "tuned", "rtn"]
)
def test_each_is_what_it_is_alone(method, monkeypatch):
    tasks = [task(n, method=method, seed=i) for i, n in enumerate("abc")]
    tasks.append(task("wide", columns=40, method=method, seed=7))
    given = {one.key: one for one in tasks}
    calls = solved_shapes(monkeypatch)
    found = solve_all(given, dict.fromkeys(given, seen()))
    assert calls == [(64, 72), (64, 40)]
    assert list(found) == list(given)
    for key, one in given.items():
        alone = solve_task(one, seen())
        a, b = found[key].weight, alone.weight
        assert jax.tree.structure(a) == jax.tree.structure(b)
        # sums in another order may move a value that lies between two codes
        same = jnp.mean(a.dequantize() == b.dequantize())
        assert same > 0.98
        if alone.compensated is not None:
            assert found[key].compensated.shape == one.weight.shape


def test_what_differs_is_solved_alone(monkeypatch):
    other = task("c", method=gptq(damping=0.1), seed=2)
    given = {one.key: one for one in (task("a"), task("b", seed=1), other)}
    seen_by = []
    monkeypatch.setattr(
        beside, "solve_task", lambda t, s: seen_by.append(t) or solve_task(t, s)
    )
    solve_all(given, dict.fromkeys(given, seen()))
    assert [t.weight.shape[1] for t in seen_by] == [48, 24]
    monkeypatch.setattr(beside, "MOST_ELEMENTS", 64 * 24)
    seen_by.clear()
    solve_all(given, dict.fromkeys(given, seen()))
    assert [t.weight.shape[1] for t in seen_by] == [24, 24, 24]


def test_wide_weights_are_solved_square_by_square(monkeypatch):
    monkeypatch.setattr(beside, "LEAST_ROWS", 64)
    wide = task("wide", columns=128, method=autoround(), seed=3)
    given = {t.key: t for t in (wide, task("square", columns=64, method=autoround()))}
    calls = solved_shapes(monkeypatch)
    found = solve_all(given, dict.fromkeys(given, seen()))
    assert calls == [(64, 64)] * 3
    for key, one in given.items():
        alone = solve_task(one, seen())
        a, b = found[key].weight, alone.weight
        assert jax.tree.structure(a) == jax.tree.structure(b)
        assert jnp.mean(a.dequantize() == b.dequantize()) > 0.98
        moved = jnp.abs(found[key].compensated - alone.compensated)
        assert jnp.mean(moved < 1e-3) > 0.98
