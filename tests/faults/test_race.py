"""Two runs that want the same result at once: it is made once and the other takes it; a killed maker frees the other.

On one host the kernel's lock sees to it. Two hosts are two homes that share an MLflow and a Prefect server.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.servers import mlflow_prefect, supervisor
from schemas.stage import Request, Result
from stages import tracking
from stages.tracking.reuse import runs_with
from tests.support import forked_servers, homes
from tests.support.forks import PYTHON
from tests.support.processes import wait_for

HOST = """
import logging, sys
from flows.execution import process
from schemas.stage import STAGES, Request, StageSpec
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s", force=True)
from tests.support.scripted import FAKE
STAGES["fake"], process.COMMAND[:] = StageSpec(1), FAKE
request = Request.model_validate_json(sys.argv[1])
shared = None
if sys.argv[2] == "shared":
    from flows.execution.lease import stage_lease  # with Prefect, which takes seconds
    shared = stage_lease(request.key())
print(process.run_stage(request, None, shared).model_dump_json())
"""


def asked(**params: object) -> Request:
    return Request(stage="fake", version=1, params=dict(params), name="count", experiment="tests")  # type: ignore[arg-type]


class Host:
    """A process that runs a stage as a flow would, in a home; the stage goes no further than `hold` lets it."""

    def __init__(self, home: Path, request: Request, how: str, hold: Path | None = None) -> None:
        home.mkdir(exist_ok=True)
        self.log = home / f"host-{len(list(home.glob('host-*')))}.log"
        with self.log.open("w") as log:
            command = [*PYTHON, "-c", HOST, request.model_dump_json(), how]
            environment = {**os.environ, "ALIGNFLOW_HOME": str(home)} | ({"FAKE_HOLD": str(hold)} if hold else {})
            self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        self.work = home / "work" / request.key()

    def result(self) -> Result:
        said, _ = self.process.communicate(timeout=600)
        assert self.process.returncode == 0, self.log.read_text()
        return Result.model_validate_json(said)

    def works(self) -> bool:
        """Whether its stage has counted, and holds."""
        assert self.process.poll() is None, self.log.read_text()
        count = self.work / "checkpoints" / "count"
        return count.exists() and count.read_text() == "1"

    def waits(self, words: str) -> bool:
        return words in self.log.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture(scope="module")
def shared_servers(tmp_path_factory: pytest.TempPathFactory, ready: Path) -> Iterator[None]:
    """The MLflow and the Prefect server that all hosts see."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("ALIGNFLOW_HOME", str(homes.furnish(tmp_path_factory.mktemp("servers"), ready)))
        mlflow = mlflow_prefect.mlflow_server(supervisor.port(None, 0, "port"))
        prefect = mlflow_prefect.prefect_server(supervisor.port(None, 0, "port"), "--no-ui")
        stack.enter_context(forked_servers.running(mlflow, prefect))
        patch.setenv("MLFLOW_TRACKING_URI", mlflow.url)
        patch.setenv("PREFECT_API_URL", f"{prefect.url}/api")
        yield


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    """The hosts of a test, none of which outlives it."""
    found: list[Host] = []
    yield found
    for host in found:
        host.kill()


def losses(result: Result) -> list[tuple[int, float]]:
    points = tracking.client().get_metric_history(str(result.run_id), "train/loss")
    return [(point.step, point.value) for point in points]


def one_finished(request: Request) -> str:
    """Id of the only run of a key that has ended well."""
    (run,) = runs_with(request.key(), "attributes.status = 'FINISHED'")
    return run.info.run_id


@pytest.mark.slow
def test_two_hosts_make_it_once(shared_servers: None, hosts: list[Host], tmp_path: Path) -> None:
    request, hold = asked(steps=5, who="two hosts"), tmp_path / "hold"
    hosts.append(Host(tmp_path / "one", request, "shared", hold))
    wait_for(hosts[0].works)
    hosts.append(Host(tmp_path / "other", request, "shared"))
    wait_for(lambda: hosts[1].waits("another host is running the same stage"))
    hold.touch()
    made, taken = (host.result() for host in hosts)
    assert made.status == taken.status == "done" and (made.reused, taken.reused) == (False, True)
    assert made.run_id == taken.run_id == one_finished(request) and made.outputs == taken.outputs
    assert not list(hosts[1].work.glob("asks/*/result.json")), "the other has started a stage of its own"
    assert len(runs_with(request.key(), "attributes.status != ''")) == 1


@pytest.mark.slow
def test_a_killed_host_frees_the_other(shared_servers: None, hosts: list[Host], tmp_path: Path) -> None:
    request = asked(steps=5, who="killed host")
    hosts.append(Host(tmp_path / "one", request, "shared", tmp_path / "never"))
    wait_for(hosts[0].works)
    hosts.append(Host(tmp_path / "other", request, "shared"))
    wait_for(lambda: hosts[1].waits("another host is running the same stage"))
    hosts[0].kill()
    result = hosts[1].result()
    assert result.status == "done" and not result.reused
    assert result.metrics["resumed/at"] == 0.0  # the checkpoints lie on the dead host
    assert result.run_id == one_finished(request)
    assert losses(result) == [(step, 1.0 / (step + 1)) for step in range(5)]
    # The dead host's run is the one that went on: nothing is left RUNNING, and no step stands in it twice.
    assert len(runs_with(request.key(), "attributes.status != ''")) == 1


@pytest.mark.slow
def test_a_killed_process_frees_the_other_on_its_host(
    ready_home: Path, hosts: list[Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    request = asked(steps=5)
    hosts.append(Host(ready_home, request, "alone", tmp_path / "never"))
    wait_for(hosts[0].works)
    hosts.append(Host(ready_home, request, "alone"))
    wait_for(lambda: hosts[1].waits("another process is running the same stage"))
    hosts[0].kill()
    result = hosts[1].result()
    assert result.status == "done" and not result.reused and result.metrics["resumed/at"] == 1.0  # its checkpoint
    assert result.run_id == one_finished(request)
    assert losses(result) == [(step, 1.0 / (step + 1)) for step in range(5)]
