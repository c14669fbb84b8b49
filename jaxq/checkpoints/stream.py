"""`open_stream`: a checkpoint larger than memory, written step by step, resumable."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from jaxq.checkpoints import (
    atomic,
    journal,
    lock,
    manifest,
    parameter,
    partial,
    placement,
    safetensors,
    saving,
    shards,
    structure,
)
from jaxq.checkpoints.errors import (
    CheckpointError,
    MismatchError,
    UnsupportedError,
    WriteError,
)
from jaxq.checkpoints.lazy import LazyArray, LazyStack
from jaxq.checkpoints.manifest import DataFile
from jaxq.checkpoints.stored import read_tensor
from jaxq.heap import give_back

Tensors = Mapping[str, jax.ShapeDtypeStruct]
SMALL = 2**20  # bytes of manifest, index and journal, about, for messages


def open_stream(  # noqa: PLR0913  one verb, and what it may be told
    path: str | os.PathLike[str],
    *,
    fingerprint: Any,
    backend: str = "safetensors",
    shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    resume: bool = False,
    needed: int = 0,
    may_replace: Callable[[Path], None] = saving.may_replace,
) -> "StreamWriter":
    """Begin, or go on with, a checkpoint that is written step by step.

    Parameters are `put` and, a step at a time, committed: from then on they, and the
    state that the next step starts from, are on the disk and no longer in memory. The
    process may be killed at any moment; what was committed is resumed from, and the
    checkpoint that `finish` makes has the same bytes. It is what `jaxq.save` writes, up
    to how tensors are divided among files.

    Until then everything lies in `NAME.partial` beside the target, where one process
    at a time works.

    Args:
        path: the folder to make in the end.
        fingerprint: plain data that determines the result (recipe, `file_identity` of
            the model, a hash of the calibration tokens, options, versions). It must be
            the same for every run that resumes.
        backend: ``"safetensors"``.
        shard_bytes: the limit of one file; a single larger tensor goes beyond it. A
            step's last file may be small: no file holds tensors of two steps.
        overwrite: whether a checkpoint at ``path`` is replaced in the end, and, unless
            ``resume``, whether what an interrupted run left is thrown away.
        resume: whether to go on with what an interrupted run left.
        needed: about how many bytes the checkpoint will have: too small a disk is then
            an error now rather than in hours.
        may_replace: called with an existing target, if that is to be overwritten;
            raises if it must not be. By default only checkpoints may.

    Returns:
        The writer, to be used in a ``with`` block.

    Raises:
        ExistsError: the target is there, or was begun; without leave to replace it.
        MissingFileError: there is nothing to resume.
        MismatchError: it was begun with another fingerprint: says what differs.
        CorruptError: what is to be resumed from is damaged.
        BusyError: another process is writing this target.
        WriteError: the disk is full, or not writable.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxq.checkpoints import load
        >>> with open_stream("out", fingerprint={"seed": 0}) as writer:
        ...     for i in range(2):
        ...         writer.put(f"w{i}", jnp.full(2, float(i)))
        ...         writer.commit(f"step {i}", state={"x": jnp.ones(3)})
        ...     _ = writer.finish({"w0": 0, "w1": 0})
        >>> load("out")["w1"]
        Array([1., 1.], dtype=float32)
    """
    if backend != "safetensors":
        raise UnsupportedError(
            f"backend={backend!r} cannot be written step by step; use 'safetensors'"
        )
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes} must be at least 1")
    target = atomic.resolved(Path(path))
    place = partial.beside(target)
    wanted = manifest.plain_data(fingerprint, "fingerprint")
    partial.check_name(place)
    with _explained(f"could not write {target}", target, needed):
        handle = lock.acquire(place, target)
        try:
            start = partial.resume if resume else partial.begin
            replace = may_replace if overwrite else None
            found = start(place, target, wanted, replace)
            done = sum(file.bytes for file in found.files.values())
            atomic.check_room(place, needed - done)
        except BaseException:
            partial.tidy(place, target)
            os.close(handle)
            raise
    return StreamWriter(target, found, handle, shard_bytes, replace)


class StreamWriter:
    """A checkpoint in the making; see `open_stream`, which makes one.

    When writing fails, it is as it was after the last commit: the step can be redone.
    """

    def __init__(
        self,
        target: Path,
        found: journal.Journal,
        handle: int,
        shard_bytes: int,
        may_replace: partial.Replace,
    ) -> None:
        self._target = target
        self._place = partial.beside(target)
        self._model = self._place / partial.MODEL
        self._journal = found
        self._handle: int | None = handle
        self._shard_bytes = shard_bytes
        self._may_replace = may_replace
        self._step = _Unfinished()
        self._taken = _all_names(found)

    @property
    def steps(self) -> list[str]:
        """The names of the finished steps, in order."""
        return [step.name for step in self._journal.steps]

    @property
    def paths(self) -> list[str]:
        """The paths of the parameters that finished steps have made."""
        return list(self._journal.params)

    @property
    def how_to_resume(self) -> str:
        """What an interrupted user wants to know."""
        count = len(self._journal.steps)
        if not count:
            return "No step was finished, so nothing is kept: run it again"
        return (
            f"{count} finished steps are kept in {self._place}: continue with "
            "resume=True (--resume)"
        )

    def evidence(self) -> dict[str, Any]:
        """Return what every finished step had to say, by its name."""
        return {step.name: step.evidence for step in self._journal.steps}

    def state(self) -> dict[str, np.ndarray]:
        """Read the last state that was committed; empty if there is none.

        Raises:
            CorruptError: the file was altered meanwhile.
        """
        state = self._journal.state
        if state is None:
            return {}
        header = safetensors.read_header(self._place / state.file)
        header = dataclasses.replace(header, size=state.data.bytes)
        return {
            name: read_tensor(header, name, tensor)
            for name, tensor in state.tensors.items()
        }

    def put(self, path: str | tuple[str, ...], leaf: Any) -> None:
        """Take a parameter; it is written with the commit, or when a file is full.

        Args:
            path: its keys from the root of the tree, or these joined with "/".
            leaf: an array, a `QTensor`, a `LazyArray` (then read while it is written)
                or a plain value. Not to be changed in place before the commit.

        Raises:
            ValueError: the parameter was put before.
            UnsupportedError: it cannot be saved.
            WriteError: the disk is full; the step is to be done again.
        """
        self._check_open()
        path = path if isinstance(path, str) else "/".join(path)
        lazy = isinstance(leaf, LazyArray | LazyStack)
        held = parameter.abstract(path, leaf.abstract if lazy else leaf)
        names = _names(path, held)
        if clash := names & self._taken:
            raise ValueError(f"{min(clash)!r} was put before; put every parameter once")
        arrays = saving.arrays_of({path: leaf})
        shards.check_addressable(arrays)
        self._step.params[path] = held
        self._taken |= names
        with self._writing(f"parameter {path!r}"):
            for name, tensor in parameter.tensors(path, held):
                size = safetensors.Entry.of(tensor, 0).end
                if self._step.tensors and self._step.bytes + size > self._shard_bytes:
                    self._write_shard()
                self._step.tensors[name] = tensor
                array = arrays[name]
                self._step.arrays[name] = array if lazy else placement.fetch(array)
                self._step.bytes += size

    def commit(
        self,
        step: str,
        state: Mapping[str, Any] | None = None,
        evidence: Any = None,
    ) -> None:
        """Finish a step: once this returns, it survives whatever happens.

        Args:
            step: its name; the next run finds it in `steps`.
            state: arrays that the next step starts from. They take the place of the
                last ones, which stay on the disk until then; empty: nothing takes
                their place. None keeps the last ones.
            evidence: plain data to be found in `evidence`.

        Raises:
            ValueError: there is a step of that name.
            UnsupportedError: state or evidence cannot be saved.
            WriteError: the disk is full; the step is to be done again.
        """
        self._check_open()
        if step in self.steps:
            raise ValueError(f"step {step!r} was committed before; name each step once")
        evidence = manifest.plain_data(evidence, f"the evidence of step {step!r}")
        arrays = saving.arrays_of(state or {})
        tensors = _state_tensors(state or {})
        shards.check_addressable(arrays)
        extent = sum(safetensors.Entry.of(t, 0).end for t in tensors.values())
        with self._writing(f"step {step!r}", extent):
            if self._step.tensors:
                self._write_shard()
            kept = self._journal.state if state is None else None
            if tensors:
                kept = self._write_state(arrays, tensors)
            done = journal.Step(step, self._step.params, self._step.files, evidence)
            steps = (*self._journal.steps, done)
            self._record(dataclasses.replace(self._journal, steps=steps, state=kept))

    def finish(
        self,
        tree: Any,
        *,
        config: Any = None,
        recipe: Any = None,
        metadata: Mapping[str, Any] | None = None,
        extra_files: Mapping[str, saving.Content] | None = None,
        convert: Callable[[Path, Path], None] | None = None,
        needed: int = 0,
    ) -> Path:
        """Give the checkpoint its name, now that every parameter was committed.

        Or make another folder of it, which gets the name in its place. A process that
        is killed while it is made begins it anew after a resume.

        Args:
            tree: the structure to load: any tree whose leaves have the paths that were
                put. Leaves with a shape (abstract, lazy or real) must have the same.
            config: as for `jaxq.save`.
            recipe: as for `jaxq.save`.
            metadata: as for `jaxq.save`. What differs between two runs, such as
                seconds, would make their checkpoints differ.
            extra_files: as for `jaxq.save`.
            convert: called with the checkpoint's folder and an empty one to fill, which
                must come out the same every time.
            needed: about how many bytes that takes.

        Returns:
            The folder.

        Raises:
            ValueError: something was put and not committed.
            MismatchError: the tree does not hold what was put.
            ExistsError: the target appeared meanwhile.
            WriteError: the disk is full; it can be finished after a resume.
            Exception: whatever ``convert`` raises; the checkpoint stays where it was.
        """
        self._check_open()
        if self._step.params:
            raise ValueError(
                f"{len(self._step.params)} parameters were put after the last commit, "
                f"such as {next(iter(self._step.params))!r}; commit them first"
            )
        extras = saving.extra_writers(config, extra_files or {})
        content = manifest.Manifest(
            backend="safetensors",
            tree=structure.describe(tree),
            params=self._ordered(tree),
            files=self._journal.files,
            extra_files=tuple(extras),
            recipe=manifest.plain_data(recipe, "recipe"),
            metadata=manifest.plain_data(dict(metadata or {}), "metadata"),
        )
        with self._writing("what belongs to all steps", SMALL):
            if len(content.files) > 1:
                shards.write_index(self._model, content.files, self._where())
            for name, write in extras.items():
                write(self._model / name)
            manifest.write(self._model, content)
            atomic.sync(self._model)
        made = self._model if convert is None else self._converted(convert, needed)
        with self._writing("the name"):
            self._publish(made)
        self.close()
        return self._target

    def close(self) -> None:
        """Let other processes go on with it. A ``with`` block does this at its end."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        try:
            partial.tidy(self._place, self._target)
        finally:
            os.close(handle)

    def __enter__(self) -> "StreamWriter":
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close, and tell whoever interrupted it how to go on."""
        if error is not None and self._handle and not isinstance(error, WriteError):
            error.add_note(self.how_to_resume)
        self.close()

    def _check_open(self) -> None:
        if self._handle is None:
            raise ValueError(
                f"the writer of {self._target} is closed; open_stream makes another"
            )

    @contextmanager
    def _writing(self, what: str, more: int = 0) -> Iterator[None]:
        """Explain a failing disk, and go back to the last commit."""
        needed = self._step.bytes + more
        failed = f"could not write {what} of {self._target}"
        try:
            with _explained(failed, self._target, needed, lambda: self.how_to_resume):
                atomic.check_room(self._place, needed)
                yield
        except Exception:
            self._go_back()
            raise

    def _go_back(self) -> None:
        # What the disk says counts: the failure may have come after the commit.
        self._journal = journal.read(self._place)
        self._step = _Unfinished()
        self._taken = _all_names(self._journal)
        partial.settle(self._place, self._journal)

    def _write_shard(self) -> None:
        """Write the tensors that wait into the next file, and forget them."""
        step = self._step
        number = len(self._journal.files) + len(step.files) + 1
        name = f"model-{number:05}.safetensors"
        step.files[name] = self._write(self._model / name, step.tensors, step.arrays)
        atomic.sync_folder(self._model)
        step.tensors, step.arrays, step.bytes = {}, {}, 0
        give_back()

    def _write_state(
        self, arrays: Mapping[str, Any], tensors: Tensors
    ) -> journal.State:
        name = f"state-{len(self._journal.steps) + 1:05}.safetensors"
        data = self._write(self._place / name, tensors, arrays)
        return journal.State(name, data, tensors)

    def _write(
        self, path: Path, tensors: Tensors, arrays: Mapping[str, Any]
    ) -> DataFile:
        data = safetensors.write(
            path, tensors, lambda name: placement.fetch(arrays[name])
        )
        atomic.sync_file(path)
        return data

    def _record(self, now: journal.Journal) -> None:
        """Commit: from one line to the next, the step is finished."""
        old = self._journal.state
        journal.write(self._place, now)
        self._journal, self._step = now, _Unfinished()
        if old is not None and old != now.state:
            (self._place / old.file).unlink(missing_ok=True)

    def _converted(self, convert: Callable[[Path, Path], None], needed: int) -> Path:
        """Return another folder, made of the finished checkpoint, which stays."""
        folder = self._place / partial.CONVERTED
        failed = f"could not write {self._target}"
        try:
            with _explained(failed, self._target, needed, lambda: self.how_to_resume):
                atomic.check_room(self._place, needed)
                folder.mkdir()
                convert(self._model, folder)
                atomic.sync(folder)
        except Exception:
            atomic.remove(folder)
            raise
        return folder

    def _publish(self, made: Path) -> None:
        atomic.refuse(self._target, self._may_replace)
        seal = partial.seal(made)
        self._record(dataclasses.replace(self._journal, published=seal))
        atomic.publish(made, self._target)
        atomic.sync_folder(self._target.parent)

    def _ordered(self, tree: Any) -> dict[str, parameter.Abstract]:
        """Return the parameters in the order of the tree, which must hold them all."""
        leaves, params = structure.flatten(tree), self._journal.params
        odd = sorted(set(leaves) ^ set(params))
        if odd:
            where = "was not put" if odd[0] in leaves else "is not in the tree"
            raise MismatchError(
                f"{odd[0]!r} {where} ({len(params)} parameters were put, and the tree "
                f"has {len(leaves)}): finish with the tree of what was put"
            )
        for path, leaf in leaves.items():
            found = getattr(params[path], "shape", ())
            shape = getattr(leaf, "shape", found)
            if tuple(shape) != tuple(found):
                raise MismatchError(
                    f"{path!r} was put with shape {found}, and the tree has {shape}"
                )
        return {path: params[path] for path in leaves}

    def _where(self) -> dict[str, str]:
        """Return the file of every tensor."""
        return {
            tensor: file
            for file in self._journal.files
            for tensor in safetensors.read_header(self._model / file).entries
        }


@dataclasses.dataclass
class _Unfinished:
    """What was put since the last commit: files written, and tensors that wait."""

    params: dict[str, parameter.Abstract] = dataclasses.field(default_factory=dict)
    files: dict[str, DataFile] = dataclasses.field(default_factory=dict)
    tensors: dict[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)
    arrays: dict[str, Any] = dataclasses.field(default_factory=dict)
    bytes: int = 0


def _names(path: str, leaf: parameter.Abstract) -> set[str]:
    """Return the path of a parameter, and the names of its tensors."""
    return {path, *(name for name, _ in parameter.tensors(path, leaf))}


def _all_names(found: journal.Journal) -> set[str]:
    return set().union(*(_names(path, a) for path, a in found.params.items()))


def _state_tensors(state: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    tensors: dict[str, jax.ShapeDtypeStruct] = {}
    for name, array in state.items():
        held = parameter.abstract(name, array)
        if not isinstance(held, jax.ShapeDtypeStruct):
            raise UnsupportedError(
                f"state[{name!r}] is {parameter.describe(held)}; a state holds arrays"
            )
        tensors[name] = held
    return tensors


@contextmanager
def _explained(
    failed: str, target: Path, needed: int, remedy: Any = lambda: ""
) -> Iterator[None]:
    """Turn what the system says into a `WriteError` with the bytes that it is about."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        room = f"{atomic.room(target):,} are free there; make room. {remedy()}"
        raise WriteError(
            error.errno,
            f"{failed}: {error.strerror or error}. It needs about {needed:,} bytes, "
            f"and {room.strip()}",
        ) from error
