"""The Prefect server that a run brings: when it dies, it is started again, and what was done counts."""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import httpx
import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows import pipeline
from flows.planning.plan import Plan
from flows.servers import local_prefect, mlflow_prefect, supervisor
from schemas.config import PipelineConfig
from schemas.errors import StageError
from schemas.stage import Result


def guards() -> list[psutil.Process]:
    """The guards of servers that this process has started."""
    found = []
    for one in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # a zombie has no command any more
            if "flows.servers.supervisor" in " ".join(one.cmdline()):
                found.append(one)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("who", ["guard", "server"])
def test_it_is_started_again_and_knows_what_it_knew(ready_home: object, who: str) -> None:
    with local_prefect.local_prefect(), get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name("known", 3)
        (guard,) = guards()
        victim = guard if who == "guard" else guard.children()[0]
        os.kill(victim.pid, signal.SIGKILL)
        while guards() == [guard]:
            time.sleep(0.05)
        assert client.read_global_concurrency_limit_by_name("known").limit == 3  # asks again until it is back
        assert guards() != [guard]
    assert guards() == []


@pytest.mark.parametrize("password", [None, "ada:not the password"])
def test_a_server_that_does_not_let_us_in_is_named(prefect: SyncPrefectClient, password: str | None) -> None:
    """Before anything starts, and not by a traceback: every server of `alignflow up` and `ui` asks for a password."""
    with (
        temporary_settings({PREFECT_API_AUTH_STRING: password}),
        pytest.raises(StageError, match="PREFECT_API_AUTH_STRING") as refused,
        local_prefect.local_prefect(),
    ):
        pass
    assert "refuses the password" in str(refused.value) and "not the password" not in str(refused.value)


def a_plan() -> Plan:
    data = {"sft": {"path": "demo:sft", "kind": "sft"}}
    return Plan(
        PipelineConfig.model_validate({"name": "tests", "model": {"path": "/m"}, "data": data, "align": {}}), {}
    )


def locally(results: dict[str, Result] | None, error: Exception) -> Callable[..., object]:
    """A run in which the stages end so, and then the flow."""

    def run(call: object) -> object:
        if results is not None:
            pipeline._done["flow run"] = results
        raise error

    return run


def test_a_run_whose_stages_are_done_is_done(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    results = {"sft": Result(status="done", key="k")}
    monkeypatch.setattr(pipeline, "run_locally", locally(results, httpx.ConnectError("gone")))
    assert pipeline.run(a_plan()) == pipeline.Finished("flow run", results)
    assert "All stages are done; Prefect could not record the end of the run (ConnectError)." in caplog.text


@pytest.mark.parametrize(
    ("results", "error"), [(None, httpx.ConnectError("gone")), ({}, StageError("stopped", status="preempted"))]
)
def test_a_run_that_is_not_done_is_not(
    monkeypatch: pytest.MonkeyPatch, results: dict[str, Result] | None, error: Exception
) -> None:
    pipeline._done["of an earlier run"] = {}
    monkeypatch.setattr(pipeline, "run_locally", locally(results, error))
    with pytest.raises(type(error)):
        pipeline.run(a_plan())


def test_one_that_does_not_stay_up_is_given_up_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Dying(supervisor.Running):
        looked = 0

        def __init__(self) -> None:
            pass

        def look_after(self) -> None:
            self.looked += 1
            raise StageError("Prefect does not run.", status="failed", kind="server")

    dying = Dying()
    with caplog.at_level(logging.WARNING), local_prefect.looked_after(dying):
        time.sleep(1.5)
    assert dying.looked == 1 and "Prefect does not run." in caplog.text


@pytest.mark.parametrize("taken", [1, 3])
def test_a_port_that_was_taken_meanwhile_is_given_up_for_another(
    taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the choice of a port and the moment when Prefect listens, ten seconds pass."""
    ports: list[int] = []
    late = "raise OSError('error while attempting to bind on address: address already in use')"

    def prefect_server(number: int, *options: str, password: str) -> supervisor.Server:
        ports.append(number)
        url = f"http://127.0.0.1:{number}"
        listen = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(number)]
        command = [sys.executable, "-c", late] if len(ports) <= taken else listen
        return supervisor.Server("Prefect", url, url, command, {})

    monkeypatch.setattr(mlflow_prefect, "prefect_server", prefect_server)
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path))
    given_up = pytest.raises(StageError, match="another program has taken its port")
    alone = temporary_settings(restore_defaults={PREFECT_API_URL})  # whatever fixtures have set
    with alone, given_up if taken == 3 else nullcontext(), local_prefect.local_prefect():
        assert PREFECT_API_URL.value() == f"http://127.0.0.1:{ports[-1]}/api"
    assert len(set(ports)) == min(taken + 1, 3)
