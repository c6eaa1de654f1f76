"""`alignflow clean`: what nothing needs any more, found, measured, and removed.

Kept whatever its age: what a registered version was made from (champion and predecessor among them), back to the data;
what a run of the last days used, and what that was made from; numbers, requests, results and reports of every run.
"""

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

from flows.planning.memory import readable
from flows.planning.requests import COPIES
from flows.results import LISTED, history, registry
from flows.results.lineage import Graph, Step, step_of
from flows.servers import address_file, local_prefect
from schemas.errors import StageError
from schemas.stage import STAGES
from schemas.text import one_line
from stages import tracking
from stages.runtime import databases, workspace

log = logging.getLogger("alignflow")

DAY = 24 * 3600
PAGE = 200
HEAVY = {name for name, spec in STAGES.items() if spec.makes in ("model", "data")} | {"source"}
"""Stages whose outputs take room. Those of the others are the record of what came out."""
DEPLOYED = "alignflow"
"""Tag of our deployments (deploy/prefect.yaml), and so of their runs."""
ASIDE = ("mlflow*.db*.bad*", "cache/reference.sqlite*.bad*", "prefect/prefect.db*.bad*")
"""Where databases are moved aside. Named, and not looked for: a home may hold files of its owner's too."""


@dataclass(frozen=True)
class Item:
    """Something to remove: what it is, where, its size in bytes, and how."""

    kind: str
    where: str
    size: int
    remove: Callable[[], None]


def clean(days: float, dry_run: bool) -> list[Item]:
    """What nothing has used for so many days, removed unless it is a dry run; the largest first."""
    before = time.time() - days * DAY
    items = [*unfinished_work(before), *caches(before), *moved_aside(before), *old_records(before)]
    items += [*copies_of_verdicts(before), *artifacts(before)]
    if not dry_run:
        for item in items:
            item.remove()
    try:
        items += flow_runs(before, dry_run)
    except (StageError, OSError, sqlite3.Error) as error:  # Prefect's server needs some room itself: run it again
        log.warning("flow runs are left as they are: %s", error)
    return sorted(items, key=lambda item: -item.size)


def as_text(items: Sequence[Item], dry_run: bool) -> str:
    """The items, their sizes and the sum; only sums per kind when they are many."""
    lines = [f"{readable(item.size):>10}  {item.kind}: {one_line(item.where)}" for item in items[:20]]
    if len(items) > 20:
        rest = items[20:]
        lines.append(f"{readable(sum(item.size for item in rest)):>10}  {len(rest)} smaller ones")
    total = readable(sum(item.size for item in items))
    verb = "would be removed" if dry_run else "removed"
    return "\n".join([*lines, f"{total:>10}  {verb} in all" if items else f"Nothing {verb}."])


# --- On this disk -----------------------------------------------------------------------------------------------------


def unfinished_work(before: float) -> Iterator[Item]:
    """Checkpoints, journals and logs of stages that nobody works on now or has since a time."""
    for folder in sorted((workspace.home() / "work").glob("*")):
        if folder.is_dir() and used_at(folder) < before:
            with workspace.lock_if_free(folder / "lock") as free:
                inside = [path for path in folder.iterdir() if path.name != "lock"]
            size = sum(map(size_of, inside))
            if free and size:
                yield Item("checkpoints and logs of a stage", str(folder), size, lambda folder=folder: _clear(folder))


def _clear(folder: Path) -> None:
    """Empty a stage's work folder, unless a process has come meanwhile. The lock stays: others may wait at it."""
    with workspace.lock_if_free(folder / "lock") as free:
        for path in folder.iterdir() if free else ():
            if path.name != "lock":
                workspace.remove(path)


def caches(before: float) -> Iterator[Item]:
    """Copies of artifacts that a server has, and cached reference log-probs, unused since a time."""
    for path in [
        *sorted((workspace.home() / "cache" / "artifacts").glob("*")),
        workspace.home() / "cache" / "reference.sqlite",
    ]:
        if path.suffix == ".lock" or not path.exists() or used_at(path) >= before:
            continue
        yield Item("cached copy", str(path), size_of(path), lambda path=path: _drop_copy(path))


