"""What past runs have left in MLflow, looked up by the names that people use. Reads only."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from flows.results import history
from schemas import read_stored
from schemas.errors import StageError, refuse
from schemas.promotion import GATE_TAG
from schemas.stage import STAGES, Artifact, Request, Result
from stages import tracking

log = logging.getLogger("alignflow")

T = TypeVar("T", bound=BaseModel)

CLOCKS_DIFFER = 5 * 60 * 1000
"""Milliseconds by which the clocks of two hosts may differ."""

ACROSS = "compared.runs"
"""Tag of a comparison of two pipeline runs (flows/results/across.py): their ids."""

MODEL_STAGES = {name for name, spec in STAGES.items() if spec.makes == "model"}


@dataclass(frozen=True)
class Model:
    """A model, the stage run that made it, and the run that evaluated it; the runs only where MLflow has them."""

    name: str
    folder: Path
    request: Request | None = None
    tags: dict[str, str] | None = None
    metrics: dict[str, float] | None = None
    judged: Mapping[str, str] = field(default_factory=dict)
    """The parameters of its evaluation."""


@dataclass(frozen=True)
class Comparison:
    """The comparison that ended a pipeline run."""

    pipeline_run: str
    folder: Path
    run_id: str
    """MLflow's run of the stage."""


def search(condition: str) -> list[Any]:
    """Finished MLflow runs of all experiments that meet a condition, last used first."""
    runs = tracking.runs(f"attributes.status = 'FINISHED' and {condition}")
    return sorted(runs, key=_last_used, reverse=True)


