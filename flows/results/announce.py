"""The summary of a finished run: what was reused, the table of the comparison, links into MLflow."""

import os
from collections.abc import Mapping

from prefect import get_run_logger
from prefect.artifacts import create_link_artifact, create_markdown_artifact

from flows.planning import sweep
from flows.planning.plan import Plan
from flows.servers import address_file, supervisor
from flows.servers.local_prefect import has_shared_server
from schemas.stage import Result
from stages import tracking


def report(plan: Plan, results: Mapping[str, Result]) -> None:
    """Log what was reused, the table of the comparison, and where MLflow shows the models side by side."""
    logger = get_run_logger()
    reused = [name for name in plan.nodes if name in results and results[name].reused]
    if reused:
        logger.info("reused %d of %d stages: %s", len(reused), len(plan.nodes), ", ".join(reused))
    skipped = [name for name in plan.nodes if name not in results]
    if skipped:
        logger.warning("not done: %s", ", ".join(skipped))
    text = ""
    if "compare" in results and "compare" in plan.nodes:
        table = tracking.fetch(results["compare"].outputs["comparison"]) / "table.txt"
        text = table.read_text().rstrip() if table.exists() else ""
        if results["compare"].reused and text:  # a stage that ran has said it
            logger.info("\n%s", text)
        logger.info("report: %s", table.with_name("report.html"))
    if tested := sweep.test_text(results):
        logger.info("\n%s", tested)
        text = f"{text}\n\n{tested}"
    evaluations = [results[name] for name, node in plan.nodes.items() if node.stage == "evaluate" and name in results]
    runs = [one.run_id for one in evaluations if one.run_id] if len(evaluations) > 1 else []  # one is beside nothing
    server, first = mlflow_pages()
    pages = {"metrics": tracking.compare_link(server, runs), "answers": tracking.compare_link(server, runs, "ARTIFACT")}
    links = {what: link for what, link in pages.items() if link}
    for what, link in links.items():
        logger.info("%s side by side in MLflow: %s%s", what, link, first)
    if has_shared_server():
        show_in_prefect(text, links)


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


def show_in_prefect(table: str, links: Mapping[str, str]) -> None:
    """The table and the way to MLflow as artifacts on Prefect's page of the run. A run does not fail because of them.

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
