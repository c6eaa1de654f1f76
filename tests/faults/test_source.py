"""Data that grows while it is read: nothing is published, and the next run reads all of it under another key."""

import json
import threading
import time
from pathlib import Path

import pytest

from flows.execution import process
from flows.planning import requests
from schemas.config.data import ValidateParams
from schemas.stage import STAGES, Request, Result
from stages import tracking
from stages.runtime import workspace

ROWS = 20_000


def asked(path: Path) -> Request:
    """A request as the flow makes it: with the digest of what the file is now."""
    params = ValidateParams(path=str(path), kind="sft", min_eval_prompts=0).model_dump(mode="json")
    return requests.with_sources(
        Request(stage="validate", version=STAGES["validate"].version, params=params), "data.sft"
    )


def line(number: int) -> str:
    return json.dumps({"prompt": f"question {number}", "response": f"answer {number}"}) + "\n"


@pytest.mark.slow
def test_rows_are_appended_while_they_are_read(ready_home: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(line(number) for number in range(ROWS)))
    first = asked(path)
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(process.run_stage(first)))
    thread.start()
    begun = workspace.work_folder(first.key()) / "data" / "quarantine.jsonl"  # made before the first row is read
    end = time.monotonic() + 120
    while not begun.exists():
        assert time.monotonic() < end and not results
        time.sleep(0.002)
    with path.open("a") as file:
        file.write(line(ROWS))
    thread.join(120)

    (refused,) = results
    assert refused.status == "refused" and refused.error is not None and not refused.outputs
    assert refused.error.kind == "source_changed" and refused.error.value == str(path)
    assert "start the run again" in str(refused.error)
    assert tracking.find(first.key()) is None
    second = asked(path)
    assert second.key() != first.key()
    result = process.run_stage(second)
    assert result.status == "done" and result.metrics["data/rows"] == ROWS + 1
