"""What a stage and the training loop see of a run. `tracking.StageRun` is this on MLflow; tests keep it in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from schemas.conversation import Message
from schemas.stage import Artifact, Request


@dataclass(frozen=True)
class Recorded:
    """What another stage's run has logged."""

    run_id: str
    stage: str
    began: float
    """Unix time."""
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The last value of each."""
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """Metric -> (step, value) in the order of the steps, of those that were asked for and are there."""
    datasets: Sequence[str] = ()
    """Names of the data that it has read."""


@dataclass(frozen=True)
class Answered:
    """A model's answer to a held-out prompt, and what is said of it, for MLflow's evaluation pages."""

    prompt: Sequence[Message]
    answer: str
    judged: Mapping[str, float | str]
    """Name -> what the judge says."""
    measured: Mapping[str, float] = field(default_factory=dict)
    why: str = ""
    """What the judge has compared it with."""


class StageContext(Protocol):
    """One run of a stage. On rank > 0 all methods that write do nothing."""

    request: Request
    key: str
    """The request's key: checkpoints carry it."""
    work: Path
    """Folder for what must survive a restart of the stage, such as checkpoints; cleared once it is done."""

    def has(self, name: str) -> bool:
        """Whether the request brings an input of that name."""
        ...

    def input(self, name: str) -> Path:
        """Local folder of an input, verified once. Raises StageError when it is missing or altered."""
        ...

    def publish(self, name: str, folder: Path, model: bool = False) -> Artifact:
        """Store a folder as an output of the stage; a model becomes a LoggedModel."""
        ...

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics at a step, or without one as final. Returns at once."""
        ...

    def params(self, values: Mapping[str, object]) -> None:
        """Log parameters, flat; known names are left alone."""
        ...

    def tag(self, name: str, value: object) -> None:
        """Set a tag of the run."""
        ...

    def file(self, path: Path, folder: str = "") -> None:
        """Log a file as an artifact of the run, in a folder of it."""
        ...

    def table(self, columns: Mapping[str, list[Any]], name: str) -> None:
        """Log a table that MLflow's UI shows side by side across runs."""
        ...

    def answers(self, answers: Sequence[Answered], judge: str) -> None:
        """Log answers, and what a kind of judge says of them, for MLflow's evaluation pages; warn where it fails."""
        ...

    def dataset(self, name: str, path: str, digest: str, rows: int) -> None:
        """Log which data the run has seen, with its sha256."""
        ...

    def progress(self, done: int, total: int, what: str) -> None:
        """Say every few seconds how far the stage is."""
        ...

    def recorded(self, what: str, curves: Sequence[str] = ()) -> Recorded | None:
        """What a run has logged, with the points of some metrics; None where the store does not have it any more.

        what: the run's id, or the sha256 of what it has published, of which the newest finished run counts.
        """
        ...
