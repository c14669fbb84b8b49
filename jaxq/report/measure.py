"""The numbers of a report: errors per matrix, histograms, outliers."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.lift import Site, sites, tapped
from jaxq.metrics import relative_error
from jaxq.ops.activation import picked_input, quantized_input, scaled_input
from jaxq.qtensor import QTensor, is_qtensor
from jaxq.report.content import (
    OUTLIER_SIGMAS,
    Channels,
    Distribution,
    MatrixError,
)

BINS = 97  # odd: one of them is around zero
Arrays = Mapping[str, jax.Array]


def capture_activations(
    forward: Callable[..., Any], params: Any, tokens: jax.Array, rows: int = 512
) -> dict[str, jax.Array]:
    """Return the inputs of every product, ``[rows, channels]``, by parameter path.

    Args:
        forward: ``forward(params, tokens)``, the float function.
        params: float parameters.
        tokens: ``int32[B, T]``.
        rows: at most so many tokens of each, evenly spaced.
    """

    def tap(path: str, x: jax.Array) -> jax.Array:
        flat = x.reshape(-1, x.shape[-1])
        return flat[:: max(flat.shape[0] // rows, 1)][:rows]

    found = jax.jit(tapped(forward, tap))(params, tokens)
    return {path: uses[0] for path, uses in found.items()}


def matrix_errors(
    recipe: str,
    forward: Callable[..., Any],
    params: Any,
    qparams: Any,
    activations: Arrays,
) -> list[MatrixError]:
    """Return what quantization cost each matrix, in its values and in its outputs.

    Args:
        recipe: its name.
        forward: the float function.
        params: float parameters.
        qparams: the same, quantized.
        activations: of `capture_activations`.
    """
    axes = _contracted(sites(forward, params, jnp.zeros((1, 8), jnp.int32)))
    exact, rounded = _by_path(params), _by_path(qparams)
    chosen = [p for p in activations if p in axes and is_qtensor(rounded[p])]
    found = _errors_of(
        tuple((path, axes[path]) for path in chosen),
        {path: exact[path] for path in chosen},
        {path: activations[path] for path in chosen},
        _read_back(
            {p: rounded[p] for p in chosen}, {p: activations[p] for p in chosen}
        ),
    )
    return [
        MatrixError(recipe, path, *place(path), *map(float, found[path]))
        for path in chosen
    ]


@jax.jit
def _read_back(
    rounded: Mapping[str, QTensor], inputs: Arrays
) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
    """Return each weight as it reads back, and the two operands of its product."""

    def one(q: QTensor, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        picked, w = picked_input(x.astype(jnp.float32), q)
        scaled, w = scaled_input(picked, w)
        seen = quantized_input(scaled, w)
        return q.dequantize(jnp.float32), seen, w.dequantize(jnp.float32)

    return {path: one(q, inputs[path]) for path, q in rounded.items()}


@functools.partial(jax.jit, static_argnums=0)
def _errors_of(
    axes: tuple[tuple[str, int], ...],
    weights: Arrays,
    inputs: Arrays,
    read_back: Mapping[str, tuple[jax.Array, jax.Array, jax.Array]],
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Return the errors of weights and outputs; compiled once for all recipes."""

    def product(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
        wide = x.astype(jnp.float32), w.astype(jnp.float32)
        return jax.lax.dot_general(*wide, (((x.ndim - 1,), (axis,)), ((), ())))

    def one(path: str, axis: int) -> tuple[jax.Array, jax.Array]:
        close, seen, operand = read_back[path]
        exact = product(inputs[path], weights[path], axis)
        return (
            relative_error(weights[path], close),
            relative_error(exact, product(seen, operand, axis)),
        )

    return {path: one(path, axis) for path, axis in axes}


def place(path: str) -> tuple[str, int | None]:
    """Split a path into its kind and its layer.

    Example:
        >>> place("params/layers_3/mlp/up_proj/kernel")
        ('mlp/up_proj', 3)
    """
    kind = re.sub(r"^params/|/(kernel|embedding)$", "", path)
    found = re.search(r"(?:^|/)[a-z_]*?_?(\d+)(?=/|$)", kind)
    if found is None:
        return kind, None
    rest = kind[: found.start()] + kind[found.end() :]
    return rest.strip("/") or kind, int(found.group(1))


def group_by_kind(arrays: Arrays) -> dict[str, dict[str, np.ndarray]]:
    """Return arrays by kind and path, one kind for each row of a heat map."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    for path, array in arrays.items():
        wide = np.asarray(array.astype(jnp.float32))
        groups.setdefault(place(path)[0], {})[path] = wide
    return groups


def distribution_of(title: str, arrays: Mapping[str, np.ndarray]) -> Distribution:
    """Count values in bins of standard deviations.

    Each array is divided by its own standard deviation first, so that layers of
    different scale add up.
    """
    sigmas = {path: float(np.std(a)) or 1.0 for path, a in arrays.items()}
    scaled = {path: a.ravel() / sigmas[path] for path, a in arrays.items()}
    peaks = {path: float(np.abs(a).max(initial=0)) for path, a in scaled.items()}
    at = max(peaks, key=peaks.__getitem__)
    reach = max(peaks[at], OUTLIER_SIGMAS + 1)
    edges = np.linspace(-reach, reach, BINS + 1)
    counts = sum(np.histogram(a, edges)[0] for a in scaled.values())
    outliers = sum(int((np.abs(a) > OUTLIER_SIGMAS).sum()) for a in scaled.values())
    sigma = float(np.mean(list(sigmas.values())))
    counts = np.asarray(counts)
    return Distribution(title, edges, counts, sigma, peaks[at], at, outliers)


def channels_of(title: str, activation: np.ndarray) -> Channels:
    """Return the largest magnitude per channel of ``[rows, channels]``."""
    return Channels(title, np.abs(activation).max(axis=0))


def _contracted(found: Sequence[Site]) -> dict[str, int]:
    """Return the contracted axis of every plain matrix product's parameter."""
    return {
        site.path: site.contracting[0]
        for site in found
        if site.op == "dot_general" and len(site.contracting) == 1 and not site.stacked
    }


def _by_path(params: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in flat}