def _last_used(run: Any) -> tuple[bool, int]:
    """When a pipeline run made it, or took it again, in milliseconds. A time to come is that of a clock that was wrong:
    a run with no other comes after those with a time that can be right.
    """
    times = [run.info.start_time, int(run.data.tags.get("pipeline.reused_at", 0))]
    past = [when for when in times if 0 < when <= time.time_ns() // 1_000_000 + CLOCKS_DIFFER]
    return bool(past), max(past or times)


def quoted(value: str) -> str:
    """A value inside MLflow's query language, which has no escape for quotes.

    Raises:
        StageError: the value holds one.
    """
    if "'" in value:
        raise refuse("name", value, "a name cannot hold quotes.", "fix the name", kind="name")
    return f"'{value}'"


def comparison(which: str | None = None) -> Comparison:
    """The last comparison of one pipeline run: of all, of a pipeline's name, or of a run's id or its beginning.

    Raises:
        StageError: there is none.
    """
    comparisons = [run for run in search("tags.stage = 'compare'") if ACROSS not in run.data.tags]
    if which is not None:
        name = {one: tracking.client().get_experiment(one).name for one in {r.info.experiment_id for r in comparisons}}
        comparisons = [
            run
            for run in comparisons
            if which == name[run.info.experiment_id] or any(history.is_id(which, one) for one in _run_ids(run))
        ]
    last = newest_readable(comparisons)
    if last is None:
        message = "there is no finished pipeline run" + ("." if which is None else f" called {which!r}.")
        raise StageError(message, kind="history", fix="start one with `alignflow run`, or look at `alignflow runs`")
    result = result_of(last.info.run_id)
    ids = _run_ids(last)
    named = next((one for one in ids if which is not None and history.is_id(which, one)), ids[-1])
    return Comparison(named, tracking.fetch(result.outputs["comparison"]), last.info.run_id)


def _run_ids(run: Any) -> list[str]:
    tags = run.data.tags
    return [tags.get("pipeline.run", "none"), *tags.get("pipeline.reused_by", "").split()]


def of_run(run: str) -> dict[str, Result]:
    """Results of the stages that a pipeline run has made or reused, by their names, as far as MLflow here has them."""
    results: dict[str, Result] = {}
    for condition in (f"`pipeline.run` = {quoted(run)}", f"`pipeline.reused_by` LIKE {quoted(f'%{run}%')}"):
        for one in search(f"tags.stage != '' and tags.{condition}"):
            reused = one.data.tags.get("pipeline.run") != run
            results[one.info.run_name] = result_of(one.info.run_id).model_copy(update={"reused": reused})
    return results


def result_of(run_id: str) -> Result:
    """The result that a finished run has left. Raises StageError when it has none, or none that can be read."""
    return _stored(Result, run_id, "result.json")


def request_of(run_id: str) -> Request:
    """The request of a run: the full config of its stage. Raises StageError when it has none that can be read."""
    return _stored(Request, run_id, "config.json")


def _stored(kind: type[T], run_id: str, name: str) -> T:
    """A file that a run has left, whichever version wrote it."""
    uri = f"runs:/{run_id}/{name}"
    try:
        return read_stored(kind, tracking.locate(uri).read_bytes().decode())
    except ValueError as error:
        fix = "run the pipeline again: the stage that made it runs again"
        raise refuse("uri", uri, f"it cannot be read ({str(error).splitlines()[0]}).", fix, kind="artifact") from error


def newest_readable(runs: list[Any]) -> Any | None:
    """The first run whose result can be read, None where there is none. Those before it are named."""
    for run in runs:
        try:
            result_of(run.info.run_id)
        except StageError as error:
            log.warning("run %s is passed over: %s", run.info.run_id, error)
        else:
            return run
    return None


def model(what: str) -> Model:
    """A model by its name in the last pipeline run (`dpo`), by a uri (`runs:/`, `models:/`), or by its folder.

    Raises:
        StageError: there is none, or its files were altered.
    """
    if what.startswith(("models:/", "runs:/")):
        folder = tracking.locate(what)  # says clearly when there is none
        run_id = maker(tracking.registered(what))
        if not run_id:  # MLflow does not know which run has made it
            return Model(what, folder)
        name = tracking.client().get_run(run_id).data.tags.get("model")
        return _made(name or what.rpartition("/")[2], run_id)
    last = newest_readable(trained(f"tags.model = {quoted(what)}"))
    if last is not None:
        return _made(what, last.info.run_id)
    if (Path(what).expanduser() / "config.json").is_file():
        return Model(Path(what).name, tracking.locate(what))
    fix = f"name one of {', '.join(names()) or 'the models of a pipeline run, after one'}, a uri or a model folder"
    raise refuse("MODEL", what, "there is no such model.", fix, kind="history")


def maker(uri: str) -> str | None:
    """The run that has published an artifact; None where MLflow does not know it."""
    if uri.startswith("runs:/"):
        return uri.removeprefix("runs:/").partition("/")[0]
    if uri.startswith("models:/m-"):
        return tracking.client().get_logged_model(uri.removeprefix("models:/")).source_run_id
    return None


def names() -> list[str]:
    """Names of the models that pipeline runs have left."""
    return sorted({run.data.tags["model"] for run in trained("tags.model != ''")})


def trained(condition: str) -> list[Any]:
    """Runs that made a model. MLflow's query language has no IN for tags."""
    return [run for run in search(condition) if run.data.tags.get("stage") in MODEL_STAGES]


def _made(name: str, run_id: str) -> Model:
    """The model that a training run has published, verified, with its last evaluation."""
    result, request = result_of(run_id), request_of(run_id)
    output: Artifact | None = result.outputs.get("model")
    if output is None:
        fix = "name a run of a stage that makes a model"
        raise refuse("run", run_id, "the run made no model.", fix, kind="history")
    tags = dict(tracking.client().get_run(run_id).data.tags)
    evaluations = search(f"params.`train.run_id` = {quoted(run_id)} and tags.stage = 'evaluate'")
    # not the gate's, at a temperature of its own, and not those on a sweep's test part
    own = [r for r in evaluations if GATE_TAG not in r.data.tags and r.data.params.get("part", "eval") == "eval"]
    metrics, judged = (dict(own[0].data.metrics), dict(own[0].data.params)) if own else ({}, {})
    return Model(name, tracking.fetch(output), request, tags, metrics, judged)
