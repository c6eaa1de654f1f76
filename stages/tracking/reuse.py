"""Finished runs: found by their key, reused, compared, read."""

import json
import logging
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote, urlencode

from schemas import read_stored
from schemas.stage import Result
from stages.runtime.context import Recorded
from stages.tracking.mlflow_client import client, runs
from stages.tracking.names import TAG_LENGTH, own_name
from stages.tracking.problems import first_line
from stages.tracking.store import BAD, intact, local_path, location_of

if TYPE_CHECKING:
    from mlflow.entities import Run

log = logging.getLogger("alignflow")

DIGEST_LENGTH = 64
PUBLISHED = ("model", "data")
"""Outputs of stages by whose digests runs are looked up."""


def runs_with(key: str, condition: str) -> "list[Run]":
    """Runs of a stage key that fit a condition on their attributes, newest first, in any experiment."""
    return list(runs(f"tags.`stage.key` = '{key}' and {condition}"))


def _result_of(run_id: str) -> Result | None:
    """The result that a finished run has left; None, with a warning, where it cannot be read: it was not done then."""
    location = location_of(f"runs:/{run_id}/result.json")
    path = local_path(location)
    try:
        if path is not None:
            return read_result(path.read_bytes())
        if not any(file.path == "result.json" for file in client().list_artifacts(run_id)):
            return None
        with tempfile.TemporaryDirectory() as folder:
            return read_result(Path(client().download_artifacts(run_id, "result.json", folder)).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        log.warning("the result of run %s cannot be read: its stage counts as not done (%s)", run_id, first_line(error))
        return None


def read_result(content: bytes) -> Result:
    """A stage's stored result.

    Raises:
        ValueError: it is none: cut, or written by a version that is too different.
    """
    return read_stored(Result, content.decode())


def find(key: str) -> Result | None:
    """A finished run of this key whose outputs still exist with their digests, else None."""
    for run in runs_with(key, "attributes.status = 'FINISHED'"):
        if BAD in run.data.tags:
            continue
        result = _result_of(run.info.run_id)
        if (
            result is not None
            and result.status == "done"
            and all(intact(artifact) for artifact in result.outputs.values())
        ):
            return result.model_copy(update={"reused": True})
    return None


def recorded(what: str, curves: Sequence[str] = ()) -> Recorded | None:
    """What a run has logged; None where MLflow does not have it any more. See StageContext.recorded.

    Values that are not finite are left out of curves.
    """
    if len(what) == DIGEST_LENGTH:
        conditions = (f"tags.`output.{name}` = '{what}'" for name in PUBLISHED)
        every = (run for one in conditions for run in runs(f"attributes.status = 'FINISHED' and {one}"))
        run = next(every, None)
    else:
        run = next(runs(f"attributes.run_id = '{what}'"), None)
    if run is None:
        return None
    points: dict[str, list[tuple[int, float]]] = {}
    for name in curves:
        if name in run.data.metrics:
            history = client().get_metric_history(run.info.run_id, name)
            points[name] = sorted({one.step: one.value for one in history if math.isfinite(one.value)}.items())
    return Recorded(
        run_id=run.info.run_id,
        stage=run.data.tags.get("stage", ""),
        began=run.info.start_time / 1000,
        tags=dict(run.data.tags),
        params=dict(run.data.params),
        metrics={own_name(name): value for name, value in run.data.metrics.items()},
        curves=points,
        datasets=[one.dataset.name for one in (run.inputs.dataset_inputs if run.inputs else [])],
    )


def note_reuse(result: Result, pipeline_run: str | None) -> None:
    """Record on a reused run which pipeline run reused it: find such runs by `tags.pipeline.reused_by LIKE '%ID%'`."""
    if not pipeline_run or not result.run_id:
        return
    run_id = result.run_id
    tags = client().get_run(run_id).data.tags
    if tags.get("pipeline.run") == pipeline_run:
        return
    others = [name for name in tags.get("pipeline.reused_by", "").split() if name != pipeline_run]
    value = " ".join([*others, pipeline_run])
    while len(value) > TAG_LENGTH:
        value = value.partition(" ")[2]  # forget the oldest
    client().set_tag(run_id, "pipeline.reused_by", value)
    # For "the last comparison": a run that is taken again counts as new.
    client().set_tag(run_id, "pipeline.reused_at", str(time.time_ns() // 1_000_000))


def compare_link(server: str, run_ids: list[str], view: Literal["CHART", "ARTIFACT"] = "CHART") -> str | None:
    """Address of MLflow's page that shows evaluations side by side, at this server; None without evaluations.

    CHART shows their metrics as bars, ARTIFACT the answers to each prompt. The best judged come first, since MLflow
    draws ten runs until it is asked for more.
    """
    if not run_ids:
        return None
    runs = [client().get_run(run_id) for run_id in run_ids]
    experiments = sorted({run.info.experiment_id for run in runs})
    chosen = ", ".join(f"'{run_id}'" for run_id in run_ids)
    query = {"searchFilter": f"attributes.run_id IN ({chosen})", "compareRunsMode": view}
    query |= {"workflowType": "machine_learning"}  # else its menus are those of traces and prompts
    query |= {"orderByKey": "metrics.`eval/judge_score`", "orderByAsc": "false"}
    page = f"experiments/{experiments[0]}/runs"
    if len(experiments) > 1:
        page, query["experiments"] = "compare-experiments/s", json.dumps(experiments)
    return f"{server}/#/{page}?{urlencode(query, quote_via=quote)}"
