"""Values of a quantization config, checked: nothing in a file is believed."""

import re
from collections.abc import Mapping
from typing import Any

from jaxq.checkpoints.errors import CheckpointError
from jaxq.checkpoints.strict_json import shorten

LONGEST_PATTERN = 1000


def integer(
    config: Mapping[str, Any], key: str, allowed: Any, default: int | None = None
) -> int:
    """Return a whole number that must be in ``allowed``.

    Raises:
        CheckpointError: it is missing without a default, or something else.
    """
    value = config.get(key, default)
    if value is None and default is not None:
        value = default
    if type(value) is not int or value not in allowed:
        choice = "a positive number" if isinstance(allowed, range) else _listed(allowed)
        raise CheckpointError(
            f"quantization_config: {key!r} is {shorten(value)}; it must be {choice}"
        )
    return value


def choice(
    config: Mapping[str, Any], key: str, allowed: Any, default: str | None = None
) -> str:
    """Return a word that must be in ``allowed``; upper case counts as lower.

    Raises:
        CheckpointError: it is something else.
    """
    value = config.get(key)
    value = default if value is None else value
    word = value.lower() if isinstance(value, str) else value
    if not isinstance(word, str) or word not in allowed:
        raise CheckpointError(
            f"quantization_config: {key!r} is {shorten(value)}; it must be "
            f"{_listed(allowed)}"
        )
    return word


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """Return true or false.

    Raises:
        CheckpointError: it is something else.
    """
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise CheckpointError(
            f"quantization_config: {key!r} is {shorten(value)}; it must be true or "
            "false"
        )
    return value


def section(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return an object, empty where there is none.

    Raises:
        CheckpointError: it is something else.
    """
    value = config.get(key)
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise CheckpointError(
            f"quantization_config: {key!r} is {shorten(value)}; it must be an object"
        )
    return value


def names(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Return a list of words, empty where there is none.

    Raises:
        CheckpointError: it is something else.
    """
    value = config.get(key)
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise CheckpointError(
            f"quantization_config: {key!r} is {shorten(value)}; it must be a list of "
            "names"
        )
    return tuple(value)


def pattern(text: str, where: str) -> re.Pattern[str]:
    """Compile a pattern from a file.

    A nested repetition, such as ``(a+)+``, can take years to fail on a long name, so
    it is refused; no model's names need one.

    Raises:
        CheckpointError: it is no pattern, or one that may never end.
    """
    nested = re.search(r"[+*}]\)*[+*{]|\([^()]*[+*}][^()]*\)[+*{]", text)
    if len(text) > LONGEST_PATTERN or nested:
        raise CheckpointError(
            f"quantization_config: {where} has the pattern {shorten(text)}, which "
            "repeats a repetition (or is too long) and might take forever to match"
        )
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"quantization_config: {where} has the pattern {shorten(text)}, which is "
            f"none: {error}"
        ) from error


def _listed(allowed: Any) -> str:
    return " or ".join(map(repr, sorted(allowed)))
