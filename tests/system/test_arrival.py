"""From a file that arrives to a new champion: real servers, a worker, a person who approves, a webhook that tells."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from tests.flows.test_cli import write_rows
from tests.flows.test_retrain import GATE, config_file, pairs
from tests.support import homes, models, web
from tests.support.commands import alignflow
from tests.support.live_servers import ask, forked_up, keys
from tests.support.processes import wait_for

pytestmark = pytest.mark.slow


@contextmanager
def hook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a webhook of a chat or a pager, and what it was called with."""
    calls: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            calls.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *given: object) -> None: ...

    with web.serving(Hook) as url:
        yield f"{url}/tell", calls


def test_a_file_that_arrives_becomes_a_champion_once_a_person_approves(ready: Path, tmp_path: Path) -> None:
    home, incoming = homes.furnish(tmp_path / "home", ready), tmp_path / "incoming"
    incoming.mkdir()
    asked = [one["prompt"] for one in pairs(40)]
    models.taught(tmp_path / "model", asked, "yes good one", "no bad")  # a random one would never end its answers
    judged = {"judge": "sentiment", "min_prompts": 4, "max_new_tokens": 6, "bootstrap": 100, "temperatures": [1.0]}
    promoted = {"model": "assistant", "gate": GATE, "approval": True, "smoke": True}
    config = config_file(tmp_path, promote=promoted, evaluate={**judged, "baselines": None})
    (tmp_path / "pairs.jsonl").unlink()  # the config's own data; what arrives takes its place
    deployments = yaml.safe_load(Path("deploy/prefect.yaml").read_text())["deployments"]
    (retrain,) = [one for one in deployments if one["name"] == "retrain"]
    retrain["parameters"] = {"source": str(config), "overrides": [], "force": False}
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump({"pull": [], "deployments": [retrain]}))
    roots = {"ALIGNFLOW_ROOTS": str(tmp_path), "PREFECT_WORKER_QUERY_SECONDS": "1"}
    with hook() as (url, calls), forked_up(home, "--pool", "cpu", "--watch", str(incoming), **roots) as where:
        password = keys(home)["PREFECT_API_AUTH_STRING"]
        settings = {PREFECT_API_URL: where.prefect, PREFECT_API_AUTH_STRING: password}
        with temporary_settings(settings), get_client(sync_client=True) as client:  # type: ignore[arg-type]
            Webhook(url=url).save("alignflow")  # type: ignore[arg-type]
            deployed = alignflow("deploy", "--file", tmp_path / "prefect.yaml", ALIGNFLOW_HOME=str(home))
            assert deployed.returncode == 0, deployed.stderr
            lines = deployed.stdout.splitlines()
            assert "automation  alignflow data changed" in lines and "automation  alignflow tell webhook" in lines
            left_out = "automation  alignflow tell Slack (not made: there is no block slack-webhook/alignflow)"
            assert left_out in lines
            write_rows(tmp_path / "still-written", pairs(40)).rename(incoming / "pairs.jsonl")

            def story() -> object:
                logs = [line.message for line in client.read_logs()][-30:]
                return [(one.name, one.state) for one in client.read_flow_runs()], logs, calls

            wait_for(lambda: [one for one in calls if one["event"] == "alignflow.approval-needed"], 300, story)
            run = only(client)
            assert calls[0]["model"] == "assistant" and calls[0]["version"] == "1" and calls[0]["run"] == str(run.id)
            assert calls[0]["links"]["prefect"].endswith(f"/runs/flow-run/{run.id}")
            assert calls[0]["finding"].startswith(
                "assistant version 1 has passed the gate and waits for approval until"
            )
            assert run.name == "retrain config data.preference.path=pairs.jsonl"
            assert run.parameters["data"] == f"data.preference.path={incoming / 'pairs.jsonl'}"
            (smoke,) = [run["smoke"] for run in runs(home, where.mlflow) if "smoke" in run]
            assert smoke.startswith("smoke is 1, must be >= 1 (as MLflow serves it: "), smoke
            # It has left its worker, and no alias has moved.
            wait_for(lambda: state_name(client) == "Suspended", 60, story)
            assert champion(home, where.mlflow) == {}

            answer = client.resume_flow_run(
                run.id, run_input={"answer": "approve", "by": "ada", "note": "read 20 of them"}
            )
            assert answer.status.value == "ACCEPT"
            wait_for(lambda: state_name(client) == "Promoted", 300, story)
            message = "assistant version 1 is the first champion. Approved by ada."
            assert (state := only(client).state) is not None and state.message == message
            assert champion(home, where.mlflow) == {"champion": "1"}
            wait_for(lambda: len(calls) == 2, 60, story)
            assert (calls[1]["event"], calls[1]["finding"]) == ("alignflow.promoted", message)
            names = [one.name for one in client.read_flow_run_states(run.id)]
            assert [one for one in names if one in ("Suspended", "Resuming", "Promoted")] == [
                *("Suspended", "Resuming", "Promoted")
            ]
            told = alignflow("data-arrived", incoming / "pairs.jsonl", ALIGNFLOW_HOME=str(home))
            assert told.returncode == 0 and "the same content as before" in told.stdout, told.stderr
            assert only(client).id == run.id


def only(client: SyncPrefectClient) -> FlowRun:
    """The one retraining."""
    (run,) = client.read_flow_runs()
    return run


def state_name(client: SyncPrefectClient) -> str | None:
    state = only(client).state
    return None if state is None else state.name


def runs(home: Path, mlflow: str) -> list[dict[str, str]]:
    """The tags of all runs of the experiment."""
    found = ask(home, "GET", f"{mlflow}/api/2.0/mlflow/experiments/get-by-name", params={"experiment_name": "trial"})
    number = found.json()["experiment"]["experiment_id"]
    answer = ask(home, "POST", f"{mlflow}/api/2.0/mlflow/runs/search", json={"experiment_ids": [number]})
    return [{tag["key"]: tag["value"] for tag in run["data"]["tags"]} for run in answer.json()["runs"]]


def champion(home: Path, mlflow: str) -> dict[str, str]:
    """Aliases of the registered model."""
    answer = ask(home, "GET", f"{mlflow}/api/2.0/mlflow/registered-models/get", params={"name": "assistant"})
    return {one["alias"]: one["version"] for one in answer.json()["registered_model"].get("aliases", [])}
