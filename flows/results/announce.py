"""The summary of a finished run: what was reused, the table of the comparison, links into MLflow; and the events by
which automations learn of what happened.
"""

import logging
import os
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import httpx
from prefect import get_run_logger
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.events import Event, emit_event
from prefect.events.worker import EventsWorker
from prefect.runtime import deployment, flow_run
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL

from flows.planning import sweep
from flows.planning.plan import Plan
from flows.results.history import Record
from flows.results.summary import Compared, Summary
from flows.servers import address_file, supervisor
from schemas.stage import Result
from schemas.text import one_line
from stages import tracking

log = logging.getLogger("alignflow")

EMIT_SECONDS = 10.0
"""How long an event is waited for until the server has it."""
FINDING = 2000
"""Characters of an event's sentence; a model's reasons may be long."""
PIPELINE = "pipeline"
"""Tag of the MLflow run that stands for a whole pipeline run: the flow run's id."""


def report(plan: Plan, results: Mapping[str, Result], aloud: bool = False) -> None:
    """Log what was reused and what not done; on a worker, or aloud, the comparison too. Prefect's page of the run shows
    it, where the server is our own once `alignflow ui` runs.

    `alignflow run` prints the comparison itself, once the flow is over.
    """
    logger = get_run_logger()
    own = {name: results[name] for name in plan.nodes if name in results}
    reused = [name for name, one in own.items() if one.reused]
    if reused:
        logger.info("reused %d of %d stages: %s", len(reused), len(plan.nodes), ", ".join(reused))
    skipped = [name for name in plan.nodes if name not in own]
    if skipped:
        logger.warning("not done: %s", ", ".join(skipped))
    found = compared(own)
    text = "" if found is None else (found.folder / "table.txt").read_text().rstrip()
    if tested := sweep.test_text(results):
        text = f"{text}\n\n{tested}"
    links, first = mlflow_links(own)
    if text and (deployment.id or aloud):
        logger.info("\n%s", text)
        for what, link in links.items():
            logger.info("%s side by side in MLflow: %s%s", what, link, first)
    show_in_prefect(text, links)


def compared(results: Mapping[str, Result]) -> Compared | None:
    """What the run's comparison has published; None where there is none."""
    if "compare" not in results:
        return None
    return Compared(tracking.fetch(results["compare"].outputs["comparison"]))


def summary(run: str, name: str, results: Mapping[str, Result], seconds: float) -> Summary:
    """What a finished run has come to, for whoever waits for it."""
    links, first = mlflow_links(results)
    return Summary(run, name, results, seconds, compared(results), sweep.test_text(results), links, first)


def mlflow_links(results: Mapping[str, Result]) -> tuple[dict[str, str], str]:
    """MLflow's pages of the run's evaluations, side by side, and what has to be done before a browser finds them."""
    # of an evaluation alone there is nothing beside it
    # by name: stages that run side by side end in any order
    done = sorted(results.items())
    runs = [one.run_id for name, one in done if name.startswith(("eval ", "test ")) and one.run_id]
    runs = runs if len(runs) > 1 else []
    server, first = mlflow_pages()
    pages = {"metrics": tracking.compare_link(server, runs), "answers": tracking.compare_link(server, runs, "ARTIFACT")}
    return {what: link for what, link in pages.items() if link}, first


def mlflow_pages() -> tuple[str, str]:
    """Where a browser finds MLflow's pages of this home, and what has to be done first: nothing where a server runs."""
    uri, running = tracking.tracking_uri(), address_file.found()
    if uri.startswith("http"):
        return tracking.without_passwords(uri).rstrip("/"), ""
    if running is not None and "MLFLOW_TRACKING_URI" not in os.environ:
        return running.mlflow, ""
    if supervisor.port(None, supervisor.MLFLOW_PORT, "port") == supervisor.MLFLOW_PORT:
        return supervisor.address(supervisor.HOST, supervisor.MLFLOW_PORT), "  (start `alignflow ui`)"
    return "", "  (start `alignflow ui`, and prefix this with the MLflow address that it prints)"


def version_page(model: str, number: str) -> str:
    """MLflow's page of a registered version; empty where it has none that a browser finds."""
    server, _ = mlflow_pages()
    return f"{server}/#/models/{quote(model, safe='')}/versions/{number}" if server else ""


