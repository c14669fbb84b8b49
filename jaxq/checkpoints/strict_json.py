"""JSON from files that nobody vouches for: what is odd is refused, never guessed."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from jaxq.checkpoints.errors import CorruptError

T = TypeVar("T")


def parse(data: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in ``data``.

    Args:
        data: UTF-8.
        where: names the source, for messages.

    Raises:
        CorruptError: it is no UTF-8, no JSON or no object, repeats a key (readers
            disagree which one counts), or nests too deep.
    """

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            raise ValueError("a key is repeated")
        return keys

    try:
        parsed = json.loads(
            data.decode("utf-8"), parse_constant=no_constant, object_pairs_hook=unique
        )
    except RecursionError as error:
        raise CorruptError(
            f"{where} is no valid JSON: it nests too deep; fetch or save it again"
        ) from error
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise CorruptError(
            f"{where} is no valid JSON: {error}; fetch or save it again"
        ) from error
    if not isinstance(parsed, dict):
        raise CorruptError(
            f"{where} holds a JSON {type(parsed).__name__} where an object belongs"
        )
    return parsed


def get(data: Mapping[str, Any], key: str, kind: type[T], where: str) -> T:
    """Return ``data[key]``, which must be there and of type ``kind``.

    A JSON ``true`` is no int, though Python says so.

    Raises:
        CorruptError: naming the place, the key and what was found.
    """
    if key not in data:
        raise CorruptError(f"{where} has no {key!r}; fetch or save it again")
    value = data[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CorruptError(
            f"{where}: {key!r} is {shorten(value)}, not of type {kind.__name__}; "
            "fetch or save it again"
        )
    return value


def get_sizes(data: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    """Return a list of sizes (a shape, a block: at most 64, each < 2^63) as a tuple.

    Raises:
        CorruptError: it is something else.
    """
    sizes = get(data, key, list, where)
    if len(sizes) > 64 or not all(type(n) is int and 0 <= n < 2**63 for n in sizes):
        raise CorruptError(
            f"{where}: {key!r} is {shorten(sizes)}, not a list of sizes; "
            "fetch or save it again"
        )
    return tuple(sizes)


def shorten(value: object) -> str:
    """Return a value for a message, cut to a readable length."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
