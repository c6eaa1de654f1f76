"""A champion served by the command that the paper names, and the compose file for servers that cannot run here."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.results import registry
from stages import tracking
from tests.conftest import ROOT
from tests.support.finished import finish
from tests.support.models import model_folder
from tests.support.processes import below

FILE = ROOT / "deploy" / "serve" / "compose.yaml"
PAPER = (ROOT / "deploy" / "README.md").read_text()


def test_the_compose_file_fits_the_schema_and_opens_nothing() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(FILE)]
    answer = subprocess.run(check, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    services = yaml.safe_load(FILE.read_text())["services"]
    assert set(services) == {"vllm", "mlflow"}
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]) and service["ports"]
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert all(volume.endswith(":ro") for volume in service.get("volumes", []))


@pytest.mark.slow
def test_the_papers_command_serves_a_champion(
    ready_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = finish({"model": model_folder(tmp_path / "model")}, stage="align", name="dpo", params={})
    tags = {"decision": "promoted"}
    registry.register_and_promote("my-assistant", made.outputs["model"], made.run_id, tags, promote=True, expected=None)
    (line,) = re.findall(r"^mlflow models serve .*", PAPER, re.M)
    command = shlex.split(line, comments=True)
    port = command[command.index("--port") + 1]
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    told = {"MLFLOW_TRACKING_URI": tracking.tracking_uri(), "PYTHONPATH": "", "PATH": path}
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(command, env=os.environ | told, stdout=out, stderr=out, cwd=tmp_path)
    try:
        answer = asked(f"http://127.0.0.1:{port}/invocations", server, log)
    finally:
        for child in below(server):
            os.kill(child, signal.SIGKILL)
        server.kill()
        server.wait()
    ((choice,),) = [one["choices"] for one in (answer if isinstance(answer, list) else [answer])]
    assert choice["message"]["role"] == "assistant" and isinstance(choice["message"]["content"], str)


def asked(url: str, server: "subprocess.Popen[bytes]", log: Path) -> Any:
    """The answer to a chat request, once the server gives one."""
    body = json.dumps({"messages": [{"role": "user", "content": "red blue"}], "max_tokens": 4}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + 240
    while time.monotonic() < end and server.poll() is None:
        try:
            with direct.open(request, timeout=60) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())
