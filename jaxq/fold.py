"""Fold the scales of weights' inputs into what computes those inputs.

A weight with an input scale stands for ``y = (x · s) @ w``. Other engines have no such
scale, but where one module alone computes x, and x goes to weights with the same s
only, that module can be scaled in place: a norm's weight, or the columns of the
projection before (through a gate or an attention, which are linear in it).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.checkpoints.errors import UnsupportedError
from jaxq.qtensor import QTensor, is_qtensor
from jaxq.scales import load_scale, store_scale

NORM, PROJECTION = "norm", "projection"


@dataclasses.dataclass(frozen=True)
class Edge:
    """One module and all the weights that its output goes to, in a layer.

    Attributes:
        producer: path of the module from the layer.
        kind: `NORM` or `PROJECTION`.
        consumers: paths of the modules from the layer.
        heads: whether attention repeats the producer's heads for its consumers.
    """

    producer: tuple[str, ...]
    kind: str
    consumers: tuple[tuple[str, ...], ...]
    heads: bool = False


def _attention(*names: str) -> tuple[tuple[str, ...], ...]:
    return tuple(("self_attn", name) for name in names)


_LLAMA = (
    Edge(("input_layernorm",), NORM, _attention("q_proj", "k_proj", "v_proj")),
    Edge(("self_attn", "v_proj"), PROJECTION, _attention("o_proj"), heads=True),
    Edge(
        ("post_attention_layernorm",),
        NORM,
        (("mlp", "gate_proj"), ("mlp", "up_proj")),
    ),
    Edge(("mlp", "up_proj"), PROJECTION, (("mlp", "down_proj"),)),
)
# By family, for those where it is exact.
EDGES: dict[str, tuple[Edge, ...]] = dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3"), _LLAMA
)
# How far logits may move, relative to their spread, by rounding weights in a dtype, or
# the scales that are folded into those of a quantized weight.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}

Tree = dict[str, Any]


def has_input_scales(params: Any) -> bool:
    """Whether any weight has a scale for its input."""
    leaves = jax.tree.leaves(params, is_leaf=is_qtensor)
    return any(is_qtensor(leaf) and leaf.input_scale is not None for leaf in leaves)


def fold(
    params: Any,
    family: str,
    check: Callable[[Any], jax.Array] | None = None,
    *,
    partly: bool = False,
) -> Any:
    """Return parameters without input scales, that stand for the same function.

    Args:
        params: Flax variables whose layers are ``params/layers_0``, ...
        family: of `EDGES`.
        check: computes logits of parameters; both must be equal but for rounding.
        partly: whether scales that cannot be folded stay where they are.

    Raises:
        UnsupportedError: a scale cannot be folded exactly, or the function changed.
    """
    if family not in EDGES and partly:
        return params
    if family not in EDGES:
        raise UnsupportedError(
            f"input scales (AWQ, SmoothQuant) are folded for {', '.join(EDGES)}, not "
            f"for {family!r}: write it as jaxq, or quantize without them"
        )
    tree = _copied(params)
    for name, layer in tree["params"].items():
        if name.startswith("layers_"):
            for edge in EDGES[family]:
                try:
                    _fold_edge(layer, edge, name)
                except UnsupportedError:
                    if not partly:
                        raise
    left = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_flatten_with_path(
            tree, is_leaf=is_qtensor
        )[0]
        if is_qtensor(leaf) and leaf.input_scale is not None
    ]
    if left and not partly:
        raise UnsupportedError(
            f"{left[0]} has an input scale that no module before it can take over"
        )
    if check is not None:
        _compare(check(params), check(tree), params)
    return tree


def _fold_edge(layer: Tree, edge: Edge, name: str) -> None:
    kernels = [_at(layer, path)["kernel"] for path in edge.consumers]
    scales = [k.input_scale if isinstance(k, QTensor) else None for k in kernels]
    if all(scale is None for scale in scales):
        return
    where = f"{name}/{'/'.join(edge.consumers[0])}"
    full = [
        None if s is None else np.broadcast_to(np.asarray(s), (k.shape[0], 1))[:, 0]
        for s, k in zip(scales, kernels, strict=True)
    ]
    if any(s is None or (s != full[0]).any() for s in full):
        raise UnsupportedError(
            f"{where}: the weights that share its input have different input scales, "
            "so that the module before cannot take them over"
        )
    if any(k.input_index is not None for k in kernels):
        raise UnsupportedError(f"{where}: its rows are in another order (act-order)")
    scale = full[0]
    assert scale is not None
    module = _at(layer, edge.producer)
    if edge.kind == NORM:
        weight = module["weight"]
        module["weight"] = (weight.astype(jnp.float32) * scale).astype(weight.dtype)
    else:
        kernel = module["kernel"]
        scale = _of_producer(scale, kernel.shape[1], edge, where)
        module["kernel"] = _scaled(kernel, scale, where)
        if "bias" in module:
            bias = module["bias"]
            module["bias"] = (bias.astype(jnp.float32) * scale).astype(bias.dtype)
    for path in edge.consumers:
        consumer = _at(layer, path)
        plain = dataclasses.replace(consumer["kernel"], input_scale=None)
        consumer["kernel"] = plain


def _of_producer(scale: np.ndarray, width: int, edge: Edge, where: str) -> np.ndarray:
    """Return one scale per output of the producer, whose heads may be repeated."""
    if len(scale) == width:
        return scale
    shared = ", since attention repeats heads," if edge.heads else ""
    raise UnsupportedError(
        f"{where}: its input has {len(scale)} scaled channels, but {width} are "
        f"computed{shared} and cannot have several scales"
    )


def _scaled(kernel: Any, scale: np.ndarray, where: str) -> Any:
    """Return a weight with its columns scaled."""
    if not isinstance(kernel, QTensor):
        return (kernel.astype(jnp.float32) * scale).astype(kernel.dtype)
    plain = isinstance(kernel.spec.scale, str) and kernel.spec.scale != "e8m0"
    if not plain or kernel.blocks[1] > 1 or isinstance(kernel.scales, QTensor):
        raise UnsupportedError(
            f"{where}: the weight before it has scales "
            f"({kernel.spec.describe()}) that cannot be scaled column by column"
        )
    kind = str(kernel.spec.scale)
    scales = store_scale(load_scale(kernel.scales, kind) * scale, kind)
    offset = None if kernel.offset is None else kernel.offset * scale
    return dataclasses.replace(kernel, scales=scales, offset=offset)


def _compare(before: jax.Array, after: jax.Array, params: Any) -> None:
    weights = jax.tree.leaves(params, is_leaf=is_qtensor)
    scales = (w.scales for w in weights if isinstance(w, QTensor))
    dtype = max(
        (array.dtype for array in (*weights, *scales)),
        key=lambda d: TOLERANCES.get(jnp.dtype(d).name, 0),
    )
    limit = TOLERANCES.get(jnp.dtype(dtype).name, 1e-4)
    spread = float(jnp.std(before.astype(jnp.float32))) or 1.0
    moved = before.astype(jnp.float32) - after.astype(jnp.float32)
    change = float(jnp.max(jnp.abs(moved))) / spread
    if not change <= limit:
        raise UnsupportedError(
            f"folding the input scales moved the logits by {change:.3g} of their "
            f"spread, more than {limit:g} that rounding in {jnp.dtype(dtype).name} "
            "explains: write it as jaxq instead"
        )


def _at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _copied(tree: Any) -> Any:
    """Return new dicts around the same leaves."""
    if isinstance(tree, Mapping):
        return {key: _copied(value) for key, value in tree.items()}
    return tree
