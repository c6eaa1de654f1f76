"""The pipeline as a Prefect flow: a config's nodes as tasks, each in its own process, in the order of their needs."""

import contextlib
import logging
import os
import queue
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.exceptions import TerminationSignal
from prefect.runtime import deployment, flow_run
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_HOME,
    PREFECT_LOGGING_LEVEL,
    temporary_settings,
)
from prefect.states import Completed, Failed, State

from flows import addresses, preflight, runner, servers
from flows.lease import stage_lease
from flows.placement import run_placed
from flows.plan import Node, plan
from flows.roots import check_roots
from schemas.config import PipelineConfig
from schemas.stage import STAGES, Placement, Request, Result, StageError
from stages import tracking

log = logging.getLogger("alignflow")

T = TypeVar("T")

TRIES = 3
"""How often a stage that is stopped from outside is started, before the run gives up."""

RETRIES = 7
"""Of Prefect's own requests, each pause twice as long as the one before: a server may be away for four minutes."""

own_servers: set[str] = set()
"""Addresses of Prefect servers that this process has started: nobody on another host shares them."""


# --- From a node to a request -----------------------------------------------------------------------------------------


def request_for(
    node: Node, config: PipelineConfig, results: Mapping[str, Result], pipeline_run: str | None = None
) -> Request:
    """The request of a node whose needs are all done.

    Raises:
        StageError: a file that the config names is missing.
    """
    inputs = {name: results[source].outputs[output] for name, (source, output) in node.inputs.items()}
    request = Request(
        stage=node.stage,
        version=STAGES[node.stage],
        params=node.params,
        inputs=inputs,
        seed=node.seed,
        name=node.label,
        pipeline_run=pipeline_run,
        experiment=config.name,
        placement=Placement(devices=node.devices, threads=threads(config)),
        tags=node.tags | data_version(node, results) | ({"sweep": config.sweep} if config.sweep else {}),
        about=node.about | training_behind(node, results),
        log_text=config.log_text,
    )
    return runner.with_sources(request, config_field(node))


