"""One parameter as data: an array, a `QTensor` or a plain value, without numbers."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxq.checkpoints import strict_json
from jaxq.checkpoints.dtypes import parse_dtype, storable
from jaxq.checkpoints.errors import CorruptError, UnsupportedError
from jaxq.qtensor import DATA_FIELDS, QTensor
from jaxq.relayout import PLANAR
from jaxq.spec import QuantSpec

# What stands for a parameter: shapes and dtypes in place of arrays.
Abstract = jax.ShapeDtypeStruct | QTensor | bool | int | float | str
VALUES = (bool, int, float, str)


def abstract(path: str, leaf: Any) -> Abstract:
    """Return the shapes and dtypes of a leaf.

    Raises:
        UnsupportedError: the leaf is nothing that can be saved.
    """
    if isinstance(leaf, QTensor):
        fields: dict[str, Any] = {
            field: abstract(f"{path}/{field}", getattr(leaf, field))
            for field in present(leaf)
        }
        storable(np.dtype(leaf.dtype), path)
        return dataclasses.replace(leaf, name=None, **fields)
    if isinstance(leaf, VALUES) and not isinstance(leaf, np.generic):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise UnsupportedError(f"{path} is the float {leaf}; make it an array")
        return leaf
    if isinstance(leaf, jax.core.Tracer):
        raise UnsupportedError(
            f"{path} is a tracer, which has no value yet; save outside of jit"
        )
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        raise UnsupportedError(
            f"{path} is of type {type(leaf).__name__}, which cannot be saved; take it "
            "out of the tree (Equinox: eqx.filter(model, eqx.is_array))"
        )
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise UnsupportedError(
            f"{path} is a random key; save jax.random.key_data(key) in its place"
        )
    return jax.ShapeDtypeStruct(leaf.shape, storable(np.dtype(leaf.dtype), path))


def present(q: QTensor) -> list[str]:
    """Return the names of the data fields that are not None."""
    return [field for field in DATA_FIELDS if getattr(q, field) is not None]


def tensors(path: str, leaf: Any) -> Iterator[tuple[str, Any]]:
    """Yield the arrays of a leaf, real or abstract, by the names they are stored under.

    An array is stored under its path, those of a `QTensor` under ``path/codes``,
    ``path/scales``, and ``path/scales/codes`` where scales are quantized themselves.
    """
    if isinstance(leaf, QTensor):
        for field in present(leaf):
            name = f"{path}/{field}" if path else field
            yield from tensors(name, getattr(leaf, field))
    elif not isinstance(leaf, VALUES) or isinstance(leaf, np.generic):
        yield path or "array", leaf


def rebuild(path: str, leaf: Abstract, read: Callable[[str], Any]) -> Any:
    """Return the parameter with ``read(name)`` in place of every abstract array."""
    if isinstance(leaf, QTensor):
        fields = {
            field: rebuild(f"{path}/{field}" if path else field, value, read)
            for field in present(leaf)
            if (value := getattr(leaf, field)) is not None
        }
        return dataclasses.replace(leaf, **fields)
    return leaf if isinstance(leaf, VALUES) else read(path or "array")


def same(one: Abstract, other: Abstract) -> bool:
    """Whether two parameters have the same kind, shapes, dtypes and static fields."""
    if isinstance(one, VALUES) or isinstance(other, VALUES):
        return type(one) is type(other)
    return to_dict(one) == to_dict(other)


def describe(leaf: Abstract) -> str:
    """Return one line for messages and tables."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return f"an array {tuple(leaf.shape)} {leaf.dtype.name}"
    return (
        repr(leaf) if isinstance(leaf, QTensor) else f"the {type(leaf).__name__} {leaf}"
    )


def to_dict(leaf: Abstract) -> dict[str, Any]:
    """Return an abstract parameter as plain data."""
    if isinstance(leaf, QTensor):
        out: dict[str, Any] = {"kind": "qtensor", "shape": list(leaf.shape)}
        for field, (write, _) in STATIC_CODECS.items():
            out[field] = write(getattr(leaf, field))
        arrays = {field: to_dict(getattr(leaf, field)) for field in present(leaf)}
        return out | {"arrays": arrays}
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return {"kind": "array", "dtype": leaf.dtype.name, "shape": list(leaf.shape)}
    return {"kind": "value", "value": leaf}


def from_dict(data: Mapping[str, Any], where: str) -> Abstract:
    """Invert `to_dict`, believing nothing.

    Raises:
        CorruptError: naming the place, the field and its value.
    """
    kind = strict_json.get(data, "kind", str, where)
    if kind == "array":
        dtype = parse_dtype(strict_json.get(data, "dtype", str, where), where)
        return jax.ShapeDtypeStruct(strict_json.get_sizes(data, "shape", where), dtype)
    if kind == "qtensor":
        return _qtensor(data, where)
    value = data.get("value")
    if kind != "value" or not isinstance(value, VALUES):
        raise CorruptError(
            f"{where} is of kind {strict_json.shorten(kind)} with the value "
            f"{strict_json.shorten(value)}; known are array, qtensor and value"
        )
    return value


def _qtensor(data: Mapping[str, Any], where: str) -> QTensor:
    unknown = sorted(set(data) - {"kind", "shape", "arrays", *STATIC_CODECS})
    if unknown:
        raise CorruptError(f"{where} has the unknown fields {unknown[:3]}")
    static: dict[str, Any] = {
        field: read(data, field, where) for field, (_, read) in STATIC_CODECS.items()
    }
    arrays: dict[str, Any] = {}
    for field, entry in strict_json.get(data, "arrays", dict, where).items():
        if field not in DATA_FIELDS or not isinstance(entry, dict):
            raise CorruptError(
                f"{where} has an array {strict_json.shorten(field)}; a QTensor has "
                f"{', '.join(DATA_FIELDS)}"
            )
        arrays[field] = from_dict(entry, f"{where}, {field}")
    for field in ("codes", "scales"):
        if field not in arrays:
            raise CorruptError(f"{where} has no {field}")
    q = QTensor(**arrays, **static)
    _check(q, strict_json.get_sizes(data, "shape", where), where)
    return q


