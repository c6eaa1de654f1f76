"""What a stage on a work pool says, as it reaches the run that waits for it."""

import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from io import StringIO
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import LogCreate
from prefect.states import Running
from rich.console import Console

from flows.execution import live, work_pool

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
    says(run, (logging.INFO, "sft  80/94 steps  loss 0.5"), at=30)
    assert heard() == ["sft  80/94 steps  loss 0.5"] and view.running["sft"].done == 80
