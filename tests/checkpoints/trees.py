"""Trees to save, and what it means to get the same one back."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxq.qtensor import QTensor, is_qtensor
from jaxq.quantize import quantize
from jaxq.spec import QuantSpec

# Granularities and ways to store scales; every format meets each of them.
VARIANTS: dict[str, dict[str, Any]] = {
    "tensor": {"block": "tensor"},
    "channel": {"block": "channel", "scale": "bfloat16"},
    "token": {"block": "token", "scale": "float16"},
    "group": {"block": 16, "scale": "e4m3"},
    "padded": {"block": 24},
    "tile": {"block": (16, 8), "scale": "e8m0"},
    "double": {
        "block": 8,
        "scale": QuantSpec("dynamic8", 64, center=True),
    },
}


def weight(seed: int, shape: tuple[int, ...] = (48, 32)) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, "float32")


def random_like(tree: Any) -> Any:
    """Arrays of random bytes in place of abstract ones; far cheaper than quantizing."""
    rng = np.random.default_rng(0)

    def one(a: Any) -> jax.Array:
        size = a.size * a.dtype.itemsize
        data = rng.integers(0, 256, size, dtype=np.uint8)
        return jax.numpy.asarray(data.view(a.dtype).reshape(a.shape))

    return jax.tree.map(one, tree)


def variants(name: str) -> dict[str, QTensor]:
    """One weight in a format, by every granularity and scale."""

    def make(w: jax.Array, layers: jax.Array) -> dict[str, QTensor]:
        out = {
            key: quantize(w, QuantSpec(name, **fields))
            for key, fields in VARIANTS.items()
        }
        if out["tensor"].spec.number_format.is_integer:
            out["asymmetric"] = quantize(w, QuantSpec(name, 16, symmetric=False))
        out["stacked"] = quantize(layers, QuantSpec(name, 8), stacked=(0,))
        return out

    shapes = (48, 32), (3, 16, 8)
    return random_like(
        jax.eval_shape(make, *(jax.ShapeDtypeStruct(s, "float32") for s in shapes))
    )


def with_everything() -> QTensor:
    """A QTensor with every field there is, vmapped over an axis of layers."""
    spec = QuantSpec("uint4", 16, symmetric=False, scale="bfloat16")

    def make(w: jax.Array) -> QTensor:
        q = jax.vmap(lambda w: quantize(w, spec))(w)
        one = w[:, :, :1]
        return dataclasses.replace(
            q,
            offset=one[:, :1],
            input_scale=one,
            input_index=one.astype("int32"),
            rows=30,
            activation_scale=one[:, :1],
            activation_zero=one[:, :1].astype("int8"),
            activation=QuantSpec("int8", "token"),
        )

    return random_like(
        jax.eval_shape(make, jax.ShapeDtypeStruct((2, 40, 8), "float32"))
    )


def assert_same(found: Any, wanted: Any) -> None:
    """Same structure, static fields (but names), dtypes and bits."""
    assert jax.tree.structure(unnamed(found)) == jax.tree.structure(unnamed(wanted))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if isinstance(b, bool | int | float | str):
            assert type(a) is type(b)
            assert a == b
            continue
        assert isinstance(a, jax.Array | np.ndarray)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def unnamed(tree: Any) -> Any:
    def one(leaf: Any) -> Any:
        return dataclasses.replace(leaf, name=None) if is_qtensor(leaf) else leaf

    return jax.tree.map(one, tree, is_leaf=is_qtensor)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }


def reseal(folder: Path, change: Any = None) -> None:
    """Change the manifest and make its checksums right again, as an attacker would."""
    path = folder / "jaxq.json"
    content = json.loads(path.read_text())
    for name, entry in content["files"].items():
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if change is not None:
        change(content)
    content.pop("sha256")
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(content))
