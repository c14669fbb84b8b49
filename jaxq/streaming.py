"""`quantize_to`: quantize a model into a folder without ever holding all of it."""

import dataclasses
import importlib.metadata
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxq.checkpoints import inspect, saving
from jaxq.checkpoints.errors import UnsupportedError
from jaxq.checkpoints.identity import file_identity
from jaxq.checkpoints.stream import StreamWriter, open_stream
from jaxq.codecs.folder import may_replace
from jaxq.convert import TARGETS, Conversion, fill
from jaxq.convertible import JAXQ, opened
from jaxq.heap import give_back
from jaxq.model import Calibration, Model, timings
from jaxq.names import lookup
from jaxq.pipeline import Calibration as Data
from jaxq.pipeline import Evidence, Progress, run_plan
from jaxq.plan import plan
from jaxq.recipe import Recipe
from jaxq.rehearsal import rehearse
from jaxq.spec import QuantSpec

REST = "rest"
REST_BYTES = 2**28
LARGE = 2**20  # bytes of a parameter that leaves as many behind


@dataclasses.dataclass(frozen=True)
class Written:
    """What `quantize_to` made.

    Attributes:
        path: the folder.
        recipe: what was done.
        evidence: of every quantized weight, by path, as plain data.
        resumed: how many blocks an earlier run had finished.
        bytes: of its weights, as they are stored.
        bits_per_weight: the same for each weight, float ones included.
        conversion: what became of every tensor in another library's format; None in
            jaxq's own.
    """

    path: Path
    recipe: Recipe
    evidence: Mapping[str, Any]
    resumed: int
    bytes: int
    bits_per_weight: float
    conversion: Conversion | None = None

    @property
    def fallbacks(self) -> dict[str, str]:
        """The weights that are not what the recipe asked for, and why."""
        found = ((path, e.get("fallback")) for path, e in self.evidence.items())
        return {path: why for path, why in found if why}


def quantize_to(  # noqa: PLR0913  one verb, and what it may be told
    lm: Model,
    path: str | Path,
    cfg: str | Recipe | QuantSpec,
    calibration: Calibration | None = None,
    group_size: int | None = None,
    *,
    to: str = JAXQ,
    resume: bool = False,
    overwrite: bool = False,
    shard_bytes: int = 5 * 10**9,
    progress: Progress | None = None,
) -> Written:
    """Quantize a model block after block, each written as it is done.

    With a model loaded by ``load_model(path, lazy=True)`` no more than one block's
    float weights, its statistics and the calibration activations are in memory, however
    deep the model. A run that is killed can be resumed at the last finished block, and
    the folder is then the same, byte for byte, but for ``timings.json``.

    Another library's format is made of jaxq's own when all blocks are finished, tensor
    by tensor, as `jaxq.convert` does it (layer by layer where input scales are folded);
    till then both are on the disk. What the format cannot express is refused before
    anything is solved, as far as that is known without the weights; what is found out
    later leaves a checkpoint of jaxq's own.

    Args:
        lm: a float model.
        path: the folder to write; `jaxq.load_model` reads it.
        cfg: a preset's name, a `Recipe`, or a `QuantSpec` for every product.
        calibration: as for `LM.quantize`.
        group_size: replaces the recipe's group size.
        to: the format, one of `jaxq.convert.TARGETS`.
        resume: whether to go on with what an interrupted run left in ``PATH.partial``.
            Refused, with the difference, when recipe, model, data or format are others.
        overwrite: whether a checkpoint at ``path`` is replaced, and what an interrupted
            run left is thrown away.
        shard_bytes: the limit of one file.
        progress: called after every parameter.

    Raises:
        ValueError: as `LM.quantize` does.
        CheckpointError: as `jaxq.save` does, or when there is nothing to resume.
        UnsupportedError: the format cannot express what the recipe makes.

    Example:
        >>> import jaxq
        >>> lm = jaxq.load_model("demo", lazy=True)
        >>> jaxq.quantize_to(lm, "small", "w4a16").path.name  # doctest: +SKIP
        'small'
    """
    lookup(TARGETS, to, "format")
    recipe = lm.recipe_for(cfg, group_size)
    given = lm.calibration_data(recipe, calibration)
    batches, about = given.batches, given.about
    todo = plan(lm.forward, lm.params, recipe, *batches[0])
    converter = None
    if to != JAXQ:
        needed = rehearse(lm, todo, to, shard_bytes)
        converter = Converter(Path(path), to, shard_bytes, needed)
    more = converter.needed if converter else 0
    fingerprint = {
        "recipe": recipe.to_dict(),
        "model": {} if lm.folder is None else file_identity(lm.folder),
        "calibration": dict(about),
        "batch": [list(map(int, batch[0].shape)) for batch in batches],
        "to": to,
        "jaxq": _version("jaxq"),
        "jax": jax.__version__,
    }
    with open_stream(
        path,
        fingerprint=fingerprint,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        resume=resume,
        needed=todo.bytes_after + more,
        may_replace=may_replace if converter else saving.may_replace,
    ) as writer:
        journal = StreamJournal(writer, frozenset(row.path for row in todo.quantized))
        data = Data(lm.forward, batches, given.masks)
        resumed = journal.finished
        evidence = run_plan(todo, lm.params, data, journal, progress)
        journal.close()
        seconds = {e.path: e.seconds for e in evidence}
        found = journal.evidence()
        small = dataclasses.replace(
            lm, recipe=recipe, evidence=found, calibration=about
        )
        timed = {p: row | {"seconds": seconds.get(p, 0.0)} for p, row in found.items()}
        folder = writer.finish(
            lm.params,
            recipe=recipe,
            metadata=small.metadata(),
            extra_files={**lm.files, **timings(timed)},
            convert=converter,
            needed=more,
        )
    size = converter.bytes if converter else inspect(folder).bytes
    weights = sum(math.prod(row.shape) for row in todo)
    done = converter.done if converter else None
    return Written(folder, recipe, timed, resumed, size, size * 8 / weights, done)


