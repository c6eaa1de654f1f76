"""A stage's run: what a stage sees of MLflow."""

import getpass
import json
import logging
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from schemas import environment
from schemas.colours import COLOURS
from schemas.errors import Problem, StageError, refuse
from schemas.stage import SOURCE, Artifact, Request, Result
from schemas.text import one_line
from stages.runtime.context import Answered, Recorded
from stages.runtime.workspace import place, work_folder
from stages.tracking.flavour import describe
from stages.tracking.journal import Journal, journal_file, log_on_model, points_of
from stages.tracking.mlflow_client import (
    client,
    experiment,
    experiment_name,
    plain_client,
    value_classes,
)
from stages.tracking.names import PARAM_LENGTH, TAG_LENGTH, acceptable_name, flatten, shortened, shown_name
from stages.tracking.problems import first_line, without_passwords
from stages.tracking.reuse import recorded, runs_with
from stages.tracking.store import arrived, digest, fetch, keep
from stages.tracking.traces import log_answers

log = logging.getLogger("alignflow")

ENTRIES_PER_BATCH = 100
PROGRESS_SECONDS = 5.0
LIVE_SECONDS, LIVELY_SECONDS = 0.5, 60.0
"""For a terminal that shows bars: between two lines, as long as a piece of work is so young."""


