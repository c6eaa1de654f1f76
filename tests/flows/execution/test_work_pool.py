"""What runs elsewhere say, as it reaches whoever waits for them: a pipeline for its stage, a person for a pipeline."""

import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from io import StringIO
from typing import Any

import httpx
import pytest
from prefect import flow, task
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import LogCreate
from prefect.states import Cancelled, Completed, Crashed, Failed, Running, State
from rich.console import Console

from flows import submit
from flows.execution import live, work_pool
from flows.servers import automations
from schemas.errors import StageError

LINES = (
    (logging.INFO, "sft: reading rows"),
    (logging.INFO, "sft  5/94 steps  loss 1.5  1:00 left"),
    (logging.WARNING, "3 rows were cut"),
    (logging.INFO, "sft  62/94 steps  loss 0.59  0:09 left"),
    (logging.INFO, "sft: done after 70 s"),
    (logging.ERROR, "Finished in state Failed()"),
)


@pytest.fixture
def view() -> Iterator[live.View]:
    """The view of a run in which stage `sft` runs, fed by the log `tests.pool`."""
    console = Console(file=StringIO(), width=100)
    view = live.View(console)
    view.begin("sft")
    log, handler = logging.getLogger("tests.pool"), live.Messages(console, view)
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    yield view
    log.removeHandler(handler)


