"""Stages on work pools: each is a run of the deployment `stage/POOL`, on whichever worker of the pool takes it up.

What travels is the request there, and uris and digests back, through MLflow: workers share nothing but the servers.
"""

import contextlib
import logging
import time
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId, LogFilterTimestamp
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.objects import Log as LogLine
from prefect.client.schemas.sorting import LogSort
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment
from prefect.runtime import flow_run as this_run
from prefect.states import Cancelling

from flows.execution import process
from schemas import environment
from schemas.errors import Problem, Status, refuse
from schemas.stage import Request, Result
from schemas.text import visible
from stages import tracking

POLL_SECONDS = 1.0
WORKER_SECONDS = 60.0
"""After so long without a worker, say what to look at."""
LOOK_SECONDS, LIVELY_SECONDS = 20.0, 2.0
"""Between two looks at what a stage says: for a log, and for a terminal that shows bars."""
LINES_AT_ONCE, MOST_LINES = 100, 2000
STATUSES: dict[str | None, Status] = {"Refused": "refused", "Diverged": "diverged", "Preempted": "preempted"}
"""Names of final states, of a stage's run as of a pipeline's -> what they mean."""

Log = logging.Logger | logging.LoggerAdapter[logging.Logger]


def run_placed(request: Request, pool: str, log: Log) -> Result:
    """The stage's result: one that already exists, else that of a run on the pool. A stage that stops is no
    exception.

    Raises:
        StageError: no deployment takes stages to this pool.
    """
    known = process.reused(request, log)
    if known is not None:
        return known
    began = time.monotonic()
    with get_client(sync_client=True) as client:
        run = submit(tracking.portable(request), pool)
        log.info("%s: on pool %s as flow run %s", request.label, pool, run.name)
        state = wait(client, run, pool, log)
    result = outcome(state, request)
    log.info("%s: %s after %.0f s", request.label, result.status, time.monotonic() - began)
    return result


def submit(request: Request, pool: str) -> FlowRun:
    """A run of the stage on the pool: one that an earlier try of this flow run has left running, else a new one."""
    name = f"stage/{pool}"
    number = 0
    while True:
        number += 1
        try:
            run = run_deployment(
                name,
                parameters={"request": request.model_dump(mode="json")},
                flow_run_name=request.label,
                timeout=0,
                idempotency_key=f"{this_run.id}-{request.key()}-{number}",
            )
            assert isinstance(run, FlowRun)  # a coroutine only where there is a loop
        except ObjectNotFound as error:
            fix = f"deploy it (`alignflow deploy`), or place the stage on another pool than {pool}"
            message = f"there is no deployment {name}."
            raise refuse(f"pools.{request.stage}", pool, message, fix, kind="placement") from error
        if run.state is None or not run.state.is_final():
            return run


def wait(client: SyncPrefectClient, run: FlowRun, pool: str, log: Log) -> State:
    """The run's final state. A server that is away is waited for; a run that is stopped here is stopped there too."""
    began = time.monotonic()
    late, state = False, None
    told, away = Told(client, run, log), Away(log)
    while True:
        if process.stopping():
            return stop(client, run, log)
        time.sleep(POLL_SECONDS)
        with away:
            state = client.read_flow_run(run.id).state
            told.pass_on()
        if away.now:
            continue
        if state is not None and state.is_final():
            with contextlib.suppress(httpx.HTTPError):  # its last words are on its own page as well
                told.pass_on(last=True)
            return state
        if state is not None and state.is_scheduled() and not late and time.monotonic() - began > WORKER_SECONDS:
            late = True
            log.warning("no worker of pool %s has taken it yet; start one: prefect worker start --pool %s", pool, pool)


class Away:
    """Around questions to the Prefect server, which may be away for a while: said once, and asked again."""

    def __init__(self, log: Log) -> None:
        self.log, self.now = log, False

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> bool:
        before, self.now = self.now, isinstance(error, httpx.HTTPError)
        if self.now and not before:
            self.log.warning("the Prefect server does not answer (%s); waiting for it", type(error).__name__)
        return self.now