def _check(q: QTensor, shape: tuple[int, ...], where: str) -> None:
    """Raise unless the fields of ``q`` fit each other, so that it can be decoded."""
    codes = q.codes
    if not isinstance(codes, jax.ShapeDtypeStruct) or codes.dtype != np.uint8:
        raise CorruptError(f"{where}: the codes are no uint8 array but {codes!r}")
    for field in present(q):
        kinds = jax.ShapeDtypeStruct | (QTensor if field == "scales" else type(None))
        if not isinstance(getattr(q, field), kinds):
            raise CorruptError(f"{where}: {field} is no array")
    in_range = -codes.ndim <= q.axis < 0 and q.pack >= 1 and q.padding >= 0
    if not in_range or (codes.shape[q.axis] * 8 // q.spec.bits) % q.pack:
        raise CorruptError(
            f"{where}: axis {q.axis}, pack {q.pack} and padding {q.padding} do not fit "
            f"codes of shape {codes.shape}"
        )
    if q.shape != shape or min(shape, default=0) < 0:
        raise CorruptError(
            f"{where}: codes {codes.shape} of {q.spec.bits} bits with padding "
            f"{q.padding} make a tensor {q.shape}, not {shape}"
        )
    if q.spec.binary and q.scales.shape != q.scale_grid:
        raise CorruptError(
            f"{where}: scales of shape {q.scales.shape} are no {q.scale_grid}, one per "
            f"bit and block of a binary-coded tensor"
        )
    for field in ("zeros",) if q.spec.binary else ("scales", "zeros"):
        value = getattr(q, field)
        if value is not None and not _spreads(value.shape, q.blocks, q.stored_shape):
            raise CorruptError(
                f"{where}: {field} of shape {value.shape} do not cover a tensor "
                f"{q.stored_shape} in blocks of {q.blocks}"
            )
    _check_index(q, where)


def _check_index(q: QTensor, where: str) -> None:
    """Raise unless there is one channel for every stored row, or no index at all."""
    index = q.input_index
    if index is None and q.rows is None:
        return
    if index is None or q.rows is None:
        raise CorruptError(
            f"{where}: rows={q.rows}, but the tensor has "
            f"{'no' if index is None else 'an'} input index: both or neither"
        )
    shape = list(index.shape)
    fits = len(shape) == len(q.shape) and shape[q.axis] == q.stored_shape[q.axis]
    if (
        not fits
        or index.dtype != np.int32
        or not _spreads(index.shape, (1,) * len(shape), q.stored_shape)
    ):
        raise CorruptError(
            f"{where}: an input index {index.dtype}{shape} does not fit the stored "
            f"rows of {q.stored_shape}"
        )


def _spreads(
    values: tuple[int, ...], block: tuple[int, ...], shape: tuple[int, ...]
) -> bool:
    """Whether one value per block covers the tensor; see `jaxq.blocks.spread`."""
    return len(values) == len(shape) == len(block) and all(
        v in (1, n) or (b > 1 and v * b >= n)
        for v, b, n in zip(values, block, shape, strict=True)
    )


def _read_spec(data: Mapping[str, Any], field: str, where: str) -> QuantSpec:
    fields = strict_json.get(data, field, dict, where)
    try:
        return QuantSpec.from_dict(fields)
    except (ValueError, TypeError, AttributeError) as error:
        reason = str(error)[:300]
        raise CorruptError(f"{where}: {field} is no QuantSpec: {reason}") from error


def _read_optional_spec(
    data: Mapping[str, Any], field: str, where: str
) -> QuantSpec | None:
    return None if data.get(field) is None else _read_spec(data, field, where)


def _read_int(data: Mapping[str, Any], field: str, where: str) -> int:
    return strict_json.get(data, field, int, where)


def _read_optional_int(data: Mapping[str, Any], field: str, where: str) -> int | None:
    return None if data.get(field) is None else _read_int(data, field, where)


def _read_str(data: Mapping[str, Any], field: str, where: str) -> str:
    return strict_json.get(data, field, str, where)


def _read_layout(data: Mapping[str, Any], field: str, where: str) -> str:
    name = _read_str(data, field, where)
    if name != PLANAR:
        raise CorruptError(
            f"{where}: {field} is {strict_json.shorten(name)}; files hold {PLANAR!r}"
        )
    return name


def _read_dtype(data: Mapping[str, Any], field: str, where: str) -> np.dtype:
    return parse_dtype(_read_str(data, field, where), where)


# Static field of a QTensor -> (to plain data, and back). Its name is the path.
STATIC_CODECS: dict[str, tuple[Callable[[Any], Any], Callable[..., Any]]] = {
    "spec": (QuantSpec.to_dict, _read_spec),
    "axis": (int, _read_int),
    "pack": (int, _read_int),
    "padding": (int, _read_int),
    "rows": (lambda rows: rows, _read_optional_int),
    "block": (list, strict_json.get_sizes),
    "dtype": (lambda dtype: np.dtype(dtype).name, _read_dtype),
    "activation": (lambda spec: spec and spec.to_dict(), _read_optional_spec),
    "layout": (str, _read_layout),
}
