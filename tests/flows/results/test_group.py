"""The one MLflow run that stands for a whole pipeline run."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.results import announce, lookup
from flows.results.history import Record
from schemas.stage import Result
from stages import tracking
from tests.support.finished import finish

PLAN: Any = SimpleNamespace(config=SimpleNamespace(name="trial"), nodes={})


def parents() -> list[Any]:
    found = tracking.client().search_runs([tracking.experiment("trial")], "tags.pipeline != ''")
    return list(found)


@pytest.fixture
def results(ready_home: Path, tmp_path: Path) -> dict[str, Result]:
    """A reused SFT model, a DPO stage that ran, and a comparison."""
    comparison = tmp_path / "comparison"
    comparison.mkdir()
    found = {"findings": ["dpo is clearly better than sft.", "More."], "best": ["dpo"]}
    (comparison / "comparison.json").write_text(json.dumps(found))
    (comparison / "table.json").write_text("[]")
    numbers = {"judge_score/dpo": 2.5, "eval/dpo/vs_sft/win_rate": 0.9}
    return {
        "sft": finish({}, stage="sft", name="sft", params={}, pipeline_run="before").model_copy(
            update={"reused": True}
        ),
        "dpo": finish({}, stage="align", name="dpo", params={}),
        "compare": finish({"comparison": comparison}, numbers, stage="compare", name="compare", params={}),
    }


def test_a_pipeline_run_is_one_run_above_the_stages_that_it_computed(results: dict[str, Result]) -> None:
    before = {name: dict(tracking.client().get_run(one.run_id or "").data.tags) for name, one in results.items()}
    entry = Record(run="run-1", name="trial", began=1000.0, changed=["align.dpo.beta=0.3"])
    announce.group(PLAN, results, entry)
    (parent,) = parents()
    assert parent.info.run_name == "pipeline trial align.dpo.beta=0.3"
    assert (parent.info.status, parent.info.start_time) == ("FINISHED", 1_000_000)
    assert parent.data.metrics == {"judge_score/dpo": 2.5}
    assert parent.data.tags["mlflow.user"] == tracking.user()
    note = parent.data.tags["mlflow.note.content"]
    page = f"#/experiments/{parent.info.experiment_id}/runs"
    assert note.startswith(
        f"**dpo is clearly better than sft.**\n\n[Report]({page}/{results['compare'].run_id}/artifacts/report.html)"
    )
    assert f"- [sft]({page}/{results['sft'].run_id}) (reused)" in note
    for name, one in results.items():
        added = {} if name == "sft" else {"mlflow.parentRunId": parent.info.run_id}
        assert dict(tracking.client().get_run(one.run_id or "").data.tags) == before[name] | added
    # A retraining's second part goes on with it, and no search for stages finds it.
    announce.group(PLAN, {"promote": finish({}, stage="promote", params={})}, entry, "FAILED")
    (same,) = parents()
    assert (same.info.run_id, same.info.status) == (parent.info.run_id, "FAILED")
    assert len(lookup.search("tags.stage != ''")) == 4 and not lookup.search("tags.`stage.key` = ''")
    announce.group(PLAN, {}, entry.model_copy(update={"run": "run-2"}))
    assert len(parents()) == 2


def test_what_a_run_has_made_and_reused_is_found_by_its_id(results: dict[str, Result]) -> None:
    finish({}, stage="sft", name="another", params={"epochs": 7}, pipeline_run="run-2")
    tracking.note_reuse(results["sft"], "run-1")
    assert lookup.of_run("run-1") == results
    assert lookup.of_run("before") == {"sft": results["sft"].model_copy(update={"reused": False})}


def test_a_server_that_fails_stops_no_run(
    results: dict[str, Result], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(announce, "get_run_logger", lambda: logging.getLogger("alignflow"))
    monkeypatch.setattr(tracking, "experiment", lambda name: 1 / 0)
    announce.group(PLAN, results, Record(run="run-1", name="trial", began=0.0))
    assert "MLflow does not show the run as a whole: division by zero" in caplog.text