class Told:
    """What a stage on a pool says of its progress, and its warnings, on their way into this flow's log: so it has its
    bar on a terminal, as a stage beside the flow does. Its whole log is on its own page.
    """

    def __init__(self, client: SyncPrefectClient, run: FlowRun, log: Log) -> None:
        self.client, self.run, self.log = client, run, log
        self._next = 0.0
        self._seen: set[UUID | None] = set()
        self._after: LogFilterTimestamp | None = None

    def pass_on(self, last: bool = False) -> None:
        """Look, where it is time to: the warnings since the last look, and the last word on how far it is."""
        new = self.new(last)
        far = [line for line in new if line.level == logging.INFO and line.message.startswith(f"{self.run.name}  ")]
        grave = [line for line in new if is_grave(line)]
        for line in [*grave, *far[-1:]]:
            self.log.log(line.level, "%s", visible(line.message))

    def new(self, last: bool = False) -> list[LogLine]:
        """The lines since the last look, in their order; none where it is not yet time for another.

        Of more than MOST_LINES the newest.
        """
        if time.monotonic() < self._next and not last:
            return []
        self._next = time.monotonic() + (LIVELY_SECONDS if environment.live() else LOOK_SECONDS)
        asked = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[self.run.id]), timestamp=self._after)
        lines: dict[UUID | None, LogLine] = {}
        for offset in range(0, MOST_LINES, LINES_AT_ONCE):
            page = self.client.read_logs(asked, LINES_AT_ONCE, offset, LogSort.TIMESTAMP_DESC)
            lines |= {line.id: line for line in page}  # some twice, where new ones have come meanwhile
            if len(page) < LINES_AT_ONCE:
                break
        new = [line for line in reversed(lines.values()) if line.id not in self._seen]
        if new:
            self._seen, self._after = {*lines}, LogFilterTimestamp(after_=new[-1].timestamp)
        return new


def is_grave(line: LogLine) -> bool:
    """Whether a line is a warning or an error, and not the run's end, which its state tells."""
    return line.level > logging.INFO and not line.message.startswith("Finished in state")


def stop(client: SyncPrefectClient, run: FlowRun, log: Log) -> State:
    """Cancel the run, unless this one resumes by itself and finds it again: then leave it running."""
    preempted = State(type=StateType.CRASHED, name="Crashed", message="stopped from outside")
    if deployment.id:
        cancelled = False  # by somebody
        with contextlib.suppress(httpx.HTTPError):
            state = client.read_flow_run(UUID(str(this_run.id))).state
            cancelled = state is not None and (state.is_cancelling() or state.is_cancelled())
        if not cancelled:
            return preempted
    with contextlib.suppress(httpx.HTTPError):
        client.set_flow_run_state(run.id, Cancelling(message="The pipeline run was stopped."), force=False)
        log.info("cancelled flow run %s", run.name)
    return preempted


def status_of(state: State) -> Status:
    """What a final state means: cancelled and crashed runs were stopped from outside."""
    if state.is_completed():
        return "done"
    return "preempted" if state.is_crashed() or state.is_cancelled() else STATUSES.get(state.name, "failed")


def outcome(state: State, request: Request) -> Result:
    """What a final state means: the result that MLflow has, else the problem that the state tells."""
    if state.is_completed():
        result = tracking.find(request.key())
        if result is not None:
            return result.model_copy(update={"reused": False})
        message, fix = "the stage is done, but MLflow does not have its result.", "see that both use the same MLflow"
        problem = Problem(kind="placement", message=message, fix=fix)
        return Result(status="failed", key=request.key(), error=problem)
    message = state.message or f"the flow run ended as {state.name}."
    return Result(
        status=status_of(state), key=request.key(), error=Problem(kind=state.name or "placement", message=message)
    )