def _drop_copy(path: Path) -> None:
    """Remove a cached copy, unless it is in use."""
    with workspace.lock_if_free(path.with_suffix(".lock")) as free:
        if free and path.is_file():
            databases.discard(path)
        elif free:
            workspace.remove(path)


def moved_aside(before: float) -> Iterator[Item]:
    """What could not be used and was moved aside for a person to look at, a time ago."""
    for path in (path for pattern in ASIDE for path in sorted(workspace.home().glob(pattern))):
        if used_at(path) < before:
            yield Item("moved aside, unusable", str(path), size_of(path), lambda path=path: workspace.remove(path))


def old_records(before: float) -> Iterator[Item]:
    """Lines of `alignflow runs` that a list does not show any more, of runs that ended before a time. What people said
    of models (`ab/`) stays: it cannot be made again.
    """
    for record in history.records()[LISTED:]:
        path = workspace.home() / "runs" / f"{record.run}.json"
        if record.state not in ("running", "waiting") and used_at(path) < before:
            yield Item("line of alignflow runs", str(path), size_of(path), partial(path.unlink, missing_ok=True))


def used_at(path: Path) -> float:
    """When a file, or the last one in a folder, was changed; seconds since 1970. What vanishes meanwhile is new."""
    try:
        return max(one.lstat().st_mtime for one in (path, *path.rglob("*")))
    except FileNotFoundError:
        return time.time()


