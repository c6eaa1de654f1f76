"""MLflow killed, answering 503, or slow while a model trains: no step waits for it, and no point of a curve is lost."""

import contextlib
import http.client
import os
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from flows.servers import mlflow_prefect, supervisor
from schemas.config import SFTConfig
from schemas.stage import STAGES, Artifact, Request, Result
from stages import __main__ as entry
from stages import tracking
from stages.engine.training import loop
from tests.support import forked_servers, homes, models
from tests.support.forks import ended, start
from tests.support.journals import losses
from tests.support.processes import wait_for

STEPS = 60
SLOW_SECONDS = 10.0


class Between(BaseHTTPRequestHandler):
    """Hands requests on to MLflow, or misbehaves as `mode` says."""

    mode = "well"
    behind = 0
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if Between.mode == "slow":
            time.sleep(SLOW_SECONDS)
        if Between.mode == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        there = http.client.HTTPConnection(supervisor.HOST, Between.behind, timeout=60)
        try:
            there.request(self.command, self.path, body, {k: v for k, v in self.headers.items() if k != "Host"})
            found = there.getresponse()
            content = found.read()
        except OSError:
            self.close_connection = True  # as if nobody listened
            return
        finally:
            there.close()
        self.send_response(found.status)
        for name, value in found.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, ready: Path) -> Iterator[supervisor.Server]:
    """An MLflow server of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNFLOW_HOME", str(homes.furnish(tmp_path_factory.mktemp("served"), ready)))
        there = mlflow_prefect.mlflow_server(supervisor.port(None, 0, "port"))
        Between.behind = int(there.url.rsplit(":", 1)[1])
        with forked_servers.running(there):
            yield there


@pytest.fixture
def proxy(server: supervisor.Server) -> Iterator[str]:
    """The address under which the stage knows MLflow."""
    Between.mode = "well"
    with ThreadingHTTPServer((supervisor.HOST, 0), Between) as between:
        threading.Thread(target=between.serve_forever, daemon=True).start()
        yield f"http://{supervisor.HOST}:{between.server_address[1]}"
        between.shutdown()


def unhurried_stage(home: Path, request: Path, uri: str) -> None:
    """The stage's own entry point; every step takes 50 ms more."""
    os.environ |= {"ALIGNFLOW_HOME": str(home), "MLFLOW_TRACKING_URI": uri}
    inner = loop.Loop.one_step

    def one_step(self: loop.Loop, micros: list[Any]) -> dict[str, float]:
        time.sleep(0.05)
        return inner(self, micros)

    loop.Loop.one_step = one_step  # type: ignore[method-assign]
    sys.exit(entry.main(["sft", str(request)]))


@contextlib.contextmanager
def fault(kind: str, server: supervisor.Server) -> Iterator[None]:
    """MLflow misbehaves within the block."""
    if kind != "killed":
        Between.mode = kind
        yield
        Between.mode = "well"
        return
    at = Between.behind
    Between.behind = supervisor.port(None, 0, "port")  # where nobody listens
    yield
    Between.behind = at


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["killed", "503", "slow"])
def test_training_does_not_wait_for_mlflow(
    kind: str, server: supervisor.Server, proxy: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models.model_folder(tmp_path / "model")
    data = models.data_folder(tmp_path / "data", sft=models.rows(20, *models.ANSWERS))
    inputs = {n: Artifact(uri=str(p), sha256=tracking.digest(p)) for n, p in (("model", model), ("data", data))}
    config = SFTConfig(batch_size=4, epochs=STEPS / 5, checkpoint_minutes=60)
    params = config.model_dump(mode="json")
    asked = Request(
        stage="sft", version=STAGES["sft"].version, params=params, inputs=inputs, seed=len(kind), experiment=kind
    )
    request = tmp_path / "request.json"
    request.write_text(asked.model_dump_json())
    process = start(unhurried_stage, home, request, proxy)

    work = home / "work" / asked.key()
    wait_for(lambda: len(losses(work)) >= STEPS // 3)
    began = time.time()
    with fault(kind, server):
        wait_for(lambda: len(losses(work)) == STEPS)
        logged = losses(work)
        if kind != "slow":
            time.sleep(1)  # the end of the stage meets the fault too
    assert ended(process) == 0
    assert logged[-1][1] - began < SLOW_SECONDS, "a step has waited"

    before = [b - a for (_, a), (_, b) in pairwise(logged) if b < began]
    during = [b - a for (_, a), (_, b) in pairwise(logged) if a > began]
    with capsys.disabled():
        ratio = median(during) / median(before)
        print(f"\nMLflow {kind}: a step takes {ratio:.2f} times as long, at most {max(during) * 1e3:.0f} ms", end=" ")

    os.environ["MLFLOW_TRACKING_URI"] = server.url
    try:
        run_id = Result.model_validate_json(request.with_name("result.json").read_text()).run_id
        assert run_id is not None
        history = tracking.client().get_metric_history(run_id, "train/loss")
        assert [point.step for point in sorted(history, key=lambda p: p.step)] == list(range(1, STEPS + 1))
        assert tracking.client().get_run(run_id).info.status == "FINISHED"
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
