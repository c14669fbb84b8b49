"""Tensor parallelism: a kernel on every device's part of a weight.

A compiler cannot cut a kernel; it can only be told. A weight that says how it lies on a
mesh (`jaxq.shard_params`, or by its type where the mesh's axes are explicit) is
multiplied inside `jax.shard_map`:

- columns split (column parallel): every device makes its columns of the result;
- rows split (row parallel): every device makes a summand, and they are added up.

Rows of the activation are split over the mesh's other axes, where they divide.

On a mesh of automatic axes that says nothing about this weight there is no kernel:
`jax.jit` decides later where it lies. (A mesh that only ``in_shardings`` of `jax.jit`
name is not known while it traces.)
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxq.explicit_axes import explicit_mesh, placed, split
from jaxq.qtensor import QTensor
from pallas_kernels.kernel import Operands, Problem

Axes = tuple[str, ...]
UNKNOWN = (
    "on the mesh {} it is not known how the weight lies: place it with "
    "jaxq.shard_params, or use explicit axes"
)


def placement(w: QTensor, x: jax.Array) -> NamedSharding | str | None:
    """Return how ``w`` lies on a mesh, or why that is not known; None on one device.

    Args:
        w: the weight, perhaps a stack.
        x: the activation that it meets.
    """
    if w.sharding is not None:
        return w.sharding
    mesh = divided_mesh(w.codes, x)
    if mesh is None:
        return None
    if set(mesh.axis_types) != {AxisType.Explicit}:
        return UNKNOWN.format(dict(mesh.shape))
    codes = jax.typeof(w.codes).sharding
    spec = codes.spec if _divided(codes.mesh) else (None,) * w.ndim
    if any(entry is not None for entry in spec[:-2]):
        return f"the stack is split over {dict(mesh.shape)}: {spec}"
    return NamedSharding(mesh, PartitionSpec(*spec))


def left_to_the_compiler(
    run: Callable[..., jax.Array], x: jax.Array, weight: tuple[QTensor, Any]
) -> jax.Array:
    """Return ``run(x, weight)``, ``[M, N]``, in plain XLA, on any mesh.

    On a mesh with explicit axes each step of a loop over tiles would have to say how
    its result is sharded. Here only the product does: its rows as the activation's, its
    columns as the weight's.
    """
    q, _ = weight
    mesh = explicit_mesh(x, q.codes)
    if mesh is None:
        return run(x, weight)
    rows, columns = split(x, mesh)[-2], split(q.codes, mesh)[-1]
    if q.layout != "planar" or set(_axes(rows)) & set(_axes(columns)):
        columns = None
    lies = NamedSharding(mesh, PartitionSpec(rows, columns))
    return placed(run, lies, x, weight)


def divided_mesh(*arrays: jax.Array) -> AbstractMesh | None:
    """Return the mesh over which a compiler would have to split a kernel, or None.

    Args:
        *arrays: what the kernel is given. The types of some name a mesh, that of others
            none, and the context may know one that no type names.
    """
    meshes = [jax.typeof(a).sharding.mesh for a in arrays]
    meshes.append(jax.sharding.get_abstract_mesh())
    return next((mesh for mesh in meshes if _divided(mesh)), None)


def _divided(mesh: Any) -> bool:
    """Whether there are axes that a compiler would have to split a kernel over."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = [name for name, kind in kinds if kind != AxisType.Manual]
    return math.prod(mesh.shape[name] for name in free) > 1