def size_of(path: Path) -> int:
    """Bytes of a file or of all files in a folder."""
    sizes = 0
    for one in (path, *path.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            sizes += one.lstat().st_size if not one.is_dir() else 0
    return sizes


# --- In MLflow --------------------------------------------------------------------------------------------------------


def copies_of_verdicts(before: float) -> Iterator[Item]:
    """What comparisons have read of people's verdicts: copies that have not been used since a time, nor for a day, by
    which no comparison of a listed run, of the time since, or behind a registered version was made.
    """
    day_ago = time.time() - DAY  # a younger one may be that of a comparison which is yet to begin
    old = [path for path in sorted(workspace.home().glob(f"ab/*/{COPIES}/*")) if used_at(path) < min(before, day_ago)]
    if not old:
        return
    needed, listed = needed_digests(before), {record.run for record in history.records()[:LISTED]}
    for run in tracking.runs("tags.stage = 'compare'"):
        if listed & {run.data.tags.get("pipeline.run"), *run.data.tags.get("pipeline.reused_by", "").split()}:
            needed |= set(step_of(run).inputs.values())
    for path in old:
        if path.name not in needed:
            yield Item("copy of people's verdicts", str(path), size_of(path), lambda path=path: workspace.remove(path))


def artifacts(before: float) -> Iterator[Item]:
    """Models and data of runs that were not used since a time, and that nothing kept was made from."""
    needed, models = needed_digests(before), tracking.model_locations()
    registered = {version.run_id for version in registry.versions()}  # those of other hands have no digest of ours
    unreached = 0
    for run in tracking.runs("tags.stage != ''"):
        tags = run.data.tags
        # On a server that others use too, theirs may have a tag `stage` as well.
        made_here = {"sha256", "artifact"} if tags.get("stage") == "source" else {"stage.key"}
        is_ours = tags.get("stage") in HEAVY and made_here <= tags.keys()
        if not is_ours or tracking.REMOVED in tags or last_used(run) >= before:
            continue
        outputs = {tags["sha256"]} if tags["stage"] == "source" else set(step_of(run).outputs.values())
        if not outputs and run.info.status == "FINISHED":  # what it made cannot be told, and so not who needs it
            continue
        if outputs & needed or run.info.run_id in registered or not is_ended(run):
            continue
        if tracking.needs_server(run):
            unreached += 1
            continue
        for location in [*models.get(run.info.run_id, []), *tracking.folder_locations(run)]:
            size = tracking.stored_size(location)
            if size:
                where = f"{run.info.run_name} ({run.info.status.lower()}, run {run.info.run_id})"
                yield Item("model or data", where, size, lambda run=run, at=location: tracking.remove_stored(run, at))
    if unreached:
        what = f"{unreached} {'run' if unreached == 1 else 'runs'}"
        log.warning("MLflow's server keeps the files of %s: left. Fix: call this while `alignflow up` runs", what)


def needed_digests(before: float) -> set[str]:
    """Digests of all that registered versions, the runs since a time and those of pipelines at work were made from,
    themselves included.
    """
    graph, runs = Graph(), list(tracking.runs("tags.`stage.key` != ''"))
    registered = {version.run_id for version in registry.versions()}
    # A pipeline's finished stages are inputs of those to come, however long the one at work takes.
    at_work = {run.data.tags.get("pipeline.run") for run in runs if not is_ended(run)} - {None}
    waiting = [*graph.versions]
    for run in runs:
        tags = run.data.tags
        pipelines = {tags.get("pipeline.run"), *tags.get("pipeline.reused_by", "").split()}
        kept = last_used(run) >= before or run.info.run_id in registered or pipelines & at_work
        if kept or not is_ended(run):
            step = step_of(run)
            waiting += [*step.inputs.values(), *step.outputs.values()]
    makers: dict[str, list[Step]] = {}
    for step in graph.steps:
        for sha256 in step.outputs.values():
            makers.setdefault(sha256, []).append(step)
    needed: set[str] = set()
    while waiting:
        sha256 = waiting.pop()
        if sha256 not in needed:
            needed.add(sha256)
            waiting += [one for step in makers.get(sha256, []) for one in step.inputs.values()]
    return needed


def last_used(run: Any) -> float:
    """When a run was begun, ended, or taken again; seconds since 1970."""
    times = (run.info.start_time or 0, run.info.end_time or 0, int(run.data.tags.get("pipeline.reused_at", 0)))
    return max(times) / 1000


def is_ended(run: Any) -> bool:
    """Whether nobody works on a run. One of this home that MLflow takes for running is dead if its lock is free; of one
    of another home nobody here knows.
    """
    if run.info.status != "RUNNING":
        return True
    tags = run.data.tags
    if any(tags.get(name) != value for name, value in workspace.place().items()) or "stage.key" not in tags:
        return False
    with workspace.lock_if_free(workspace.work_folder(tags["stage.key"]) / "lock") as free:
        return free


# --- In Prefect -------------------------------------------------------------------------------------------------------


def flow_runs(before: float, dry_run: bool) -> list[Item]:
    """Flow runs that ended before a time, with their logs; removed unless it is a dry run. On a server that is not of
    this home only those of our deployments: the others may be anybody's.
    """
    database, url = workspace.home() / "prefect" / "prefect.db", PREFECT_API_URL.value()
    if not url and not database.exists():
        return []
    running = address_file.found()
    of_this_home = not url or (running is not None and "Prefect" in running.ours and running.prefect == url.rstrip("/"))
    size_before = size_of(database) if database.exists() else 0
    with local_prefect.local_prefect(), get_client(sync_client=True) as client:
        ids = old_flow_runs(client, before, None if of_this_home else DEPLOYED)
        if not dry_run:
            for flow_run_id in ids:
                with contextlib.suppress(ObjectNotFound):  # a subflow's run goes with its parent's
                    client.delete_flow_run(flow_run_id)
    if not ids:
        return []
    freed = 0
    if not url and not dry_run:  # the server that had it open has ended
        # Another run's server may have it open: then its room is used again, and is given back another time.
        with contextlib.closing(sqlite3.connect(database)) as connection, contextlib.suppress(sqlite3.OperationalError):
            connection.execute("VACUUM")
        freed = max(0, size_before - size_of(database))
    return [Item("flow runs", f"{len(ids)} that ended before", freed, lambda: None)]


def old_flow_runs(client: Any, before: float, tag: str | None = None) -> list[Any]:
    """Ids of the flow runs that ended before a time, all pages; with a tag only those that have it."""
    when = datetime.fromtimestamp(before, UTC)
    ended: dict[str, Any] = {
        "end_time": {"before_": when.isoformat()},
        "state": {"type": {"any_": ["COMPLETED", "FAILED", "CANCELLED", "CRASHED"]}},
    }
    chosen = FlowRunFilter.model_validate(ended | ({"tags": {"all_": [tag]}} if tag is not None else {}))
    ids: list[Any] = []
    while page := client.read_flow_runs(flow_run_filter=chosen, limit=PAGE, offset=len(ids)):
        ids += [run.id for run in page]
    return ids
