"""Look a name up in a table, and suggest the nearest one when it is not there."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class UnknownNameError(ValueError):
    """A name that is in no table, with the names that are."""


def unknown(name: object, known: Iterable[str], kind: str) -> UnknownNameError:
    """Return the error for a ``kind`` called ``name`` that does not exist."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    names = ", ".join(known) or "none"
    return UnknownNameError(f"unknown {kind} {name!r}{hint} Known: {names}")


def lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    """Return ``table[name]``.

    Raises:
        UnknownNameError: names the value, the nearest known name and all known names.
    """
    if not isinstance(name, str) or name not in table:
        raise unknown(name, table, kind)
    return table[name]
