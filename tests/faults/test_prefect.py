"""The Prefect server killed, or frozen, for 60 s while a model trains: training goes on, and the run ends whole."""

import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.servers import local_prefect, mlflow_prefect, supervisor
from schemas.errors import StageError
from stages import tracking
from tests.support import commands, forked_servers, forks, homes
from tests.support.journals import losses
from tests.support.processes import wait_for

AWAY_SECONDS = 60.0
SHORT = {
    "data.sft.limit": "600",
    "sft.epochs": "4",
    "align": "{}",
    "reward": "null",
    "generate": "null",
    "evaluate.min_prompts": "10",
    "evaluate.limit": "20",
}


class Run:
    """`alignflow run demo`, made short, in a home of its own, with a Prefect server of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ALIGNFLOW_HOME", str(home))
            self.server = mlflow_prefect.prefect_server(supervisor.port(None, 0, "port"), "--no-ui")
            self.start_server()

    def begin(self) -> None:
        """Run the flow, once the server answers."""
        supervisor.until_healthy(self.server, self.process)
        settings = [part for name, value in SHORT.items() for part in ("--set", f"{name}={value}")]
        environment = {"ALIGNFLOW_HOME": str(self.home), "PREFECT_API_URL": f"{self.server.url}/api"}
        self.flow = commands.begun(["run", "demo", *settings], self.log, self.log, environment)

    @property
    def log(self) -> Path:
        return self.home / "log"

    def start_server(self) -> None:
        with forked_servers.forked():
            self.process = supervisor.start(self.server)

    def signal_server(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def points(self) -> list[float]:
        """When the losses of SFT were logged, in seconds."""
        assert self.flow.exitcode in (None, 0), self.log.read_text()
        return [when for _, when in losses(self.home, "work/*/metrics-*.jsonl")]

    def end(self) -> None:
        self.flow.terminate()
        self.flow.join()
        self.process.terminate()
        self.process.wait()


@pytest.fixture
def runs(tmp_path: Path, ready: Path) -> Iterator[dict[str, Run]]:
    """One run for each way in which a server can be away: two waits of a minute at once."""
    found: dict[str, Run] = {}
    try:
        for how in ("killed", "frozen"):
            found[how] = Run(homes.furnish(tmp_path / how, ready))
        for run in found.values():  # together: a stage of the first must not be done before the second trains
            run.begin()
        yield found
    finally:
        for run in found.values():
            run.signal_server(signal.SIGCONT)
            run.end()


@pytest.mark.slow
def test_a_server_that_is_away_for_a_minute(runs: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    for run in runs.values():
        wait_for(lambda run=run: len(run.points()) >= 20)
    began = time.time()
    runs["killed"].signal_server(signal.SIGKILL)
    runs["killed"].process.wait()
    runs["frozen"].signal_server(signal.SIGSTOP)
    trained: dict[str, list[float]] = {how: [] for how in runs}
    while time.time() - began < AWAY_SECONDS:
        for how, run in runs.items():
            trained[how] = max(trained[how], run.points(), key=len)  # the journal of a stage that is done is gone
        time.sleep(0.2)
    runs["killed"].start_server()
    runs["frozen"].signal_server(signal.SIGCONT)
    for how, run in runs.items():
        assert forks.ended(run.flow, 900, run.log.read_text) == 0, run.log.read_text()
        meanwhile = [when for when in trained[how] if when > began]
        longest = max(b - a for a, b in pairwise(trained[how]))
        assert len(meanwhile) >= 5 and longest < 30, "training has waited for Prefect"
        ended_whole(run)
        with capsys.disabled():
            print(
                f"\nPrefect {how} for a minute: {len(meanwhile)} steps meanwhile, the longest {longest:.1f} s", end=" "
            )


def ended_whole(run: Run) -> None:
    """Prefect and MLflow show a run whose stages were all done once, and every point of the curve is there."""
    with temporary_settings({PREFECT_API_URL: f"{run.server.url}/api"}), get_client(sync_client=True) as client:
        assert [flow_run.state_name for flow_run in client.read_flow_runs()] == ["Completed"]
        tasks = client.read_task_runs()
        assert {task.state_name for task in tasks} == {"Completed"}, tasks
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNFLOW_HOME", str(run.home))
        found = tracking.client().search_runs([tracking.experiment("demo")])
        found = [kept for kept in found if "stage" in kept.data.tags]  # and not the one above them
        assert {kept.info.status for kept in found} == {"FINISHED"} and len(found) == len(tasks)
        (sft,) = [kept for kept in found if kept.data.tags["stage"] == "sft"]
        history = tracking.client().get_metric_history(sft.info.run_id, "train/loss")
        assert sorted(point.step for point in history) == list(range(1, len(history) + 1))
        assert len(history) >= 60


def test_a_server_that_is_not_there_is_named() -> None:
    nowhere = f"http://{supervisor.HOST}:{supervisor.port(None, 0, 'port')}/api"
    with (
        temporary_settings({PREFECT_API_URL: nowhere}),
        pytest.raises(StageError) as refused,
        local_prefect.local_prefect(),
    ):
        pass
    problem = refused.value.problem
    assert (problem.field, problem.value) == ("PREFECT_API_URL", nowhere) and "alignflow ui" in str(problem.fix)
