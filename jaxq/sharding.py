"""Where the arrays of a `QTensor` live on a mesh: like the weight, where possible."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxq.explicit_axes import explicit_mesh, placed, split
from jaxq.qtensor import QTensor, is_qtensor
from jaxq.solvers.base import Solved


def qtensor_shardings(q: QTensor, weight: NamedSharding) -> QTensor:
    """Return the shardings of every array of ``q``, given the weight's own.

    Each array has the weight's rank, so it takes the weight's partition of every axis
    that the mesh divides for it; an axis that does not divide (a few blocks of scales
    over many devices) is replicated. Never an error from a scale.

    Args:
        q: a `QTensor`, real or abstract.
        weight: the sharding of the tensor it stands for.

    Returns:
        A `QTensor` of `jax.sharding.NamedSharding`, as `jax.device_put` takes it.
    """
    entries = tuple(weight.spec) + (None,) * (q.ndim - len(weight.spec))

    def one(a: Any) -> NamedSharding:
        kept = [
            entry if _divides(weight.mesh, entry, length) else None
            for entry, length in zip(entries, a.shape, strict=True)
        ]
        return NamedSharding(weight.mesh, PartitionSpec(*kept))

    return jax.tree.map(one, q)


def shard_like(q: QTensor, weight: Any) -> QTensor:
    """Place ``q`` on the mesh of the array it was made from, if that is on one."""
    sharding = getattr(weight, "sharding", None)
    if isinstance(weight, jax.core.Tracer) or not isinstance(sharding, NamedSharding):
        return q
    return jax.device_put(q, qtensor_shardings(q, sharding))


def shard_params(params: Any, shardings: Any) -> Any:
    """Place parameters on a mesh, and let quantized ones say so to their kernels.

    `jaxq.quantized` then multiplies every device's part of a matrix by itself (see
    `jaxq.ops.parallel`), also under `jax.jit`, which could not cut a kernel.

    Args:
        params: a tree of arrays and `QTensor`s, real or abstract.
        shardings: the same tree of `jax.sharding.NamedSharding`s, as for the float
            parameters; None leaves a parameter where it is.

    Returns:
        The tree, placed; abstract leaves get their sharding.
    """

    def put(leaf: Any, sharding: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    def one(leaf: Any, sharding: NamedSharding | None) -> Any:
        if sharding is None:
            return leaf
        if not is_qtensor(leaf):
            return put(leaf, sharding)
        q = dataclasses.replace(leaf, sharding=None)
        placed = jax.tree.map(put, q, qtensor_shardings(q, sharding))
        short = q.ndim - len(sharding.spec)
        spec = PartitionSpec(*sharding.spec, *(None,) * short)
        return dataclasses.replace(placed, sharding=NamedSharding(sharding.mesh, spec))

    return jax.tree.map(one, params, shardings, is_leaf=is_qtensor)


def solved_on_mesh(solve: Callable[..., Solved], weight: Any, *more: Any) -> Solved:
    """Return ``solve(weight, *more)``, its weight placed like the float one.

    On a mesh with explicit axes (`jax.make_mesh`'s own) every reshape would have to say
    how its result is sharded; the solver leaves that to the compiler.
    """
    mesh = explicit_mesh(weight, more)
    if mesh is None:
        solved = solve(weight, *more)
        return solved._replace(weight=shard_like(solved.weight, weight))
    likes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (weight, *more)
    )
    shapes = jax.eval_shape(solve, *likes)
    sharding: Any = NamedSharding(mesh, PartitionSpec(*split(weight, mesh)))
    everywhere = NamedSharding(mesh, PartitionSpec())
    where = Solved(
        qtensor_shardings(shapes.weight, sharding),
        jax.tree.map(lambda _: everywhere, shapes.info),
        None if shapes.compensated is None else sharding,
    )
    return placed(solve, where, weight, *more)


def _divides(mesh: Any, entry: str | Sequence[str] | None, length: int) -> bool:
    """Whether an axis of ``length`` splits evenly over the mesh axes of ``entry``."""
    if entry is None:
        return False
    names = (entry,) if isinstance(entry, str) else tuple(entry)
    return length > 1 and length % math.prod(mesh.shape[n] for n in names) == 0
