"""`alignflow submit`: start the deployed pipeline, which a worker runs, and wait for it where that is asked for."""

import contextlib
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.client.schemas.sorting import TaskRunSort
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL

from flows import pipeline
from flows.execution import live, work_pool
from flows.planning.allowed_paths import paths_of_config
from flows.results import history
from flows.servers import automations, checks, supervisor
from schemas.config import PipelineConfig
from schemas.errors import StageError, refuse
from schemas.stage import Result
from schemas.text import show, visible
from stages import tracking

log = logging.getLogger("alignflow")

DEPLOYMENT = "pipeline/config"


def submit(config: PipelineConfig, overrides: Sequence[str] = ()) -> tuple[FlowRun, str]:
    """Start a run of the deployed pipeline; returns it and Prefect's page of it. Its tags are the overrides.

    Warns of pools that no worker serves, the pipeline's own among them.

    Raises:
        StageError: no server is set or answers, a pool is missing, the pools' workers could not reach the experiment's
            artifacts, or nothing is deployed.
    """
    if not PREFECT_API_URL.value():
        raise refuse("PREFECT_API_URL", "", "no Prefect server is set.", checks.START, kind="server")
    checks.check_servers()
    pools = list(config.pools.values())
    with get_client(sync_client=True) as client, contextlib.suppress(ObjectNotFound):
        own = client.read_deployment_by_name(DEPLOYMENT).work_pool_name  # which the deployed pipeline itself waits on
        pools = [own, *pools] if own else pools
    checks.check_pools(pools)
    if tracking.tracking_uri().startswith("http"):  # else the worker alone knows where MLflow is
        checks.check_experiment(config.name, placed=bool(config.pools))
    try:
        parameters, name = {"config": absolute(config)}, history.run_name(config.name, overrides)
        marks = [*pipeline.tags_of(config), *overrides]
        run = run_deployment(DEPLOYMENT, parameters=parameters, flow_run_name=name, timeout=0, tags=marks)
    except ObjectNotFound as error:
        fix = "deploy it first: alignflow deploy"
        raise refuse("deployment", DEPLOYMENT, "there is no such deployment.", fix, kind="deploy") from error
    assert isinstance(run, FlowRun)  # a coroutine only where there is a loop
    pages = str(PREFECT_UI_URL.value() or str(PREFECT_API_URL.value()).removesuffix("/api"))
    return run, f"{pages}/runs/flow-run/{run.id}"


def absolute(config: PipelineConfig) -> dict[str, Any]:
    """The config as JSON; relative paths of files on this machine become absolute."""
    values = config.model_dump(mode="json")
    for field, value, path in paths_of_config(config):
        if path is not None and value == path and Path(path).expanduser().exists():
            *way, last = field.split(".")
            place: Any = values
            for key in way:
                place = place[int(key) if isinstance(place, list) else key]
            place[last] = str(Path(path).expanduser().absolute())
    return values


# --- waiting ---


def wait(run: FlowRun, page: str) -> None:
    """Stay until a run ends, and tell of it and its stages meanwhile: lines on stderr, and the view of `live.watched`
    where there is one. A server that is away is waited for; so is a crashed run that is going to be started again.

    Raises:
        StageError: the run has ended with a problem, with its status (`preempted`: it was cancelled, or crashed); or
            Ctrl-C or SIGTERM have ended the wait alone (`preempted`).
    """
    supervisor.interrupt_on_sigterm()
    away, told = work_pool.Away(log), ""
    try:
        with get_client(sync_client=True) as client, Stages(client, run) as stages:
            while True:
                with away:
                    run = stages.look()
                    state = run.state
                    if state is not None and state.name != told:
                        told = state.name or ""
                        show(f"{run.name}: {told}", sys.stderr)
                    if state is not None and state.is_final() and not automations.starts_again(run):
                        with contextlib.suppress(httpx.HTTPError):  # its last words are on its page as well
                            stages.look(last=True)
                        break
                time.sleep(work_pool.POLL_SECONDS)
    except ObjectNotFound as error:
        raise refuse("run", run.id, "somebody has deleted it on the server.", kind="deploy", status="failed") from error
    except KeyboardInterrupt:
        message = f"no longer waiting; the run goes on: {page}"
        other = f"with the server's address and password: prefect flow-run cancel {run.id}"
        fix = f"to stop it, cancel it on that page, or {other}"
        raise StageError(message, status="preempted", kind="preempted", fix=fix) from None
    if not state.is_completed():
        message = f"{run.name}: {state.message or f'the run ended as {state.name}.'}"
        raise StageError(message, status=work_pool.status_of(state), kind=state.name or "placement")


class Stages:
    """The stages of a pipeline run on a server, as they begin, say how far they are, and end; a context manager."""

    def __init__(self, client: SyncPrefectClient, run: FlowRun) -> None:
        self.client, self.run = client, run
        self.log = work_pool.Told(client, run, log)
        self._told: dict[UUID, str] = {}
        self._lines: dict[UUID, tuple[live.Line, contextlib.ExitStack]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for _, shown in self._lines.values():
            shown.close()

    def look(self, last: bool = False) -> FlowRun:
        """Tell what is new of the stages; the run as it is now. Their log is read now and then, and at the `last` look.

        Raises httpx.HTTPError where the server is away.
        """
        run = self.client.read_flow_run(self.run.id)
        mine = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
        newest = self.client.read_task_runs(flow_run_filter=mine, sort=TaskRunSort.EXPECTED_START_TIME_DESC)
        tasks = {task.id: task for task in reversed(newest)}
        self._read(tasks, last)
        for task in tasks.values():
            if task.state is not None and task.state.name != self._told.get(task.id, "Pending"):
                self._tell(task, task.state)
        return run

    def _read(self, tasks: Mapping[UUID, TaskRun], last: bool) -> None:
        """The stages' new lines: warnings are passed on; how far a stage is goes to its line, or is said."""
        far: dict[UUID, str] = {}
        for line in self.log.new(last):
            task = tasks.get(line.task_run_id) if line.task_run_id is not None else None
            message = visible(line.message)
            if work_pool.is_grave(line):
                log.log(line.level, "%s", message, extra={"task_run_name": "" if task is None else task.name})
            elif task is not None and task.id in self._lines:
                self._lines[task.id][0].read(message, time.monotonic())
                if message.startswith(f"{task.name}  "):
                    far[task.id] = message
        for message in [] if live.viewed() else far.values():
            show(message, sys.stderr)

    def _tell(self, task: TaskRun, state: State) -> None:
        """A stage has another state than at the last look."""
        self._told[task.id] = state.name or ""
        if not live.viewed():
            show(f"{task.name}: {state.name}", sys.stderr)
        if task.id not in self._lines:
            shown = contextlib.ExitStack()
            self._lines[task.id] = shown.enter_context(live.stage(task.name)), shown
        if not state.is_running():
            line, shown = self._lines.pop(task.id)
            if state.is_final():
                line.result = Result(status=work_pool.status_of(state), key="")
            shown.close()
