"""The pipeline as a Prefect flow: a config's nodes as tasks, each in its own process, in the order of their needs."""

import contextlib
import logging
import queue
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import TerminationSignal
from prefect.runtime import deployment, flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed, Failed, State

from flows.execution import process
from flows.execution.lease import stage_lease
from flows.execution.work_pool import run_placed
from flows.planning.allowed_paths import check_roots
from flows.planning.plan import Node, plan
from flows.planning.requests import request_for
from flows.results.announce import report
from flows.servers import checks, supervisor
from flows.servers.local_prefect import local_prefect, own_servers
from schemas.config import PipelineConfig
from schemas.errors import StageError
from schemas.stage import Request, Result
from stages import tracking

log = logging.getLogger("alignflow")

T = TypeVar("T")

TRIES = 3
"""How often a stage that is stopped from outside is started, before the run gives up."""


# --- From a node to a request -----------------------------------------------------------------------------------------


# --- The flow ---------------------------------------------------------------------------------------------------------


@task(name="stage", task_run_name="{name}", persist_result=False, result_serializer="json", cache_policy=NO_CACHE)
def run_node(name: str, request: Request, pool: str | None = None) -> Result | State[Any]:
    """One stage, here or on a work pool. When it stops, the task fails with the stage's problem; when it was stopped
    from outside, it is started again first.
    """
    result = run_once(request, pool)
    for number in range(2, TRIES + 1):
        if not was_stopped(result) or process.stopping():
            break
        get_run_logger().warning("%s: %s Started again, try %d of %d.", name, result.error, number, TRIES)
        result = run_once(request, pool)
    if result.status == "done":
        return result
    error = problem_of(name, result)
    return Failed(message=str(error), data=error)


def was_stopped(result: Result) -> bool:
    """Whether a stage ended from outside, by a signal or with its machine, and goes on when it is started again."""
    return result.status == "preempted" or (result.error is not None and result.error.kind == "killed")


def run_once(request: Request, pool: str | None) -> Result:
    """The result of one try at a stage."""
    if pool is not None:
        return run_placed(request, pool, get_run_logger())
    shared = PREFECT_API_URL.value() not in own_servers
    log = get_run_logger()
    return process.run_stage(request, log, stage_lease(request.key(), log) if shared else None)


def problem_of(name: str, result: Result) -> StageError:
    """A stopped stage's problem as an exception that carries its exit code."""
    assert result.error is not None
    first = "field" if result.error.field else "message"
    named = {first: f"{name}: {getattr(result.error, first)}"}
    return StageError(result.error.model_copy(update=named), status=result.status)


@flow(name="pipeline", flow_run_name="{config.name}", persist_result=False, result_serializer="json")
def pipeline(config: PipelineConfig) -> State[Any]:
    """Run a config. The flow's result is node name -> Result; it fails with the problem of the first stage to stop."""
    process.begin()
    try:
        prepare(config)
        nodes = plan(config)
    except StageError as error:
        return Failed(message=str(error), data=error)
    try:
        results, errors = run_nodes(nodes, config, str(flow_run.id))
    except BaseException:
        process.stop_all()
        raise
    report(nodes, results, config)
    if errors:
        first = next(iter(errors.values()))
        return Failed(message="; ".join(str(error) for error in errors.values()), data=first)
    reused = sum(result.reused for result in results.values())
    return Completed(message=f"{len(results)} stages done, {reused} of them reused.", data=results)


def prepare(config: PipelineConfig) -> None:
    """Say what would stop the run later, before a stage starts; and clear away what dead runs have left on this host.

    Raises:
        StageError: a path leads out of the declared roots, a pool is missing, or a pool's workers could not reach the
            experiment's artifacts.
    """
    if deployment.id:
        check_roots(config, deployed=True)
        tracking.close_left()
    if config.pools:
        checks.check_pools(list(config.pools.values()))
    checks.check_experiment(config.name, placed=bool(config.pools))


def run_nodes(
    nodes: list[Node], config: PipelineConfig, pipeline_run: str, known: Mapping[str, Result] | None = None
) -> tuple[dict[str, Result], dict[str, StageError]]:
    """Run nodes as their needs are done, at most `config.parallel` at once. What a failure leaves whole still runs.

    `known`: results of nodes that are not to be run; they are in the answer too.
    """
    results: dict[str, Result] = dict(known or {})
    errors: dict[str, StageError] = {}
    waiting = longest_chain_first(nodes)
    running: set[str] = set()
    ended: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    while True:
        ready = [node for node in waiting if node.needs <= results.keys()]
        for node in ready[: config.parallel - len(running)]:
            waiting.remove(node)
            try:
                request = request_for(node, config, results, pipeline_run)
            except StageError as error:
                errors[node.name] = error
                continue
            future = run_node.submit(node.name, request, config.pools.get(node.stage))
            running.add(node.name)
            future.add_done_callback(lambda future, name=node.name: ended.put((name, future)))
        if not running:
            return results, errors
        name, future = next_of(ended)
        running.remove(name)
        outcome = future.result(raise_on_failure=False)
        if isinstance(outcome, Result):
            results[name] = outcome
        else:
            errors[name] = outcome if isinstance(outcome, StageError) else as_bug(name, outcome)


def next_of(ended: "queue.SimpleQueue[tuple[str, Any]]") -> tuple[str, Any]:
    """The next node to end. Waits in short turns, since Ctrl-C does not interrupt a wait without a time-out."""
    while True:
        with contextlib.suppress(queue.Empty):
            return ended.get(timeout=0.5)


def as_bug(name: str, error: object) -> StageError:
    """An exception that no stage has made a problem of."""
    return StageError(f"{name}: {error!r}", status="failed", kind=type(error).__name__)


def longest_chain_first(nodes: list[Node]) -> list[Node]:
    """Nodes with the longest chain of others behind them first; else in the plan's order."""
    depth = {node.name: 0 for node in nodes}
    for node in reversed(nodes):
        for need in node.needs & depth.keys():
            depth[need] = max(depth[need], depth[node.name] + 1)
    return sorted(nodes, key=lambda node: -depth[node.name])


# --- Running it from here ---------------------------------------------------------------------------------------------


def run(config: PipelineConfig) -> dict[str, Result]:
    """Run the pipeline from this process and wait for it: node name -> Result.

    Raises:
        StageError: a stage stopped, with its problem and status; or the config lacks something; or the run was stopped
            by Ctrl-C or SIGTERM (status `preempted`).
    """
    plan(config)  # what is missing is said before a server starts
    return run_locally(lambda: cast("dict[str, Result]", pipeline(config)))  # Prefect gives the data of the state


def run_locally(call: Callable[[], T]) -> T:
    """Call a flow from this process, with databases and a Prefect server at hand, and wait for it.

    Raises:
        StageError: what the flow raises; or it was stopped by Ctrl-C or SIGTERM (status `preempted`).
    """
    supervisor.interrupt_on_sigterm()
    try:
        with ThreadPoolExecutor(1) as aside:
            database = aside.submit(tracking.setup)  # MLflow takes seconds to import: while Prefect's server starts
            with local_prefect():
                database.result()
                return call()
    except (KeyboardInterrupt, TerminationSignal):
        fix = "start it again: finished stages are reused, and training goes on from its last checkpoint"
        message = "the run was stopped from outside."
        raise StageError(message, status="preempted", kind="preempted", fix=fix) from None


# --- What a run would do ----------------------------------------------------------------------------------------------
