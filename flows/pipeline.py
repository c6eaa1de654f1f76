"""The pipeline as a Prefect flow: a config's nodes as tasks, each in its own process, in the order of their needs."""

import contextlib
import logging
import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from prefect import Task, flow, get_run_logger, tags, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.exceptions import TerminationSignal
from prefect.runtime import deployment, flow_run
from prefect.states import Completed, Failed, State

from flows.execution import live, process
from flows.execution.lease import stage_lease
from flows.execution.progress import Progress
from flows.execution.work_pool import run_placed
from flows.planning import config_file, sweep
from flows.planning.allowed_paths import check_roots, check_source
from flows.planning.nodes import until as nodes_until
from flows.planning.plan import Node, Plan, last_test, plan
from flows.planning.requests import request_for
from flows.results import announce, history
from flows.servers import checks, supervisor
from flows.servers.local_prefect import has_shared_server, local_prefect
from schemas.config import PipelineConfig
from schemas.errors import StageError
from schemas.stage import Request, Result
from stages import tracking
from stages.runtime.resources import out_of_resource

T = TypeVar("T")

log = logging.getLogger("alignflow")

_done: dict[str, dict[str, Result]] = {}
"""Flow run -> the results of a pipeline all of whose stages are done. Prefect has them once it records the end."""

TRIES = 3
"""How often a stage that is stopped from outside is started, before the run gives up."""


def start_again(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether a stage ended from outside, by a signal or with its machine, so that it resumes when started again."""
    error = state.data
    if not isinstance(error, StageError) or process.stopping():
        return False
    if error.status != "preempted" and error.problem.kind != "killed":
        return False
    get_run_logger().warning("%s Started again, try %d of %d.", error, run.run_count + 1, TRIES)
    return True


@task(
    name="stage",
    task_run_name="{name}",
    retries=TRIES - 1,
    retry_condition_fn=start_again,
    persist_result=False,
    result_serializer="json",
    cache_policy=NO_CACHE,
)
def run_node(name: str, request: Request, pool: str | None = None) -> Result | State[Any]:
    """One stage, here or on a work pool. When it stops, the task fails with the stage's problem."""
    logger = get_run_logger()
    with live.stage(name) as line:
        if pool is not None:
            result = run_placed(request, pool, logger)
        elif not has_shared_server():  # and so nobody who looks on
            result = process.run_stage(request, logger)
        else:
            result = process.run_stage(request, bar := Progress(logger, name), stage_lease(request.key(), logger))
            if result.status == "done":
                bar.done()
        line.result = result
    if result.status == "done":
        return result
    assert result.error is not None
    if result.status == "diverged":
        announce.emit("diverged", tracking.experiment_name(request), f"{name}: {result.error}")
    first = "field" if result.error.field else "message"
    named = {first: f"{name}: {getattr(result.error, first)}"}
    error = StageError(result.error.model_copy(update=named), status=result.status)
    return Failed(message=str(error), data=error)


def run_name() -> str:
    """The flow run's name: the config's, and what differs from its file."""
    config = PipelineConfig.model_validate(flow_run.parameters["config"])
    return history.run_name(config.name, [tag for tag in flow_run.tags if "=" in tag])


@flow(name="pipeline", flow_run_name=run_name, persist_result=False, result_serializer="json")
def pipeline(config: PipelineConfig, until: str | None = None) -> State[Any]:
    """Run a config. The flow's result is node name -> Result; it fails with the problem of the first stage to stop.

    `until`: the last stage, by its name or its node's; None: all. What differs from the config's file are tags.
    """
    changed = [tag for tag in flow_run.tags if "=" in tag]
    with history.recorded(str(flow_run.id), config.name, changed) as entry:
        return told(config.name, run_config(config, until, entry))


def preset_name() -> str:
    """The flow run's name: the preset's, and what differs from it."""
    given = flow_run.parameters
    return history.run_name(given["preset"], given.get("overrides", []))


@flow(name="pipeline", flow_run_name=preset_name, persist_result=False, result_serializer="json")
def from_preset(preset: str, overrides: list[str] = [], until: str | None = None) -> State[Any]:  # noqa: B006 - a form
    """Run a preset, or a config file as the worker sees it, with some settings changed.

    Prefect's form shows the following.

    Args:
        preset: A preset's name, such as demo, or the path of a config file on the worker's machine.
        overrides: What to change, as after --set: align.dpo.beta=0.2
        until: The last stage to run, such as sft. None runs all.
    """
    with history.recorded(str(flow_run.id), Path(preset).stem, overrides) as entry:
        try:
            if deployment.id and preset not in config_file.presets():
                check_source(preset, deployed=True)
            config = config_file.load(preset, overrides).config
        except StageError as error:
            entry.fail(error)
            return told(history.run_name(preset, []), failed(error))
        return told(config.name, run_config(config, until, entry))


def failed(first: StageError, *others: StageError) -> State[Any]:
    """The final state of a run that problems have ended; its name is the first one's status: Refused, Diverged, ..."""
    return Failed(name=first.status.title(), message="; ".join(map(str, [first, *others])), data=first)


def told(name: str, state: State[Any]) -> State[Any]:
    """A run's final state, after automations have been told of a failure."""
    if isinstance(state.data, StageError) and state.data.status != "preempted":
        announce.emit("failed", name, str(state.message))
    return state


def run_config(config: PipelineConfig, until: str | None, entry: history.Entry) -> State[Any]:
    """The flow's final state."""
    process.begin()
    try:
        prepare(config)
        planned = plan(config)  # here again: a worker is given the config alone
        planned = planned if until is None else nodes_until(planned, until)
    except StageError as error:
        entry.fail(error)
        return failed(error)
    with process.stages_of_flow():
        results, errors = run_nodes(planned, str(flow_run.id))
        whole = until is None and not errors
        if planned.config.sweep and whole and (tests := last_test(planned, sweep.winner(results))) is not None:
            results, errors = run_nodes(tests, str(flow_run.id), results)
            planned = Plan(planned.config, {**planned.nodes, **tests.nodes})
    entry.count(results, live.took)
    announce.report(planned, results)
    announce.group(planned, results, entry.record, "FAILED" if errors else "FINISHED")
    if errors:
        first = next(iter(errors.values()))
        entry.fail(first)
        return failed(*errors.values())
    if (compared := announce.compared(results)) is not None:
        entry.note(best=compared.best())
    _done[str(flow_run.id)] = results
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
    planned: Plan, pipeline_run: str, known: Mapping[str, Result] | None = None
) -> tuple[dict[str, Result], dict[str, StageError]]:
    """Run nodes as their needs are done, at most `config.parallel` at once. What a failure leaves whole still runs.

    `known`: results of nodes that are not to be run; they are in the answer too.
    """
    # Not `wait_for` of Prefect's tasks: each waiting one holds a thread, and the longest chain could not go first.
    config, results = planned.config, dict(known or {})
    live.expect(planned.nodes, history.usual_seconds(config.name))
    errors: dict[str, StageError] = {}
    waiting = longest_chain_first(list(planned.nodes.values()))
    running: dict[str, Request] = {}
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
            running[node.name] = request
            future.add_done_callback(lambda future, name=node.name: ended.put((name, future)))
        if not running:
            return results, errors
        while True:  # in short turns, since Ctrl-C does not interrupt a wait without a time-out
            with contextlib.suppress(queue.Empty):
                name, future = ended.get(timeout=0.5)
                break
        request = running.pop(name)
        outcome = future.result(raise_on_failure=False)
        if isinstance(outcome, Result):
            results[name] = outcome
        elif isinstance(outcome, StageError):
            errors[name] = outcome
        elif (done := tracking.find(request.key())) is not None:
            results[name] = done  # its end is recorded in MLflow, if not in Prefect
            log.warning("%s is done; Prefect could not record it (%s).", name, type(outcome).__name__)
        else:  # an exception that no stage has made a problem of
            lack = out_of_resource(outcome)
            other = lack or f"{name}: {outcome!r}"
            errors[name] = StageError(other, status="failed", kind=type(outcome).__name__)


