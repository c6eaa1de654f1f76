"""`ui`, `up` and `deploy` for scripts: one JSON object on stdout, and what people read on stderr."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.servers import deploy, up
from flows.servers.address_file import Addresses
from schemas.text import show

THERE = Addresses(pid=7, mlflow="http://127.0.0.1:5000", prefect="http://127.0.0.1:4200/api", pools=["cpu"])


@pytest.mark.parametrize("command", ["ui", "up"])
def test_addresses_are_told_once_they_answer(command: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bring_up(*given: Any) -> None:
        ready: Callable[[Addresses], None] | None = given[-1]
        show("MLflow   there")
        if ready is not None:
            ready(THERE)
        show("Stopping.")

    monkeypatch.setattr(up, "bring_up", bring_up)
    result = CliRunner().invoke(app, [command, "--json"], catch_exceptions=False)
    told = {"pid": 7, "mlflow": "http://127.0.0.1:5000", "prefect": "http://127.0.0.1:4200/api", "pools": ["cpu"]}
    assert json.loads(result.stdout) == told
    assert result.stderr == "MLflow   there\nStopping.\n"
    assert CliRunner().invoke(app, [command]).stdout == "MLflow   there\nStopping.\n"


def test_where_servers_run_already_their_addresses_are_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "taken", lambda lock: False)
    monkeypatch.setattr(up.address_file, "found", lambda: THERE)
    result = CliRunner().invoke(app, ["ui", "--json"], catch_exceptions=False)
    assert json.loads(result.stdout)["pid"] == 7 and result.stderr.startswith("Already running")


def test_deploy_tells_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"work_pools": {"cpu": "created"}, "deployments": {}, "automations": {}}

    def create(file: Path | None) -> dict[str, dict[str, str]]:
        show("work pool   cpu: created")
        return there

    monkeypatch.setattr(deploy, "deploy", create)
    result = CliRunner().invoke(app, ["deploy", "--json"], catch_exceptions=False)
    assert (json.loads(result.stdout), result.stderr) == (there, "work pool   cpu: created\n")