def emit(event: str, name: str, finding: str, version: str = "", kind: str = "model", **more: str) -> bool:
    """Let Prefect have the event `alignflow.EVENT` about a registered model or experiment (or data, by `kind`), so that
    automations can tell a person or start something; whether it was sent. No run fails because of it.

    Its payload: `finding`, a sentence; `version`, `run` (the flow run's id), `links` (`prefect`, `mlflow`), and `more`.
    """
    api = PREFECT_API_URL.value()
    if not api:
        return False
    run, pages = str(flow_run.id or ""), {}
    if run:
        server = tracking.without_passwords(str(PREFECT_UI_URL.value() or str(api).removesuffix("/api")))
        pages["prefect"] = f"{server}/runs/flow-run/{run}"
    if version:
        pages["mlflow"] = version_page(name, version)
    resource = {"prefect.resource.id": f"alignflow.{kind}.{name}", "prefect.resource.name": name}
    resource |= {"alignflow.version": version, "alignflow.run": run}
    payload = {"finding": tracking.shortened(finding, FINDING), "model": name, "version": version, "run": run}
    about: dict[str, Any] = {"event": f"alignflow.{event}", "resource": resource}
    about["payload"] = {**payload, "links": pages, **more}
    if not run:  # nothing that it would be related to: sent so that the server says whether it has it
        return _post(about)
    emitted = emit_event(**about)
    # It is sent from a side thread, and this process, or its server, may end soon.
    sent = threading.Thread(target=EventsWorker.instance().wait_until_empty, daemon=True)
    sent.start()
    sent.join(EMIT_SECONDS)
    return emitted is not None and not sent.is_alive()


def _post(event: Mapping[str, Any]) -> bool:
    """Hand the server an event by HTTP; whether it has taken it."""
    try:
        with get_client(sync_client=True) as client:
            client.request("POST", "/events", json=[Event.model_validate(event).model_dump(mode="json")])
    except httpx.HTTPError as error:
        log.warning("the Prefect server has not taken an event: %s", tracking.without_passwords(str(error)))
        return False
    return True


def group(plan: Plan, results: Mapping[str, Result], entry: Record, status: str = "FINISHED") -> None:
    """One MLflow run for the whole pipeline run: what came out, and the ways to its report and its stages. The stages
    that it has computed itself are nested below it; those that it has reused belong to the run that made them.

    A run does not fail because of it. It has neither of the tags by which stages are found. Called again for the same
    pipeline run, as a retraining does, it goes on with the same MLflow run.
    """
    try:
        client = tracking.client()
        experiment = tracking.experiment(plan.config.name)
        (known, *_) = [*client.search_runs([experiment], f"tags.`{PIPELINE}` = '{entry.run}'"), None]
        if known is None:
            tags = {PIPELINE: entry.run, "mlflow.source.name": "alignflow", "mlflow.source.type": "LOCAL"}
            tags["mlflow.user"] = tracking.user()
            name = f"pipeline {one_line(' '.join([entry.name, *entry.changed]), 100)}"
            known = client.create_run(experiment, int(entry.began * 1000), tags, name)
        run_id = known.info.run_id
        for result in results.values():
            if result.run_id and not result.reused:
                client.set_tag(result.run_id, "mlflow.parentRunId", run_id)
        for name, value in (results["compare"].metrics if "compare" in results else {}).items():
            if not name.startswith("eval/"):  # those stay where they were measured
                client.log_metric(run_id, tracking.acceptable_name(name), value)
        client.set_tag(run_id, "mlflow.note.content", tracking.shortened(_note(results), tracking.TAG_LENGTH))
        client.set_terminated(run_id, status)
    except Exception as error:  # whatever the server or the network is up to
        get_run_logger().warning("MLflow does not show the run as a whole: %s", tracking.without_passwords(str(error)))


def _note(results: Mapping[str, Result]) -> str:
    """Markdown: the first finding, the way to the report, and to each stage."""
    found, lines = compared(results), []
    if found is not None:
        lines += [f"**{sentence}**\n" for sentence in found.numbers().get("findings", [])[:1]]
    for name, result in results.items():
        if result.run_id:
            page = f"#/experiments/{tracking.client().get_run(result.run_id).info.experiment_id}/runs/{result.run_id}"
            if name == "compare":
                lines.insert(1, f"[Report]({page}/artifacts/report.html)\n")
            lines.append(f"- [{one_line(name, 60)}]({page}){' (reused)' if result.reused else ''}")
    return "\n".join(lines)


def show_in_prefect(table: str, links: Mapping[str, str]) -> None:
    """The table and the way to MLflow as artifacts on Prefect's page of the run. A run does not fail because of them.

    Where no server of MLflow is set, the links go to where `alignflow ui` will have one.
    """
    pages = {what: link for what, link in links.items() if link.startswith("http")}
    ways = "\n".join(f"- [{what} side by side in MLflow]({link})" for what, link in pages.items())
    try:
        if table:
            text = f"{ways}\n\n```text\n{table}\n```"
            create_markdown_artifact(text, key="comparison", description="How the models compare")
        for what, link in pages.items():
            words = f"{what} side by side in MLflow"
            create_link_artifact(link, link_text=words, key=f"{what}-in-mlflow", description=f"The models' {words}")
    except Exception as error:  # whatever the server or the network is up to
        get_run_logger().warning("Prefect does not show the comparison: %s", tracking.without_passwords(str(error)))