def test_a_stage_on_a_pool_has_its_bar(
    prefect: SyncPrefectClient, view: live.View, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @flow
    def stage() -> None: ...

    run = prefect.create_flow_run(stage, name="sft", state=Running())
    other = prefect.create_flow_run(stage, name="sft", state=Running())
    log = logging.LoggerAdapter(logging.getLogger("tests.pool"), {"task_run_name": "sft"})
    monkeypatch.setattr(work_pool, "LOOK_SECONDS", 0.0)
    told, began = work_pool.Told(prefect, run, log), datetime.now(UTC)

    def says(whose: Any, *lines: tuple[int, str], at: int = 0) -> None:
        """As the stage's worker sends its log."""
        made = [
            LogCreate(
                name="prefect.flow_runs",
                level=level,
                message=message,
                timestamp=began + timedelta(seconds=at + place),  # type: ignore[arg-type]
                flow_run_id=whose.id,
            )
            for place, (level, message) in enumerate(lines)
        ]
        sent = [one.model_dump(mode="json") for one in made]
        prefect.request("POST", "/logs/", json=sent)

    def heard() -> list[str]:
        caplog.clear()
        told.pass_on()
        return [record.getMessage() for record in caplog.records if record.name == "tests.pool"]

    says(other, (logging.INFO, "sft  1/2 steps"))
    says(run, *LINES)
    assert heard() == ["3 rows were cut", "sft  62/94 steps  loss 0.59  0:09 left"]
    line = view.running["sft"]
    assert (line.done, line.total, line.what) == (62, 94, "loss 0.59") and line.ends is not None
    assert heard() == []  # nothing twice
    says(run, (logging.WARNING, "4 rows were cut"), *[(logging.INFO, "so it goes")] * 150, at=10)
    assert heard() == ["4 rows were cut"]  # among more than the server gives at once
    says(run, (logging.INFO, "sft  80/94 steps  loss 0.5"), at=300)
    assert heard() == ["sft  80/94 steps  loss 0.5"] and view.running["sft"].done == 80


@pytest.fixture
def submitted(prefect: SyncPrefectClient) -> Any:
    """A pipeline run on the server, with a stage that runs."""

    @flow
    def pipeline() -> None: ...

    @task(name="stage")
    def sft() -> None: ...

    run = prefect.create_flow_run(pipeline, name="demo", state=Running())
    stage = prefect.create_task_run(sft, run.id, "0", name="sft", state=Running())
    return run, stage


def test_who_waits_for_a_run_hears_of_its_stages_while_the_server_is_away_now_and_then(
    prefect: SyncPrefectClient,
    submitted: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run, stage = submitted
    line = {"name": "prefect.task_runs", "flow_run_id": str(run.id), "task_run_id": str(stage.id)}
    said = [(20, "sft  5/94 steps"), (30, "3 rows were cut"), (20, "sft  62/94 steps"), (20, "not of its progress")]
    now = datetime.now(UTC)
    lines = [
        {**line, "level": level, "message": message, "timestamp": (now + timedelta(seconds=place)).isoformat()}
        for place, (level, message) in enumerate(said)
    ]
    look, looks = submit.Stages.look, 0

    def looked(self: submit.Stages, last: bool = False) -> Any:
        nonlocal looks
        looks += 1
        if looks == 2:
            raise httpx.ConnectError("away")
        if looks == 3:
            prefect.request("POST", "/logs/", json=lines)
        if looks == 4:
            prefect.set_task_run_state(stage.id, Completed(), force=True)
            prefect.set_flow_run_state(run.id, Completed(), force=True)
        return look(self, last)

    monkeypatch.setattr(submit.Stages, "look", looked)
    monkeypatch.setattr(work_pool, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(work_pool, "POLL_SECONDS", 0.0)
    submit.wait(run, "http://page")
    told = ["sft: Running", "demo: Running", "sft  62/94 steps", "sft: Completed", "demo: Completed"]
    assert capsys.readouterr().err.splitlines() == told
    grave = [record.getMessage() for record in caplog.records if record.name == "alignflow"]
    assert grave == ["the Prefect server does not answer (ConnectError); waiting for it", "3 rows were cut"]


def test_what_a_run_says_at_its_end_is_heard_between_two_looks_at_its_log(
    prefect: SyncPrefectClient, submitted: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, _ = submitted
    line = {"name": "prefect.flow_runs", "flow_run_id": str(run.id), "level": 30, "message": "3 rows were cut"}

    def meanwhile(seconds: float) -> None:
        prefect.request("POST", "/logs/", json=[{**line, "timestamp": datetime.now(UTC).isoformat()}])
        prefect.set_flow_run_state(run.id, Completed(), force=True)

    monkeypatch.setattr(time, "sleep", meanwhile)
    assert work_pool.LOOK_SECONDS > 1
    submit.wait(run, "http://page")
    assert [one.getMessage() for one in caplog.records if one.name == "alignflow"] == ["3 rows were cut"]


@pytest.mark.parametrize(
    ("state", "status", "message"),
    [
        (Failed(name="Refused", message="sft = 3: no. Fix: leave it out"), "refused", "demo: sft = 3: no. Fix: leave"),
        (Failed(name="Diverged", message="dpo: NaN"), "diverged", "demo: dpo: NaN"),
        (Failed(message="a bug"), "failed", "demo: a bug"),
        (Cancelled(), "preempted", "demo: the run ended as Cancelled"),
        (Crashed(message="died"), "preempted", "demo: died"),
    ],
)
def test_a_run_that_was_waited_for_ends_as_one_from_here(
    prefect: SyncPrefectClient, submitted: Any, state: State, status: str, message: str
) -> None:
    run, _ = submitted
    prefect.set_flow_run_state(run.id, state, force=True)
    with pytest.raises(StageError, match=message) as error:
        submit.wait(run, "http://page")
    assert error.value.status == status


def test_a_crashed_run_is_waited_for_as_long_as_it_is_started_again(
    prefect: SyncPrefectClient, submitted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = submitted
    monkeypatch.setattr(automations, "patience", lambda name: timedelta(minutes=2))
    crashed = Crashed(timestamp=datetime.now(UTC) - timedelta(minutes=3))
    for state, count, again in ((crashed, 2, True), (crashed, 3, False), (Failed(), 0, False)):
        asked = run.model_copy(update={"state": state, "run_count": count})
        assert automations.starts_again(asked) is again
    old = Crashed(timestamp=datetime.now(UTC) - timedelta(minutes=5))
    assert not automations.starts_again(run.model_copy(update={"state": old}))

    def starts(crashed: Any) -> bool:
        if crashed.state.is_crashed():
            prefect.set_flow_run_state(run.id, Completed(), force=True)
            return True
        return False

    monkeypatch.setattr(automations, "starts_again", starts)
    monkeypatch.setattr(work_pool, "POLL_SECONDS", 0.0)
    prefect.set_flow_run_state(run.id, Crashed(), force=True)
    submit.wait(run, "http://page")


def test_ctrl_c_ends_the_wait_and_not_the_run(
    prefect: SyncPrefectClient, submitted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    run, _ = submitted
    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(StageError, match=f"the run goes on: http://page.*prefect flow-run cancel {run.id}") as error:
        submit.wait(run, "http://page")
    assert error.value.status == "preempted"
    state = prefect.read_flow_run(run.id).state
    assert state is not None and state.is_running()
