"""What a killed stage leaves in MLflow: closed when a flow starts, and gone on with when it is asked for again."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from flows.execution import process as execution_process
from schemas.stage import STAGES, Request, StageSpec
from stages import tracking
from stages.runtime import workspace
from stages.tracking.reuse import runs_with
from tests.support.scripted import FAKE, fake_request


@pytest.fixture
def fake(ready_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, and the stage `fake` (scripted_stage.py) beside the real ones."""
    monkeypatch.setattr(execution_process, "COMMAND", FAKE)
    monkeypatch.setitem(STAGES, "fake", StageSpec(1))
    return ready_home


def losses(run_id: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in tracking.client().get_metric_history(run_id, "train/loss")]


def only_run(request: Request) -> str:
    """Id of the one run of a key."""
    (run,) = runs_with(request.key(), "attributes.status = 'RUNNING'")
    return run.info.run_id


@pytest.mark.slow
def test_runs_of_the_dead_are_closed_and_gone_on_with(fake: Path, tmp_path: Path) -> None:
    dead = fake_request(steps=6, die_at=4, sleep=0.05)
    error = execution_process.run_stage(dead).error
    assert error is not None and "SIGKILL" in error.message
    left = only_run(dead)

    alive = fake_request(steps=1000, sleep=0.05)
    (tmp_path / "request.json").write_text(alive.model_dump_json())
    process = subprocess.Popen(
        [*FAKE, "fake", str(tmp_path / "request.json")], env=execution_process.environment(alive)
    )
    while not (workspace.work_folder(alive.key()) / "checkpoints" / "count").exists():
        assert process.poll() is None
        time.sleep(0.05)
    place = {"stage.key": "0" * 64, **workspace.place()}
    experiment = tracking.experiment("tests")
    elsewhere = [
        tracking.client().create_run(experiment, tags=place | other).info.run_id
        for other in ({"host": "another"}, {"home": "/another"})
    ]
    try:
        assert tracking.close_left() == [left]
        assert tracking.close_left() == []
        for run_id in (only_run(alive), *elsewhere):
            assert tracking.client().get_run(run_id).info.status == "RUNNING"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    closed = tracking.client().get_run(left)
    assert closed.info.status == "KILLED" and "start it again" in closed.data.tags["problem"]
    assert losses(left) == [(step, 1.0 / (step + 1)) for step in range(4)]  # what the dead one had not shipped

    result = execution_process.run_stage(dead)
    assert result.status == "done" and result.run_id == left and result.metrics["resumed/at"] == 3.0
    ended = tracking.client().get_run(left)
    assert ended.info.status == "FINISHED" and "problem" not in ended.data.tags
    assert losses(left) == [(step, 1.0 / (step + 1)) for step in range(6)]