@cache
def code_version() -> str:
    """The package's version, and in a checkout the git commit: `0.1.0+1a2b3c4d5e6f`, with `.dirty` where changed."""
    try:
        version = metadata.version("alignflow")
    except metadata.PackageNotFoundError:  # run from a plain folder
        version = "unknown"
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return version
    command = [
        "git",
        "--no-optional-locks",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty=.dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine, or not one that answers
        return version
    return f"{version}+{commit}" if commit else version


def for_pages(request: Request) -> dict[str, str]:
    """What MLflow's pages show of a run: who started it, from which code, what it is, and the colour of its curves."""
    method = request.tags.get("method") or request.params.get("method")
    commit = code_version().partition("+")[2].removesuffix(".dirty")
    what = f"Stage `{request.stage}`" + (f", method `{method}`" if method else "")
    what += f", of the pipeline run `{request.pipeline_run}`." if request.pipeline_run else "."
    if request.stage in ("base", "sft", "align"):
        what += f" Talk to the model: `alignflow chat {request.label}`."
    values = {
        "mlflow.user": user(),
        "mlflow.source.name": f"stages {request.stage}",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit,
        "mlflow.note.content": what,
        "mlflow.runColor": COLOURS.get(str(method or request.label), ""),
    }
    return {name: value for name, value in values.items() if value}


def user() -> str:
    """Who runs this; empty where the system does not know, as in a container with a number for a user."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


Told = Callable[[str, Callable[[], str]], str]
"""Called with a name and what finds something out: the first rank calls it, and all get what it returns."""


class StageRun:
    """One MLflow run of a stage; use it as a context manager. On rank > 0 all its methods that write do nothing.

    Leaving the block closes the MLflow run: FINISHED, KILLED on a preemption, FAILED on any other error.
    """

    def __init__(self, request: Request, told: Told = lambda name, work: work()) -> None:
        """told: how several ranks share what the first one has found out (stages/engine/torchrun.py)."""
        self.request, self._told, self._curves = request, told, set[str]()
        self.key = request.key()
        self.work = work_folder(self.key)
        self.rank = int(os.environ.get("RANK", "0"))
        self.run_id = ""
        self.outputs: dict[str, Artifact] = {}
        self.result: Result | None = None
        self._fetched: dict[str, Path] = {}
        self._pace = Pace()
        self._dataset: tuple[str, str] | None = None
        self.work.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        if self.rank == 0:
            continued = self._open()
            journal = journal_file(self.key, self.run_id)
            elsewhere = continued and not journal.exists()  # another host has begun the run
            self._journal = Journal(journal, self.run_id, points_of(self.run_id) if elsewhere else None)
            self._describe()
        return self

    def _open(self) -> bool:
        """Continue the run that a stopped process has left for this key, else start one; whether it continues."""
        left = runs_with(self.key, "attributes.status != 'FINISHED'")
        if left:
            self.run_id = left[0].info.run_id
            log.info("continuing run %s, which was interrupted (%s)", self.run_id, left[0].info.status)
            client().update_run(self.run_id, status="RUNNING")
            if "problem" in left[0].data.tags:
                client().delete_tag(self.run_id, "problem")
            return True
        name = experiment(experiment_name(self.request))
        tags = {"stage.key": self.key, **for_pages(self.request), **place()}
        self.run_id = client().create_run(name, tags=tags, run_name=self.request.label).info.run_id
        return False

    def _describe(self) -> None:
        """Tags, parameters and the full config."""
        request = self.request
        tags = {
            "stage": request.stage,
            "stage.version": str(request.version),
            "stage.key": self.key,
            "pipeline.run": request.pipeline_run,
            "method": request.params.get("method") if request.stage == "align" else None,
            "model": request.name if request.spec.makes in ("model", "evaluation") else None,
            "code.version": code_version(),
        }
        tags |= place() | {f"input.{name}": artifact.sha256 for name, artifact in request.inputs.items()} | request.tags
        self._tags({name: value for name, value in tags.items() if value is not None})
        self.text(request.model_dump_json(indent=2), "config.json")
        self.params({**request.params, "seed": request.seed, **request.about})

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.rank > 0:
            return
        status = "FINISHED"
        if error is not None:
            preempted = isinstance(error, StageError) and error.status == "preempted"
            status = "KILLED" if preempted or isinstance(error, KeyboardInterrupt) else "FAILED"
        try:
            try:
                self._journal.close()
                if error is None:
                    keep(f"runs:/{self.run_id}")  # before MLflow calls it finished, and before its checkpoints go
            finally:
                client().set_terminated(self.run_id, status)
        except Exception as second:
            if error is None:
                raise
            log.warning("MLflow has not recorded the run's end: %s", first_line(second))  # the first error matters

    def finish(self, metrics: Mapping[str, float]) -> Result:
        """Log the final metrics, but for a point more of curves, and leave the result where `find` looks for it."""
        final = {
            name: value for name, value in metrics.items() if not (name.startswith("train/") or name in self._curves)
        }
        on_model = self._on_model(final)
        self.metrics({name: value for name, value in final.items() if name not in on_model})
        self.result = Result(
            status="done", key=self.key, run_id=self.run_id, outputs=self.outputs, metrics=dict(metrics)
        )
        self.text(self.result.model_dump_json(indent=2), "result.json")
        return self.result

    def _on_model(self, metrics: Mapping[str, float]) -> set[str]:
        """Log the numbers of an evaluation on the model that it is of; returns their names. A gate's, at a temperature
        of its own, and those of a sweep's test part would be taken for them.
        """
        request, model = self.request, self.request.inputs.get("model")
        own = request.stage == "evaluate" and request.params.get("part", "eval") == "eval"
        if self.rank > 0 or not own or request.params.get("gate") or model is None:
            return set()
        if not model.uri.startswith("models:/m-"):
            return set()
        measured = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        return log_on_model(self.run_id, model.uri.removeprefix("models:/"), self._dataset, measured)

    def fail(self, problem: Problem, trace: str | None = None) -> None:
        """Record on the run why the stage stops; log where even that fails."""
        try:
            self.tag("problem", str(problem))
            if trace:
                self.text(without_passwords(trace), "traceback.txt")
        except Exception as error:
            log.warning("the reason why the stage stopped could not be recorded in MLflow: %s", first_line(error))

    def has(self, name: str) -> bool:
        """Whether the request brings an input of that name."""
        return name in self.request.inputs

    def input(self, name: str) -> Path:
        """Local folder of an input, verified once.

        Raises:
            StageError: the request has no such input, or the artifact is gone or altered.
        """
        if name not in self.request.inputs:
            have = ", ".join(sorted(self.request.inputs)) or "none"
            message = f"stage {self.request.stage} needs the input {name!r}; the request has {have}."
            raise refuse(f"inputs.{name}", "missing", message, "add it to the request", kind="input")
        if name not in self._fetched:
            self._fetched[name] = Path(self._told(f"input {name}", lambda: str(fetch(self.request.inputs[name]))))
        return self._fetched[name]

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics at a step, or without one as final. Returns at once; NaN and infinity are logged as such."""
        self._curves |= values.keys() if step else set()
        if self.rank == 0:
            self._journal.add({shown_name(name): value for name, value in values.items()}, step)

    def params(self, values: Mapping[str, object]) -> None:
        """Log parameters, flat; long values are shortened (config.json has them whole), known names are left alone."""
        if self.rank > 0:
            return
        known = client().get_run(self.run_id).data.params
        flat = {acceptable_name(name): value for name, value in flatten(values).items()}
        values = {name: shortened(value, PARAM_LENGTH) for name, value in flat.items() if name not in known}
        new = [value_classes().Param(name, value) for name, value in values.items()]
        for start in range(0, len(new), ENTRIES_PER_BATCH):
            batch = new[start : start + ENTRIES_PER_BATCH]
            client().log_batch(self.run_id, params=batch)

    def tag(self, name: str, value: object) -> None:
        """Set a tag of the run."""
        if self.rank == 0:
            self._tags({name: value})

    def _tags(self, values: Mapping[str, object]) -> None:
        tag = value_classes().RunTag
        tags = [tag(acceptable_name(name), shortened(str(value), TAG_LENGTH)) for name, value in values.items()]
        client().log_batch(self.run_id, tags=tags)

    def file(self, path: Path, folder: str = "") -> None:
        """Log a file as an artifact of the run, in a folder of it."""
        if self.rank == 0:
            client().log_artifact(self.run_id, str(path), folder or None)

    def text(self, text: str, name: str) -> None:
        """Log a text as an artifact file of that name."""
        if self.rank == 0:
            clean = text.encode(errors="replace").decode()  # a lone surrogate cannot be written
            client().log_text(self.run_id, clean, name)

    def table(self, columns: Mapping[str, list[Any]], name: str) -> None:
        """Log a table that MLflow's UI shows side by side across runs, e.g. as `eval/samples.json`.

        Written here and not by MLflow's `log_table`, which appends to what a killed process has left.
        """
        if self.rank > 0:
            return
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        self.text(json.dumps({"columns": list(columns), "data": rows}), name)
        self._tables = [*getattr(self, "_tables", []), {"path": name, "type": "table"}]
        self.tag("mlflow.loggedArtifacts", json.dumps(self._tables))

    def answers(self, answers: Sequence[Answered], judge: str) -> None:
        """Log answers, and what a kind of judge says of them, for MLflow's evaluation pages; warn where it fails."""
        if self.rank > 0 or not answers:
            return
        model = self.request.inputs.get("model")
        logged = model.uri.removeprefix("models:/") if model and model.uri.startswith("models:/m-") else None
        log_answers(self.run_id, logged, self.request.name or self.request.label, answers, judge)

    def dataset(self, name: str, path: str, digest: str, rows: int) -> None:
        """Log which data the run has seen, with a sha256 of all of it (MLflow's own looks at the first rows only)."""
        if self.rank > 0:
            return
        entities = value_classes()
        dataset = entities.Dataset(
            name=shortened(name, 500),
            digest=digest[:36],
            source_type="local",
            source=json.dumps({"uri": path}),
            profile=json.dumps({"num_rows": rows, "sha256": digest}),
        )
        context = [entities.InputTag("mlflow.data.context", self.request.stage)]
        client().log_inputs(self.run_id, datasets=[entities.DatasetInput(dataset=dataset, tags=context)])
        self._dataset = (dataset.name, dataset.digest)

    def publish(self, name: str, folder: Path, model: bool = False) -> Artifact:
        """Store a folder as an output of the stage; a model becomes a LoggedModel, visible once it is whole."""
        if self.rank > 0:
            return Artifact(uri="", sha256="")
        for read, source in self.request.inputs.items():
            if read.partition(".")[0] == SOURCE and digest(self.input(read)) != source.sha256:
                message = "it changed while it was read; nothing is published."
                fix = "start the run again once nothing writes to it"
                raise refuse(read, source.uri, message, fix, kind="source_changed")
        if model:
            describe(folder)
        sha256 = digest(folder)
        if model:
            uri = self._publish_model(folder, sha256)
        else:
            taken, place = {file.path for file in client().list_artifacts(self.run_id)}, name
            while place in taken:
                place += "-again"  # a killed process has left part of it
            client().log_artifacts(self.run_id, str(folder), place)
            uri = f"runs:/{self.run_id}/{place}"
        self.outputs[name] = Artifact(uri=uri, sha256=sha256)
        if not arrived(self.outputs[name], folder):
            message = f"{folder} changed while it was published."
            raise StageError(message, status="failed", kind="artifact", fix="run the stage again")
        keep(uri)
        self.tag(f"output.{name}", sha256)
        return self.outputs[name]

    def _publish_model(self, folder: Path, sha256: str) -> str:
        entities, request = value_classes(), self.request
        run = client().get_run(self.run_id)
        model = client().create_logged_model(
            run.info.experiment_id,
            name=re.sub(r"[^\w\- ]", "_", self.request.label),
            source_run_id=self.run_id,
            tags={"sha256": sha256, "stage": request.stage, "stage.key": self.key},
            params={k: shortened(v, PARAM_LENGTH) for k, v in flatten(request.params).items()},
            model_type=request.stage,
        )
        try:
            client().log_model_artifacts(model.model_id, str(folder))
        except BaseException:
            plain_client().finalize_logged_model(model.model_id, entities.LoggedModelStatus.FAILED)
            raise
        client().finalize_logged_model(model.model_id, entities.LoggedModelStatus.READY)
        client().log_outputs(self.run_id, [entities.LoggedModelOutput(model.model_id, 0)])
        return f"models:/{model.model_id}"

    def recorded(self, what: str, curves: Sequence[str] = ()) -> Recorded | None:
        """What a run has logged: `reuse.recorded`. On rank > 0 nothing."""
        return recorded(what, curves) if self.rank == 0 else None

    def progress(self, done: int, total: int, what: str) -> None:
        """Print progress to stderr, every few seconds and at the end: `sft  120/400 steps  0:34 left`."""
        if self.rank > 0:
            return
        now = time.monotonic()
        if done <= self._pace.done or total != self._pace.total:
            self._pace = Pace(began=now, first=done, total=total)
        pace = self._pace
        pace.done = done
        lively = environment.live() and now - pace.began < LIVELY_SECONDS
        if done < total and now - pace.printed < (LIVE_SECONDS if lively else PROGRESS_SECONDS):
            return
        pace.printed = now
        left = ""
        if pace.first < done < total:
            seconds = math.ceil((now - pace.began) / (done - pace.first) * (total - done))
            hours, minutes = divmod(seconds // 60, 60)
            clock = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
            left = f"  {clock}:{seconds % 60:02d} left"
        sys.stderr.write(f"{one_line(self.request.label)}  {done}/{total} {what}{left}\n")
        sys.stderr.flush()


@dataclass
class Pace:
    """The pace of a piece of work: when it began, how far it was then, and when it was last printed."""

    began: float = 0.0
    first: int = 0
    total: int = -1
    done: int = -1
    printed: float = -math.inf
