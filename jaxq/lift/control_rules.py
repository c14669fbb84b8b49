"""Control flow with leaves inside: calls, checkpoints, scans, loops and branches."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.layer import Layer, layer_of
from jaxq.lift.leaf import is_leaf
from jaxq.qtensor import QTensor

if TYPE_CHECKING:
    from jaxq.lift.replay import Replay


def call(replay: "Replay", eqn: Any, values: list[Any]) -> list[Any]:
    """Replay the body of a ``jit`` (or the like) in place."""
    return replay.run(_body(eqn), values)


def custom_jvp(replay: "Replay", eqn: Any, values: list[Any]) -> list[Any]:
    """Replay the body, and keep the function's own derivative rule."""
    if not _keeps_rule(replay, values):
        return call(replay, eqn, values)
    fused, floats = _two_ways(replay, eqn)
    fused = jax.custom_jvp(fused)
    fused.defjvp(lambda primals, tangents: jax.jvp(floats, primals, tangents))
    return fused(*values)


def custom_vjp(replay: "Replay", eqn: Any, values: list[Any]) -> list[Any]:
    """Replay the body, and keep the function's own derivative rule."""
    if not _keeps_rule(replay, values):
        return call(replay, eqn, values)
    fused, floats = _two_ways(replay, eqn)
    fused = jax.custom_vjp(fused)
    fused.defvjp(lambda *inputs: jax.vjp(floats, *inputs), lambda vjp, out: vjp(out))
    return fused(*values)


def _keeps_rule(replay: "Replay", values: list[Any]) -> bool:
    """Whether to keep a derivative rule: not while only looking at a function."""
    return replay.tap is None and any(isinstance(v, QTensor | Layer) for v in values)


def _two_ways(
    replay: "Replay", eqn: Any
) -> tuple[Callable[..., list[Any]], Callable[..., list[Any]]]:
    """Return a call on packed codes, and the original on dequantized weights.

    The second has the function's own derivative rule, which was written for arrays; so
    it serves differentiation, and the first everything else.
    """

    def fused(*inputs: Any) -> list[Any]:
        name = eqn.primitive.name
        return replay.arrays(replay.run(_body(eqn), inputs), f"{name} output")

    def floats(*inputs: Any) -> list[Any]:
        taken = [x.taken() if isinstance(x, Layer) else x for x in inputs]
        arrays = [x.dequantize() if isinstance(x, QTensor) else x for x in taken]
        return replay.float_equations(eqn, arrays)

    return fused, floats


def checkpoint(replay: "Replay", eqn: Any, values: list[Any]) -> list[Any]:
    """Replay the body under `jax.checkpoint`, with the same policy."""
    body = replay.inside(lambda *inputs: replay.run(_body(eqn), inputs))
    kept = {k: eqn.params[k] for k in ("prevent_cse", "policy") if k in eqn.params}
    outs, taps = jax.checkpoint(body, **kept)(*values)
    replay.keep(taps)
    return outs


def scan(replay: "Replay", eqn: Any, values: list[Any]) -> list[Any]:
    """Replay a scan: leaves among constants stay whole, stacked ones are sliced.

    A stack that a kernel takes whole is not: every step gets its index instead.
    """
    body = eqn.params["jaxpr"]
    inner = getattr(body, "jaxpr", body)
    consts, carried, stacks = scan_arity(eqn, values)
    n_carry = len(carried)
    fixed = _invariant(carried, inner.invars[len(consts) :], inner.outvars)
    moving = [c for i, c in enumerate(carried) if i not in fixed]
    moving = replay.arrays(moving, "scan carry")
    whole = {i: s for i, s in enumerate(stacks) if _goes_whole(s)}
    sliced = [s for i, s in enumerate(stacks) if i not in whole]

    def step(carry: Any, xs: Any) -> tuple[Any, Any]:
        (index, xs), state = xs, _insert(carry, fixed)
        layers = {i: layer_of(stack, index) for i, stack in whole.items()}
        outs = replay.run(body, [*consts, *state, *_insert(xs, layers)])
        new = [c for i, c in enumerate(outs[:n_carry]) if i not in fixed]
        new = replay.arrays(new, "scan carry")
        return new, replay.arrays(outs[n_carry:], "scan output")

    def tapped(carry: Any, xs: Any) -> tuple[Any, Any]:
        (new, ys), taps = replay.inside(step)(carry, xs)
        return new, (ys, taps)

    kept = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
    indices = jnp.arange(eqn.params["length"], dtype=jnp.int32)
    carry, (ys, taps) = lax.scan(tapped, moving, (indices, sliced), **kept)
    replay.keep(taps)
    return [*_insert(carry, fixed), *ys]