@dataclasses.dataclass
class Converter:
    """Makes another library's folder of a finished checkpoint.

    Attributes:
        target: the folder's name in the end.
        to: its format.
        shard_bytes: the limit of one file.
        needed: about how many bytes that takes on the disk.
        done: what was done, and
        bytes: of the weights that were written, once it is.
    """

    target: Path
    to: str
    shard_bytes: int
    needed: int
    done: Conversion | None = None
    bytes: int = 0

    def __call__(self, model: Path, folder: Path) -> None:
        """Write the checkpoint in one folder into another, empty one.

        Raises:
            UnsupportedError: the format cannot express a weight; says how to go on.
        """
        found = opened(model, self.to, False)
        try:
            rows = fill(folder, found, self.to, False, self.shard_bytes)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"{error}\nwhat was solved is kept in {model}, a checkpoint of jaxq's "
                f"own: jaxq convert {model} {self.target} --to {self.to} --requantize"
            ) from error
        self.done = Conversion(self.target, found.codec, self.to, rows, found.notes)
        kinds = (".safetensors", ".gguf")
        files = (file for file in folder.iterdir() if file.suffix in kinds)
        self.bytes = sum(file.stat().st_size for file in files)


@dataclasses.dataclass
class StreamJournal:
    """A pipeline's journal on the disk.

    Attributes:
        writer: writes it.
        quantized: the paths of the parameters that the recipe quantizes.
    """

    writer: StreamWriter
    quantized: frozenset[str]

    def __post_init__(self) -> None:
        """Look at what an earlier run left."""
        self._done = frozenset(self.writer.paths)
        self._rest: list[Evidence] = []
        self._bytes = 0

    @property
    def finished(self) -> int:
        """How many blocks are finished."""
        return sum(not step.startswith(REST) for step in self.writer.steps)

    @property
    def done(self) -> Iterable[str]:
        """The paths of the parameters that an earlier run has finished."""
        return self._done

    def state(self) -> Mapping[str, Any]:
        """Return the activations behind the last finished block."""
        return self.writer.state()

    def put(self, path: str, leaf: Any, evidence: Evidence | None = None) -> None:
        """Take a finished parameter; commit what no block does, piece by piece."""
        self.writer.put(path, leaf)
        if leaf.nbytes >= LARGE:
            give_back()  # what it was made of
        self._bytes += leaf.nbytes
        self._rest += [] if evidence is None else [evidence]
        if self._bytes >= REST_BYTES:
            self.close()

    def commit(
        self,
        block: str,
        leaves: Mapping[str, Any],
        state: Mapping[str, Any],
        evidence: Sequence[Evidence],
    ) -> None:
        """Write a finished block."""
        for path, leaf in leaves.items():
            self.writer.put(path, leaf)
        step = f"block {self.finished}: {block}"
        self.writer.commit(step, state, _plain(evidence))

    def close(self) -> None:
        """Commit what was put and belongs to no block."""
        if self._bytes:
            step = f"{REST} {len(self.writer.steps) - self.finished}"
            self.writer.commit(step, None, _plain(self._rest))
        self._rest, self._bytes = [], 0

    def evidence(self) -> dict[str, Any]:
        """Return all evidence that was committed, by path."""
        steps = self.writer.evidence().values()
        return {path: row for step in steps for path, row in (step or {}).items()}


def _plain(evidence: Sequence[Evidence]) -> dict[str, Any]:
    """Return evidence as plain data, without what differs from run to run."""
    out = {}
    for one in evidence:
        row = one.to_dict()
        row.pop("seconds", None)
        out[one.path] = row
    return out


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "from source"