def longest_chain_first(nodes: list[Node]) -> list[Node]:
    """Nodes with the longest chain of others behind them first; else in the plan's order."""
    depth = {node.name: 0 for node in nodes}
    for node in reversed(nodes):
        for need in node.needs & depth.keys():
            depth[need] = max(depth[need], depth[node.name] + 1)
    return sorted(nodes, key=lambda node: -depth[node.name])


@dataclass(frozen=True)
class Finished:
    """A pipeline all of whose stages are done: the flow run's id, and node name -> Result."""

    run: str
    results: dict[str, Result]


def run(planned: Plan, changed: Sequence[str] = (), until: str | None = None) -> Finished:
    """Run the pipeline from this process and wait for it.

    `changed`: what differs from the config's file, `key=value`; `until` as in the flow. When all stages are done, a
    Prefect server that cannot record it is a warning.

    Raises:
        StageError: a stage stopped, with its problem and status; or the run was stopped by Ctrl-C or SIGTERM (status
            `preempted`).
    """
    config = planned.config
    _done.clear()
    try:
        with tags(*tags_of(config), *changed):
            run_locally(lambda: pipeline(config, until))
    except Exception as error:
        if isinstance(error, StageError) or not _done:
            raise
        log.warning("All stages are done; Prefect could not record the end of the run (%s).", type(error).__name__)
    ((flow_run_id, results),) = _done.items()
    return Finished(flow_run_id, results)


def tags_of(config: PipelineConfig, flow: str = "pipeline") -> list[str]:
    """What runs are found by in Prefect: the flow and the methods."""
    return list(dict.fromkeys([flow, *(method.method for method in config.align.values())]))


def run_locally(call: Callable[[], T]) -> T:
    """Call a flow from this process, with databases and a Prefect server available, and wait for it.

    Raises:
        StageError: what the flow raises; or it was stopped by Ctrl-C or SIGTERM (status `preempted`).
    """
    supervisor.interrupt_on_sigterm()
    try:
        checks.check_tracking()
        with ThreadPoolExecutor(1) as aside:
            database = aside.submit(tracking.setup)  # MLflow takes seconds to import: while Prefect's server starts
            with local_prefect():
                database.result()
                return call()
    except (KeyboardInterrupt, TerminationSignal):
        where = "; ".join(process.stopped()) or "the run was stopped"
        message = f"{where}; run the same command to resume"
        raise StageError(message, status="preempted", kind="preempted") from None