def threads(config: PipelineConfig) -> int | None:
    """Threads per stage when several run side by side."""
    return max(1, (os.cpu_count() or 1) // config.parallel) if config.parallel > 1 else None


def config_field(node: Node) -> str:
    """Where the config names the files of a node, for messages."""
    if node.stage == "validate":
        return node.name.replace(" ", ".")
    return "model" if node.name == "base" else node.name


def data_version(node: Node, results: Mapping[str, Result]) -> dict[str, str]:
    """The tag data.version: the digest of the data folder that a node reads."""
    if "data" not in node.inputs:
        return {}
    source, output = node.inputs["data"]
    return {"data.version": results[source].outputs[output].sha256[:16]}


def training_behind(node: Node, results: Mapping[str, Result]) -> dict[str, str]:
    """On an evaluation: the key and the MLflow run of the stage that made the model."""
    if node.stage != "evaluate":
        return {}
    made = results[node.inputs["model"][0]]
    return {"model.key": made.key, "train.run_id": made.run_id or ""}


# --- The flow ---------------------------------------------------------------------------------------------------------


@task(name="stage", task_run_name="{name}", persist_result=False, result_serializer="json", cache_policy=NO_CACHE)
def run_node(name: str, request: Request, pool: str | None = None) -> Result | State[Any]:
    """One stage, here or on a work pool. When it stops, the task fails with the stage's problem; when it was stopped
    from outside, it is started again first.
    """
    result = run_once(request, pool)
    for number in range(2, TRIES + 1):
        if not was_stopped(result) or runner.stopping():
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
    return runner.run_stage(request, log, stage_lease(request.key(), log) if shared else None)


def problem_of(name: str, result: Result) -> StageError:
    """A stopped stage's problem as an exception that carries its exit code."""
    assert result.error is not None
    problem = result.error.model_dump()
    said_first = "field" if problem["field"] else "message"
    problem[said_first] = f"{name}: {problem[said_first]}"
    return StageError(status=result.status, **problem)


@flow(name="pipeline", flow_run_name="{config.name}", persist_result=False, result_serializer="json")
def pipeline(config: PipelineConfig) -> State[Any]:
    """Run a config. The flow's result is node name -> Result; it fails with the problem of the first stage to stop."""
    runner.begin()
    try:
        prepare(config)
        nodes = plan(config)
    except StageError as error:
        return Failed(message=str(error), data=error)
    try:
        results, errors = run_nodes(nodes, config, str(flow_run.id))
    except BaseException:
        runner.stop_all()
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
        preflight.check_pools(list(config.pools.values()))
    preflight.check_experiment(config.name, placed=bool(config.pools))


def run_nodes(
    nodes: list[Node], config: PipelineConfig, pipeline_run: str, known: Mapping[str, Result] | None = None
) -> tuple[dict[str, Result], dict[str, StageError]]:
    """Run nodes as their needs are done, at most `config.parallel` at once. What a failure leaves whole still runs.

    `known`: results of nodes that are not to be run; they are in the answer too.
    """
    results: dict[str, Result] = dict(known or {})
    errors: dict[str, StageError] = {}
    waiting = by_urgency(nodes)
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


def by_urgency(nodes: list[Node]) -> list[Node]:
    """Nodes with the longest chain of others behind them first; else in the plan's order."""
    depth = {node.name: 0 for node in nodes}
    for node in reversed(nodes):
        for need in node.needs & depth.keys():
            depth[need] = max(depth[need], depth[node.name] + 1)
    return sorted(nodes, key=lambda node: -depth[node.name])


def report(nodes: list[Node], results: Mapping[str, Result], config: PipelineConfig) -> None:
    """Log what was reused, the table of the comparison, and where MLflow shows the models side by side."""
    logger = get_run_logger()
    reused = [node.name for node in nodes if node.name in results and results[node.name].reused]
    if reused:
        logger.info("reused %d of %d stages: %s", len(reused), len(nodes), ", ".join(reused))
    skipped = [node.name for node in nodes if node.name not in results]
    if skipped:
        logger.warning("not done: %s", ", ".join(skipped))
    text = ""
    if "compare" in results and any(node.name == "compare" for node in nodes):
        table = tracking.fetch(results["compare"].outputs["comparison"]) / "table.txt"
        text = table.read_text().rstrip() if table.exists() else ""
        if results["compare"].reused and text:  # a stage that ran has said it
            logger.info("\n%s", text)
        logger.info("report: %s", table.with_name("report.html"))
    runs = [results[node.name].run_id for node in nodes if node.stage == "evaluate" and node.name in results]
    found = [run for run in runs if run] if len(runs) > 1 else []  # one alone is beside nothing
    server, first = mlflow_pages()
    pages = {
        "metrics": tracking.compare_link(server, found),
        "answers": tracking.compare_link(server, found, "ARTIFACT"),
    }
    links = {what: link for what, link in pages.items() if link}
    for what, link in links.items():
        logger.info("%s side by side in MLflow: %s%s", what, link, first)
    if PREFECT_API_URL.value() not in own_servers:
        show_in_prefect(text, links)


def mlflow_pages() -> tuple[str, str]:
    """Where a browser finds MLflow's pages of this home, and what has to be done first: nothing where a server runs."""
    uri, running = tracking.tracking_uri(), addresses.found()
    if uri.startswith("http"):
        return tracking.without_passwords(uri).rstrip("/"), ""
    if running is not None and "MLFLOW_TRACKING_URI" not in os.environ:
        return running.mlflow, ""
    if servers.port(None, servers.MLFLOW_PORT, "port") == servers.MLFLOW_PORT:
        return servers.address(servers.HOST, servers.MLFLOW_PORT), "  (start `alignflow ui`)"
    return "", "  (start `alignflow ui`, and put the address that it says for MLflow before this)"


def show_in_prefect(table: str, links: Mapping[str, str]) -> None:
    """The table and the way to MLflow as artifacts on Prefect's page of the run. A run does not fail for want of them.

    Only an address that a server of MLflow answers can be followed from there.
    """
    pages = links if tracking.tracking_uri().startswith("http") else {}
    ways = "\n".join(f"- [{what} side by side in MLflow]({link})" for what, link in pages.items())
    try:
        if table:
            text = f"{ways}\n\n```text\n{table}\n```"
            create_markdown_artifact(text, key="comparison", description="How the models compare")
        for what, link in pages.items():
            words = f"{what} side by side in MLflow"
            create_link_artifact(link, link_text=words, key=f"{what}-in-mlflow", description=f"The models' {words}")
    except Exception as error:  # whatever the server or the network is up to
        get_run_logger().warning("Prefect does not show the comparison: %s", error)


# --- Running it from here ---------------------------------------------------------------------------------------------


def quieten() -> None:
    """Let our own lines through and little of Prefect's."""
    logging.getLogger("prefect").setLevel(logging.WARNING)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addFilter(is_news)


def is_news(record: logging.LogRecord) -> bool:
    """False where Prefect says again what the stage's own line says: that it is done, or has failed."""
    return not record.getMessage().startswith(("Task run failed with state", "Finished in state Completed()"))


def is_no_link(record: logging.LogRecord) -> bool:
    """False for the link to Prefect's page of the run: our own server has no pages."""
    return not record.getMessage().startswith("View at")


def refuse_no_server() -> None:
    """Raise StageError when the Prefect server that the environment names does not answer."""
    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
    if error is not None:
        raise StageError(
            f"the Prefect server does not answer ({type(error).__name__}).",
            status="failed",
            kind="server",
            field="PREFECT_API_URL",
            value=tracking.without_passwords(str(PREFECT_API_URL.value())),
            fix="start it (`alignflow ui`), or unset the variable: a run then brings a server of its own",
        )


@contextlib.contextmanager
def local_prefect() -> Iterator[None]:
    """Prefect for a run from this process. Where no server is set, one runs over `home()` for as long as this does.

    It is ours and not the one that Prefect starts by itself: that one lives on when this process is killed.
    """
    quieten()
    if PREFECT_API_URL.value():
        refuse_no_server()
        said = "PREFECT_CLIENT_MAX_RETRIES" in os.environ
        patience: dict[Any, Any] = {} if said else {PREFECT_CLIENT_MAX_RETRIES: RETRIES}
        with temporary_settings(patience):
            yield
        return
    logging.getLogger("prefect.flow_runs").addFilter(is_no_link)
    settings: dict[Any, Any] = {PREFECT_LOGGING_LEVEL: "WARNING"}
    if "PREFECT_HOME" not in os.environ:
        settings[PREFECT_HOME] = tracking.home() / "prefect"
    options = ("--no-ui", "--no-scheduler", "--no-late-runs", "--analytics-off")
    server = servers.prefect_server(servers.port(None, 0, "port"), *options)
    with contextlib.ExitStack() as stack:
        with tracking.lock(tracking.home() / "prefect" / "start.lock"):  # two at once would both make the database
            stack.enter_context(servers.running([server]))
        own_servers.add(f"{server.url}/api")
        stack.enter_context(temporary_settings({**settings, PREFECT_API_URL: f"{server.url}/api"}))
        try:
            yield
        finally:
            for handler in logging.getLogger("prefect.flow_runs").handlers:
                handler.flush()  # lines still on their way, before the server ends


def run(config: PipelineConfig) -> dict[str, Result]:
    """Run the pipeline from this process and wait for it: node name -> Result.

    Raises:
        StageError: a stage stopped, with its problem and status; or the config lacks something; or the run was stopped
            by Ctrl-C or SIGTERM (status `preempted`).
    """
    plan(config)  # what is missing is said before a server starts
    return from_here(lambda: cast("dict[str, Result]", pipeline(config)))  # Prefect gives the data of the state


def from_here(call: Callable[[], T]) -> T:
    """Call a flow from this process, with databases and a Prefect server at hand, and wait for it.

    Raises:
        StageError: what the flow raises; or it was stopped by Ctrl-C or SIGTERM (status `preempted`).
    """
    servers.interrupt_on_sigterm()
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


@dataclass(frozen=True)
class Outlook:
    """What a run would do with a node. `unknown`: its inputs will be made anew, so its key is not known yet."""

    node: Node
    state: Literal["reused", "run", "unknown"]
    result: Result | None = None


def dry_run(config: PipelineConfig) -> list[Outlook]:
    """For each node in order: would it be reused, or run? Starts nothing."""
    results: dict[str, Result] = {}
    outlooks = []
    for node in plan(config):
        found = tracking.find(request_for(node, config, results).key()) if node.needs <= results.keys() else None
        if found is not None:
            results[node.name] = found
            outlooks.append(Outlook(node, "reused", found))
        else:
            outlooks.append(Outlook(node, "run" if node.needs <= results.keys() else "unknown"))
    return outlooks
