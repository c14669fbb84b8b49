"""Meshes with explicit axes: what happens inside a step is left to the compiler.

On such a mesh (`jax.make_mesh`'s own) arrays say in their types how they lie, and every
reshape, sort or loop would have to say how its result does. Only results say it here.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec


def explicit_mesh(*trees: Any) -> AbstractMesh | None:
    """Return the mesh with explicit axes that some of the arrays lie on, or None."""
    for leaf in jax.tree.leaves(trees):
        mesh = jax.typeof(leaf).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def placed(run: Callable[..., Any], out: Any, *arguments: Any) -> Any:
    """Return ``run(*arguments)``, its results lying as ``out`` says.

    Args:
        run: a pure function of trees of arrays.
        out: shardings, a tree like the result or one for all of it.
        *arguments: with arrays on a mesh with explicit axes.
    """
    on_mesh: Any = jax.sharding.auto_axes(run, out_sharding=out)
    return on_mesh(*arguments)


def replicated(run: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``run(*arguments)``; where types say how arrays lie, it lies everywhere.

    Example:
        >>> import jax.numpy as jnp
        >>> print(replicated(jnp.sort, jnp.array([2, 1])))
        [1 2]
    """
    mesh = explicit_mesh(arguments)
    if mesh is None:
        return run(*arguments)
    return placed(run, NamedSharding(mesh, PartitionSpec()), *arguments)


def split(a: jax.Array, mesh: AbstractMesh) -> tuple[Any, ...]:
    """Return over which axes of a mesh each axis of an array is split, by its type."""
    sharding = jax.typeof(a).sharding
    spec = tuple(sharding.spec) if sharding.mesh == mesh else ()
    return spec + (None,) * (a.ndim - len(spec))
