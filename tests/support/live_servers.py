"""`alignflow up` as tests use it: started, asked, ended; and small things to run on it."""

import base64
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows.servers import passwords, supervisor
from flows.servers.address_file import Addresses
from schemas.stage import STAGES, Request
from stages import tracking
from tests.support import commands, forks
from tests.support.processes import wait_for

UP = [sys.executable, "-m", "flows.cli", "up"]
START_SECONDS = 300
PATIENCE = 120.0
"""Seconds for an answer on a loaded machine: Prefect waits up to 60 for its database."""


def free_port() -> int:
    """A port that nobody listens at."""
    return supervisor.port(None, 0, "port")


@contextlib.contextmanager
def up(home: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], Addresses]]:
    """`alignflow up` for a home, on free ports; ended on the way out."""
    process = subprocess.Popen(
        [*UP, *ports(), *options],
        env={**os.environ, "ALIGNFLOW_HOME": str(home), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    # Only a limit for a hang: without it the test would wait for a line for ever.
    patience = threading.Timer(START_SECONDS, process.kill)
    patience.start()
    try:
        assert process.stdout is not None
        lines = []
        while not lines or "Ctrl-C" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], "".join(lines)
        patience.cancel()
        yield process, said(home, lines)
    finally:
        patience.cancel()
        process.terminate()
        process.communicate(timeout=PATIENCE)


def said(home: Path, lines: list[str]) -> Addresses:
    """The addresses of `alignflow up`, which it has said in these lines."""
    where = Addresses.model_validate_json((home / "up.json").read_text())
    for name, url in (("MLflow", where.mlflow), ("Prefect", where.prefect.removesuffix("/api"))):
        assert any(line.startswith(f"{name:8} {url}") for line in lines), "".join(lines)
    return where


@contextlib.contextmanager
def forked_up(home: Path, *options: str, **environment: str) -> Iterator[Addresses]:
    """The same where processes do not matter: the command, its servers and its workers are forks, without guards."""
    out = home.with_name(f"{home.name}-up.log")
    own = {"ALIGNFLOW_HOME": str(home), **environment}
    out.touch()
    process = commands.begun(["up", *ports(), *options], out, out, own)
    try:
        wait_for(lambda: not process.is_alive() or "Ctrl-C" in out.read_text(), START_SECONDS)
        assert process.is_alive(), out.read_text()
        yield said(home, out.read_text().splitlines())
    finally:
        process.terminate()
        forks.ended(process)


def ports() -> list[str]:
    """Options of `alignflow up`."""
    return ["--mlflow-port", str(free_port()), "--prefect-port", str(free_port())]


def keys(home: Path) -> dict[str, str]:
    """The variables that let in clients which know nothing of the home whose `alignflow up` runs."""
    made = passwords.Passwords.model_validate_json((home / "passwords.json").read_text())
    user = {"MLFLOW_TRACKING_USERNAME": passwords.USER, "MLFLOW_TRACKING_PASSWORD": made.mlflow}
    return {"PREFECT_API_AUTH_STRING": made.prefect, **user}


def request(method: str, url: str, **more: Any) -> httpx.Response:
    """`httpx.request`, which by itself would give up after five seconds."""
    return httpx.request(method, url, timeout=PATIENCE, **more)


def ask(home: Path, method: str, url: str, **more: Any) -> httpx.Response:
    """The answer of a server of a home, with its password; asked again while its database is locked (503)."""
    made = passwords.Passwords.model_validate_json((home / "passwords.json").read_text())
    word = f"{passwords.USER}:{made.mlflow}" if "/mlflow" in url else made.prefect
    headers = {"Authorization": f"Basic {base64.b64encode(word.encode()).decode()}", **more.pop("headers", {})}
    end = time.monotonic() + PATIENCE
    while True:
        answer = request(method, url, headers=headers, **more)
        if answer.status_code != 503 or time.monotonic() > end:
            return answer
        time.sleep(1)


@contextlib.contextmanager
def ended(command: list[str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A server of a test's own, ended on the way out."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def guards(up: subprocess.Popen[Any]) -> dict[int, str]:
    """Guards that `alignflow up` has started -> what each is for: a server, or a worker's name."""
    commands = {}
    for child in psutil.Process(up.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            line = child.cmdline()
            if "flows.servers.supervisor" not in line:  # one that has not begun yet looks as its parent does
                continue
            name = line[line.index("--name") + 1].partition(" on ")[0] if "--name" in line else ""
            servers = {"stages.tracking.mlflow_server": "mlflow", "flows.servers.door": "prefect"}
            commands[child.pid] = f"worker {name}" if name else servers[line[line.index("-m", 4) + 1]]
    return commands


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait for a condition; one that cannot be asked yet does not hold. The limit is only for a hang."""

    def asked() -> object:
        with contextlib.suppress(OSError, httpx.HTTPError):
            return condition()
        return False

    wait_for(asked, seconds)


def python(code: str, home: Path, **environment: str) -> Any:
    """What a fresh process prints as JSON: Prefect's settings are read once per process."""
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ALIGNFLOW_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def run_stage(home: Path) -> dict[str, str]:
    """Run a small stage through the worker, as any client of the server can; how its flow run ended, and its key."""
    params = {"path": "demo:sft", "kind": "sft", "limit": 20}
    request = Request.model_validate(
        {"stage": "validate", "version": STAGES["validate"].version, "params": params, "name": "tiny"}
    )
    prefect = Addresses.model_validate_json((home / "up.json").read_text()).prefect
    deployment = ask(home, "GET", f"{prefect}/deployments/name/stage/cpu").raise_for_status().json()["id"]
    asked = {"parameters": {"request": request.model_dump(mode="json")}, "state": {"type": "SCHEDULED"}}
    url = f"{prefect}/deployments/{deployment}/create_flow_run"
    run = ask(home, "POST", url, json=asked).raise_for_status().json()["id"]
    state: dict[str, Any] = {}

    def ended() -> bool:
        state.update(ask(home, "GET", f"{prefect}/flow_runs/{run}").raise_for_status().json()["state"])
        return state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

    wait_for(ended, 240, lambda: state)
    return {"state": state["name"], "message": state["message"], "key": request.key()}


def fetch(key: str, home: Path, **environment: str) -> dict[str, Any]:
    """Bring what the stage of a key has made to a home."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ALIGNFLOW_HOME": str(home), **environment}.items():
            patch.setenv(name, value)
        result = tracking.find(key)
        assert result is not None and result.run_id is not None
        artifact = result.outputs["data"]
        folder = tracking.fetch(artifact)
        location = tracking.client().get_run(result.run_id).info.artifact_uri
    files = sorted(file.name for file in folder.rglob("*") if file.is_file())
    return {"files": files, "folder": str(folder), "location": location, "sha256": artifact.sha256}
