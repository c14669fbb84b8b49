"""What the pipeline tells of its progress, so that a killed run can go on."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from jaxq.pipeline.evidence import Evidence


class Journal(Protocol):
    """Takes finished parameters; see `jaxq.checkpoints` for one that keeps them."""

    @property
    def finished(self) -> int:
        """How many blocks an earlier run has finished."""

    @property
    def done(self) -> Iterable[str]:
        """The paths of the parameters that an earlier run has finished."""

    def state(self) -> Mapping[str, Any]:
        """Return the activations behind the last of them."""

    def put(self, path: str, leaf: Any, evidence: Evidence | None = None) -> None:
        """Take a finished parameter that belongs to no block."""

    def commit(
        self,
        block: str,
        leaves: Mapping[str, Any],
        state: Mapping[str, Any],
        evidence: Sequence[Evidence],
    ) -> None:
        """Take a finished block: its parameters, and what the next one starts from."""


class Memory:
    """A journal that keeps parameters in memory, for a run that is never resumed."""

    finished = 0
    done: Iterable[str] = ()

    def __init__(self) -> None:
        self.leaves: dict[str, Any] = {}

    def state(self) -> Mapping[str, Any]:
        """Return nothing: no run came before."""
        return {}

    def put(self, path: str, leaf: Any, evidence: Evidence | None = None) -> None:
        """Keep a finished parameter."""
        self.leaves[path] = leaf

    def commit(
        self,
        block: str,
        leaves: Mapping[str, Any],
        state: Mapping[str, Any],
        evidence: Sequence[Evidence],
    ) -> None:
        """Keep the parameters of a finished block."""
        self.leaves.update(leaves)
