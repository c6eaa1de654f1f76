"""Metrics on their way to MLflow: written to a file at once, shipped by a side thread; and what a death leaves.

MLflow's own asynchronous logging keeps its queue in memory, so that a kill loses it.
"""

import json
import logging
import math
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from stages.runtime.workspace import home, lock_if_free, move_aside, work_folder, write_whole
from stages.tracking.mlflow_client import client, plain_client, retrying, runs, value_classes
from stages.tracking.names import acceptable_name
from stages.tracking.problems import first_line

log = logging.getLogger("alignflow")

SHIP_SECONDS = 2.0
METRICS_PER_BATCH = 1000


def journal_file(key: str, run_id: str) -> Path:
    """Where a run's metrics are written down until its stage is done."""
    return work_folder(key) / f"metrics-{run_id}.jsonl"


def points_of(run_id: str) -> dict[tuple[str, int], bool]:
    """(name, step) of all metrics that MLflow has of a run, and whether their value is finite."""
    points: dict[tuple[str, int], bool] = {}
    for name in client().get_run(run_id).data.metrics:
        for point in client().get_metric_history(run_id, name):
            points[name, point.step] = math.isfinite(point.value)
    return points


def point_of(line: bytes) -> tuple[str, float, int, int] | None:
    """A line's name, value, step and time; None where it is not what `Journal.add` writes, so that MLflow would refuse
    it, and all after it, for ever.
    """
    try:
        name, value, step, when = json.loads(line)
        point = (str(name), float(value), int(step), int(when))
        same = isinstance(value, str) and point[0] == name and point[2:] == (step, when)
        return point if same and acceptable_name(name) == name and max(abs(step), abs(when)) < 2**63 else None
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None


class Journal:
    """Metrics in a local file, shipped to MLflow by a side thread; training never waits for it, and no line is lost.

    Each line holds its timestamp, so that shipping a line twice (after a crash, or when an answer got lost) leaves one
    point in MLflow. A point that is already there, from before a resume, is not written again.
    """

    def __init__(self, path: Path, run_id: str, known: Mapping[tuple[str, int], bool] | None = None) -> None:
        """`known`: points (name, step) that MLflow has and this journal has not, and whether their value is finite."""
        self.run_id = run_id
        self._seen: dict[tuple[str, int], bool] = dict(known or {})
        """Points that are written down, and whether their value is finite: a step that fails is done again."""
        self._waiting: list[tuple[str, float, int, int]] = []
        self._guard = threading.Lock()
        self._closing = threading.Event()
        self._error: Exception | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._read(path)
        self._file = path.open("a", buffering=1)
        self._thread = threading.Thread(target=self._ship_on, name="metrics", daemon=True)
        self._thread.start()

    def _read(self, path: Path) -> None:
        """Take up what an earlier process has left. A last line cut short by its death is dropped; a journal with
        other lines that are none of a journal's is kept aside, and goes on without them.
        """
        if not path.exists():
            return
        if not path.is_file():
            log.warning("%s is not a file: moved to %s", path, move_aside(path).name)
            return
        lines = path.read_bytes().split(b"\n")
        points = [(line, point_of(line)) for line in lines[:-1]]
        whole = [(line, point) for line, point in points if point is not None]
        if lost := len(points) - len(whole):
            aside = move_aside(path)
            log.warning("%d of %d lines of %s cannot be read: all are kept in %s", lost, len(points), path, aside.name)
        if lost or lines[-1]:
            write_whole(path, "".join(f"{line.decode()}\n" for line, _ in whole))
        for _, (name, value, step, when) in whole:
            self._waiting.append((name, value, step, when))
            self._seen[name, step] = math.isfinite(value)

    def add(self, values: Mapping[str, float], step: int | None) -> None:
        """Write values down; `step` None is a final value, of which the last one counts."""
        when = time.time_ns() // 1_000_000
        with self._guard:
            for name, value in values.items():
                point = (acceptable_name(name), float(value), step or 0, when)
                place, finite = (point[0], point[2]), math.isfinite(value)
                known = self._seen.get(place)
                if step is not None and known is not None and (known or not finite):
                    continue
                self._seen[place] = finite
                # repr: JSON has no NaN and no infinity
                self._file.write(json.dumps([point[0], repr(point[1]), *point[2:]]) + "\n")
                self._waiting.append(point)

    def _ship_on(self) -> None:
        while not self._closing.wait(SHIP_SECONDS):
            try:
                self._ship()
                self._error = None
            except Exception as error:  # kept and tried again; `close` raises what remains
                if self._error is None:
                    log.warning("metrics wait, MLflow does not answer: %s", first_line(error))
                self._error = error

    def _ship(self) -> None:
        while batch := self._waiting[:METRICS_PER_BATCH]:
            metric = value_classes().Metric
            metrics = [metric(name, value, when, step) for name, value, step, when in batch]
            plain_client().log_batch(self.run_id, metrics=metrics)
            with self._guard:
                del self._waiting[: len(batch)]

    def close(self) -> None:
        """Ship what is left. Raises MLflow's error when it stays away; the journal is kept for the next start."""
        self._closing.set()
        self._thread.join()
        retrying(self._ship)
        self._file.close()


def log_on_model(run_id: str, model_id: str, dataset: tuple[str, str] | None, values: Mapping[str, float]) -> set[str]:
    """Log final metrics of a run as those of a LoggedModel too, on a data set (its name and digest), so that MLflow's
    page of models shows them. Returns the names of those that are logged; none, with a warning, where MLflow refuses.
    """
    finite = {name: value for name, value in values.items() if math.isfinite(value)}  # a model's table has no NaN
    entities, when = value_classes(), time.time_ns() // 1_000_000
    about = {"model_id": model_id, "run_id": run_id}
    if dataset is not None:
        about |= {"dataset_name": dataset[0], "dataset_digest": dataset[1]}
    metrics = [entities.Metric(acceptable_name(name), value, when, 0, **about) for name, value in finite.items()]
    try:
        client().log_inputs(run_id, models=[entities.LoggedModelInput(model_id)])
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            client().log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH])
    except Exception as error:  # the model was deleted, say: the run has its metrics all the same
        log.warning("the model's page will not show its evaluation: %s", first_line(error))
        return set()
    return set(finite)


def close_left() -> list[str]:
    """Close the runs that stages of this home have left RUNNING by their death, as KILLED with the tag `problem`.

    Returns their ids. A run lives as long as its stage's lock is held; those of other hosts and homes are left alone. A
    stage that is asked for again resumes in the same run.
    """
    left = runs(f"attributes.status = 'RUNNING' and tags.host = '{socket.gethostname()}'")
    mine = [run for run in left if run.data.tags.get("home") == str(home()) and "stage.key" in run.data.tags]
    return [run.info.run_id for run in mine if _close(run.data.tags["stage.key"], run.info.run_id)]


def _close(key: str, run_id: str) -> bool:
    """Close one run as KILLED, its journal shipped, unless its stage lives or has ended it since it was found."""
    with lock_if_free(work_folder(key) / "lock") as free:
        if not free or client().get_run(run_id).info.status != "RUNNING":
            return False
        if journal_file(key, run_id).exists():
            Journal(journal_file(key, run_id), run_id).close()
        problem = "the process was killed, or its machine went down. Fix: start it again: it resumes"
        client().set_tag(run_id, "problem", problem)
        client().set_terminated(run_id, "KILLED")
    log.info("run %s was left RUNNING by a process that died: closed as KILLED", run_id)
    return True
