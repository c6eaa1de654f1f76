"""The runs of a home: what each was, how it ended, and what came out first. One small file per run, in `runs/`.

Read without Prefect or MLflow, so that a list of them takes no time. A run that a worker has made is in its own home.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from schemas import Strict, read_stored
from schemas.errors import StageError
from schemas.stage import Result
from schemas.text import one_line
from stages.runtime import workspace

log = logging.getLogger("alignflow")

QUOTE = '"'
"""Around a path that YAML would take for something else."""
SHORT = 8
"""Characters of a run's id that tell it from others."""


class Record(Strict):
    """One run of a pipeline."""

    run: str
    name: str
    """Of its config."""
    began: float
    """Seconds since the epoch."""
    ended: float | None = None
    state: str = "running"
    """`running`, `done` or `stopped`; else the status of the problem that ended it; of a retraining its outcome, or
    `waiting` where it was suspended until a person approves."""
    changed: list[str] = []
    """What `--set` and other options changed: `align.dpo.beta=0.2`."""
    stages: int = 0
    """Those that are done."""
    reused: int = 0
    seconds: dict[str, float] = {}
    """Of each stage that ran: what it took."""
    best: list[str] = []
    """The first model of its comparison, and those that cannot be told apart from it."""
    problem: str | None = None
    place: dict[str, str] = {}
    """Host and home."""
    process: int = 0
    process_began: float = 0.0

    @property
    def alive(self) -> bool:
        """Whether its process exists; of another host that cannot be seen, and is believed."""
        if self.place != workspace.place():
            return True
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.process).create_time() == self.process_began
        return False

    def as_json(self) -> dict[str, Any]:
        """For `alignflow runs --json`: times in ISO 8601, no processes."""
        shown = self.model_dump(exclude={"place", "process", "process_began"})
        times = {name: shown[name] and _local(shown[name]).isoformat(timespec="seconds") for name in ("began", "ended")}
        return shown | times


class Entry:
    """The record of a run that goes on."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def note(self, **values: Any) -> None:
        """Change fields of the record, and write it down. A run does not fail for its line in a list."""
        self.record = self.record.model_copy(update=values)
        try:
            text = self.record.model_dump_json(indent=2)
            workspace.write_whole(workspace.home() / "runs" / f"{self.record.run}.json", text)
        except OSError as error:
            log.warning("`alignflow runs` will not show this: %s", error)

    def count(self, results: Mapping[str, Result], seconds: Mapping[str, float]) -> None:
        """Note how many stages are done, how many of them were reused, and what the others took."""
        reused = sum(result.reused for result in results.values())
        self.note(stages=len(results), reused=reused, seconds={name: round(took, 1) for name, took in seconds.items()})

    def fail(self, error: StageError) -> None:
        """Note the problem that ends the run."""
        self.note(state="stopped" if error.status == "preempted" else error.status, problem=one_line(error, 500))


@contextlib.contextmanager
def recorded(run: str, name: str, changed: Sequence[str]) -> Iterator[Entry]:
    """Write down a run while it lasts, and how it ends."""
    own = psutil.Process()
    changes = [one_line(change, 200) for change in changed]
    process = {"process": own.pid, "process_began": own.create_time(), "place": workspace.place()}
    entry = Entry(Record(run=run, name=name, began=time.time(), changed=changes, **process))
    entry.note()
    try:
        yield entry
    except BaseException:
        entry.note(ended=time.time(), **{"state": "stopped"} if entry.record.state == "running" else {})
        raise
    entry.note(ended=time.time(), **{"state": "done"} if entry.record.state == "running" else {})


def records() -> list[Record]:
    """All runs of this home, the newest first. One that died without a word counts as killed."""
    found = []
    for file in (workspace.home() / "runs").glob("*.json"):
        try:
            record = read_stored(Record, file.read_text())
        except (OSError, ValueError) as error:
            log.warning("%s is passed over: %s", file, one_line(error, 200))
            continue
        dead = record.state == "running" and not record.alive
        found.append(record.model_copy(update={"state": "killed"}) if dead else record)
    return sorted(found, key=lambda record: -record.began)


def usual_seconds(name: str) -> dict[str, float]:
    """What each stage took in runs of a config of that name, the newest counting first; empty where none has ended."""
    usual: dict[str, float] = {}
    for record in records():
        if record.name == name:
            usual = record.seconds | usual
    return usual


def find(which: str) -> Record | None:
    """The newest run with this id or beginning of an id, or of this name; None where there is none here."""
    return next((one for one in records() if which == one.name or is_id(which, one.run)), None)


def run_name(name: str, changed: Sequence[str]) -> str:
    """A run's name in Prefect, with what differs from its file: `demo dpo.beta=0.3`; of paths the last part."""
    parts = [change.removeprefix("align.").partition("=") for change in sorted(changed)]  # tags have no order
    short = [f"{key}={value.rpartition('/')[2].rstrip(QUOTE)}" for key, _, value in parts]
    return one_line(" ".join([Path(name).stem if name.endswith((".yaml", ".yml")) else name, *short]), 120)


def is_id(which: str, run: str) -> bool:
    """Whether a word names a run: its id, or the beginning of it that lists show."""
    return which == run or (len(which) >= SHORT and run.startswith(which))


def as_text(shown: Sequence[Record], width: int) -> str:
    """A line per run, cut at the width of the terminal."""
    if not shown:
        return "No run yet. Start one with: alignflow run demo"
    head = ["run", "name", "when", "state", "stages", "best", "changed"]
    lines = [head]
    for one in shown:
        stages = f"{one.stages} ({one.reused} reused)" if one.reused else str(one.stages or "")
        when = f"{_local(one.began):%Y-%m-%d %H:%M}"
        lines.append([one.run[:SHORT], one.name, when, one.state, stages, ", ".join(one.best), " ".join(one.changed)])
    widths = [min(24, max(len(line[i]) for line in lines)) for i in range(len(head) - 1)]
    cells = (
        "  ".join(
            [*(one_line(cell, most).ljust(most) for cell, most in zip(line, widths, strict=False)), one_line(line[-1])]
        )
        for line in lines
    )
    return "\n".join(one_line(text.rstrip(), width) for text in cells)


def _local(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds).astimezone()