@dataclasses.dataclass(frozen=True)
class Split:
    """How a product is split over a mesh.

    Attributes:
        mesh: the devices.
        rows: mesh axes over which the rows of the activation are split.
        inner: mesh axes over which the weight's rows are split.
        columns: mesh axes over which its columns are.
    """

    mesh: Mesh | AbstractMesh
    rows: Axes
    inner: Axes
    columns: Axes

    @classmethod
    def of(cls, sharding: Any, rows: int) -> "Split | None":
        """Return the split of ``x[rows, K] @ w``, or None when it is not split.

        Args:
            sharding: the `jax.sharding.NamedSharding` of the weight, or None.
            rows: of the activation.
        """
        if sharding is None or _is_local(sharding.mesh):
            return None
        inner, columns = (_axes(entry) for entry in tuple(sharding.spec)[-2:])
        free = tuple(a for a in sharding.mesh.axis_names if a not in (*inner, *columns))
        split = cls(sharding.mesh, free, inner, columns)
        if rows % split.ways(free):
            split = dataclasses.replace(split, rows=())
        return split

    def ways(self, axes: Axes) -> int:
        """Return into how many parts ``axes`` split."""
        return math.prod(self.mesh.shape[a] for a in axes)

    def local(self, p: Problem) -> Problem:
        """Return the facts of one device's part."""
        inner = p.inner // self.ways(self.inner)
        return dataclasses.replace(
            p,
            rows=p.rows // self.ways(self.rows),
            inner=inner,
            columns=p.columns // self.ways(self.columns),
            group=inner if p.group == p.inner else p.group,
            out_dtype="float32" if self.inner else p.out_dtype,
        )

    def declines(self, p: Problem, padding: int) -> str | None:
        """Return why a product does not split evenly, or None.

        Args:
            p: its facts.
            padding: rows that only the codes have, at their end.
        """
        n = self.ways(self.inner)
        if n > 1 and padding:
            return f"{padding} rows that only fill up the codes cannot be split"
        if p.inner % n or p.columns % self.ways(self.columns):
            return f"{p.inner}x{p.columns} does not split over {dict(self.mesh.shape)}"
        if p.group < p.inner and (p.inner // n) % p.group:
            return f"groups of {p.group} are cut by {n} parts of {p.inner} rows"
        return None

    def run(
        self, kernel: Callable[[Problem, Operands], jax.Array], p: Problem, a: Operands
    ) -> jax.Array:
        """Run ``kernel`` on every device's part: ``[M, N]``."""
        local, specs = self.local(p), self._specs(p, a)
        names = [
            f.name for f in dataclasses.fields(a) if getattr(a, f.name) is not None
        ]

        def part(*arrays: jax.Array) -> jax.Array:
            y = kernel(local, Operands(**dict(zip(names, arrays, strict=True))))
            return jax.lax.psum(y, self.inner) if self.inner else y

        y = jax.shard_map(
            part,
            mesh=self.mesh,
            in_specs=tuple(specs[name] for name in names),
            out_specs=PartitionSpec(self.rows, self.columns),
            check_vma=False,
        )(*(self._placed(getattr(a, name), specs[name]) for name in names))
        return y.astype(jnp.dtype(p.out_dtype))

    def _placed(self, a: jax.Array, spec: PartitionSpec) -> jax.Array:
        """Return an operand where `jax.shard_map` wants it, which its type must say."""
        if AxisType.Explicit not in self.mesh.axis_types:
            return a
        return jax.sharding.reshard(a, NamedSharding(self.mesh, spec))

    def _specs(self, p: Problem, a: Operands) -> dict[str, PartitionSpec]:
        """Return how every operand is split."""
        lead = (None,) * (a.codes.ndim - 2)
        groups = self.inner if p.group < p.inner else None
        columns = self.columns if a.scales.shape[-1] > 1 else None
        per_group = PartitionSpec(*lead, groups, columns)
        return {
            "x": PartitionSpec(self.rows, self.inner),
            "codes": PartitionSpec(*lead, self.inner, self.columns),
            "scales": per_group,
            "zeros": per_group,
            "x_scale": PartitionSpec(self.rows, None),
            "layer": PartitionSpec(),
        }


def _axes(entry: Any) -> Axes:
    """Return the mesh axes of one entry of a partition."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _is_local(mesh: Mesh) -> bool:
    """Whether this is traced inside a `jax.shard_map` over the mesh's axes already."""
    here = jax.sharding.get_abstract_mesh()
    manual = {
        name
        for name, kind in zip(here.axis_names, here.axis_types, strict=True)
        if kind == AxisType.Manual
    }
    return bool(manual & set(mesh.axis_names)) or mesh.size == 1