def while_loop(replay: "Replay", eqn: Any, values: list[Any]) -> list[Any]:
    """Replay a while loop; activations inside are not tapped (who knows how many)."""
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    cond_consts, body_consts = values[:n_cond], values[n_cond : n_cond + n_body]
    carried = values[n_cond + n_body :]
    inner = getattr(body, "jaxpr", body)
    fixed = _invariant(carried, inner.invars[n_body:], inner.outvars)
    moving = [c for i, c in enumerate(carried) if i not in fixed]
    moving = replay.arrays(moving, "while carry")

    def go_on(carry: list[Any]) -> Any:
        outs, _ = replay.inside(replay.run)(
            cond, [*cond_consts, *_insert(carry, fixed)]
        )
        return replay.arrays(outs, "while condition")[0]

    def step(carry: list[Any]) -> list[Any]:
        outs, _ = replay.inside(replay.run)(
            body, [*body_consts, *_insert(carry, fixed)]
        )
        new = [c for i, c in enumerate(outs) if i not in fixed]
        return replay.arrays(new, "while carry")

    return _insert(lax.while_loop(go_on, step, moving), fixed)


def cond(replay: "Replay", eqn: Any, values: list[Any]) -> list[Any]:
    """Replay both branches; activations inside are not tapped (one may not run)."""
    index, operands = values[0], values[1:]

    def branch(body: Any) -> Callable[..., list[Any]]:
        def run(*inputs: Any) -> list[Any]:
            outs, _ = replay.inside(replay.run)(body, inputs)
            return replay.arrays(outs, "cond output")

        return run

    return lax.switch(index, [branch(b) for b in eqn.params["branches"]], *operands)


CONTROL_RULES: dict[str, Callable[..., list[Any]]] = {
    "jit": call,
    "pjit": call,
    "closed_call": call,
    "core_call": call,
    "custom_jvp_call": custom_jvp,
    "custom_vjp_call": custom_vjp,
    "checkpoint": checkpoint,
    "remat": checkpoint,
    "remat2": checkpoint,
    "scan": scan,
    "while": while_loop,
    "cond": cond,
}


def scan_arity(
    eqn: Any, values: Sequence[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    """Return a scan's operands as constants, carried values and scanned values.

    The arity is read from shapes, because the parameters' names differ between
    versions of JAX: a carry has one shape inside and outside, a scanned value lost its
    leading axis.
    """
    body = eqn.params["jaxpr"]
    inner = getattr(body, "jaxpr", body)
    n_carry = _same(inner.outvars, eqn.outvars)
    n_consts = _same(inner.invars, eqn.invars) - n_carry
    rest = list(values[n_consts:])
    return list(values[:n_consts]), rest[:n_carry], rest[n_carry:]


def _body(eqn: Any) -> Any:
    """Return the jaxpr of a call; its parameter's name depends on the primitive."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    return next(eqn.params[name] for name in names if name in eqn.params)


def _same(inside: Sequence[Any], outside: Sequence[Any]) -> int:
    """Count the values of equal shape on both sides of a loop's body."""
    pairs = zip(inside, outside, strict=True)
    return sum(a.aval.shape == b.aval.shape for a, b in pairs)


def _invariant(
    carried: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any]
) -> dict[int, Any]:
    """Return the carried leaves that the body hands on untouched, by position."""
    return {
        i: value
        for i, value in enumerate(carried)
        if is_leaf(value) and outputs[i] is inputs[i]
    }


def _goes_whole(stack: Any) -> bool:
    """Whether a scanned value is a stack that kernels index themselves."""
    return isinstance(stack, QTensor) and layer_of(stack, jnp.int32(0)) is not None


def _insert(moving: Sequence[Any], fixed: dict[int, Any]) -> list[Any]:
    """Put the untouched leaves back among the carried (or scanned) values."""
    out = list(moving)
    for position in sorted(fixed):
        out.insert(position, fixed[position])
    return out
