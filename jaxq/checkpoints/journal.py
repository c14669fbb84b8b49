"""`journal.json`: which steps of an unfinished checkpoint are on the disk, for good.

A step is finished the moment the journal that lists it gets its name. Everything the
journal speaks of is on the disk before, and what it does not speak of is not there.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxq.checkpoints import atomic, manifest, parameter, strict_json
from jaxq.checkpoints.errors import CorruptError, MismatchError, VersionError
from jaxq.checkpoints.manifest import DataFile

NAME = "journal.json"
NEXT = "journal.json.next"
FORMAT = "jaxq-journal"
VERSION = 1
_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Step:
    """A finished step.

    Attributes:
        name: unique in its journal.
        params: the parameters it made, by path, with shapes and dtypes for arrays.
        files: the files that hold their numbers.
        evidence: what the step had to say, as plain data.
    """

    name: str
    params: Mapping[str, parameter.Abstract]
    files: Mapping[str, DataFile]
    evidence: Any = None


@dataclasses.dataclass(frozen=True)
class State:
    """What the next step starts from.

    Attributes:
        file: the name of the safetensors file.
        data: its size and checksum.
        tensors: what it holds.
    """

    file: str
    data: DataFile
    tensors: Mapping[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Journal:
    """How far an unfinished checkpoint is.

    Attributes:
        fingerprint: what determines the result, as plain data.
        steps: the finished steps, in order.
        state: what the last of them left for the next, or None.
        published: the seal of the finished folder (see `partial.seal`), from just
            before it gets its name; None until then.
    """

    fingerprint: Any
    steps: tuple[Step, ...] = ()
    state: State | None = None
    published: str | None = None

    @property
    def params(self) -> dict[str, parameter.Abstract]:
        """Every finished parameter."""
        return {path: leaf for step in self.steps for path, leaf in step.params.items()}

    @property
    def files(self) -> dict[str, DataFile]:
        """Every file with parameters."""
        return {name: file for step in self.steps for name, file in step.files.items()}


def write(folder: Path, journal: Journal) -> None:
    """Write the journal in place of the one before, in one step, onto the disk."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "format_version": VERSION,
        "written_by": manifest.program(),
        "fingerprint": journal.fingerprint,
        "state": journal.state and _state_to_dict(journal.state),
        "published": journal.published,
        "steps": [_step_to_dict(step) for step in journal.steps],
    }
    content["sha256"] = manifest.digest(content)
    (folder / NEXT).write_text(_render(content), "utf-8")
    atomic.sync_file(folder / NEXT)
    os.replace(folder / NEXT, folder / NAME)
    atomic.sync_folder(folder)


def read(folder: Path) -> Journal:
    """Read and check the journal in ``folder``.

    Raises:
        FileNotFoundError: there is none.
        CorruptError: it is damaged or contradicts itself.
        VersionError: a newer jaxq wrote it.
    """
    path = folder / NAME
    content = strict_json.parse(path.read_bytes(), str(path))
    where, get = str(path), strict_json.get
    if get(content, "format", str, where) != FORMAT:
        raise CorruptError(f"{path} says format {content['format']!a}, not {FORMAT!r}")
    version = get(content, "format_version", int, where)
    if version != VERSION:
        by = strict_json.shorten(content.get("written_by", "an unknown program"))
        raise VersionError(
            f"{path} is of format version {version}, written by {by}; this jaxq "
            f"resumes version {VERSION}"
        )
    if content.get("sha256") != manifest.digest(content):
        raise CorruptError(f"{path} was altered after it was written")
    steps = [_read_step(step, where) for step in get(content, "steps", list, where)]
    state = content.get("state")
    return Journal(
        fingerprint=content.get("fingerprint"),
        steps=tuple(steps),
        state=None if state is None else _read_state(state, f"{where}: state"),
        published=content.get("published"),
    )


def check_fingerprint(journal: Journal, wanted: Any, what: str) -> None:
    """Raise unless the run that wrote the journal was like this one.

    Raises:
        MismatchError: with everything that differs, before and now.
    """
    found = list(differences(journal.fingerprint, wanted))
    if not found:
        return
    more = f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    listed = "".join(f"\n  {line}" for line in found[:_SHOWN])
    raise MismatchError(
        f"{what} cannot be resumed, because it was begun differently:{listed}{more}\n"
        "Run it as it was begun, or begin again with overwrite=True (--force)"
    )


def differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    r"""Yield one line for everything in which two pieces of plain data differ.

    Example:
        >>> print(*differences({"a": [1, 2], "b": 0}, {"a": [1, 3]}), sep="\n")
        a[1]: was 2, is 3
        b: was 0, is not given
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            inner = f"{key}.{name}" if key else name
            if name not in now:
                yield f"{inner}: was {_short(before[name])}, is not given"
            elif name not in before:
                yield f"{inner}: was not given, is {_short(now[name])}"
            else:
                yield from differences(before[name], now[name], inner)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from differences(old, new, f"{key}[{i}]")
    elif json.dumps(before) != json.dumps(now):
        yield f"{key or 'it'}: was {_short(before)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _render(content: Mapping[str, Any]) -> str:
    """Return JSON to be read by people too: one line for each step."""
    lines = []
    for key, value in content.items():
        text = json.dumps(value, allow_nan=False)
        if key == "steps" and value:
            text = "[\n  " + ",\n  ".join(json.dumps(step) for step in value) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _step_to_dict(step: Step) -> dict[str, Any]:
    return {
        "name": step.name,
        "files": {name: dataclasses.asdict(f) for name, f in step.files.items()},
        "evidence": step.evidence,
        "parameters": {p: parameter.to_dict(a) for p, a in step.params.items()},
    }


def _read_step(data: Any, where: str) -> Step:
    data = manifest.as_object(data, f"{where}: a step")
    name = strict_json.get(data, "name", str, f"{where}: a step")
    where = f"{where}: step {name!a}"
    files = strict_json.get(data, "files", dict, where)
    params = strict_json.get(data, "parameters", dict, where)
    return Step(
        name=name,
        params=dict(_read_params(params, where)),
        files=dict(manifest.read_files(files, where)),
        evidence=data.get("evidence"),
    )


def _state_to_dict(state: State) -> dict[str, Any]:
    return {
        "file": state.file,
        **dataclasses.asdict(state.data),
        "tensors": {n: parameter.to_dict(a) for n, a in state.tensors.items()},
    }


def _read_state(data: Any, where: str) -> State:
    data = manifest.as_object(data, where)
    file = strict_json.get(data, "file", str, where)
    ((name, found),) = manifest.read_files({file: data}, where)
    tensors = dict(_read_params(strict_json.get(data, "tensors", dict, where), where))
    arrays = {n: t for n, t in tensors.items() if isinstance(t, jax.ShapeDtypeStruct)}
    if len(arrays) != len(tensors):
        raise CorruptError(f"{where} holds what is no array")
    return State(name, found, arrays)


def _read_params(
    params: Mapping[str, Any], where: str
) -> Iterator[tuple[str, parameter.Abstract]]:
    for path, data in params.items():
        here = f"{where}: parameter {path!a}"
        yield path, parameter.from_dict(manifest.as_object(data, here), here)
