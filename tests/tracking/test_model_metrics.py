"""An evaluation's numbers on the model that it is of, where MLflow's page of models looks for them."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest

from schemas.stage import Artifact, Request
from stages import tracking
from stages.tracking import StageRun
from tests.support.finished import finish

NUMBERS = {"eval/judge_score": 2.5, "eval/reward_score": math.nan, "compute/seconds": 9.0}


@pytest.fixture
def model(ready_home: Path, tmp_path: Path) -> Artifact:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("w")
    return finish({"model": tmp_path / "model"}, stage="align", name="dpo", params={}).outputs["model"]


def evaluated(model: Artifact, **params: Any) -> str:
    asked = Request(stage="evaluate", version=1, params=params, name="dpo", experiment="trial", inputs={"model": model})
    with StageRun(asked) as run:
        run.dataset("held-out prompts", "runs:/1/data", "ab" * 32, 17)
        run.finish(NUMBERS)
    return run.run_id


def on_model(model: Artifact) -> list[Any]:
    return tracking.client().get_logged_model(model.uri.removeprefix("models:/")).metrics or []


def test_an_evaluation_is_shown_on_its_model_with_its_data(model: Artifact) -> None:
    run_id = evaluated(model)
    (metric,) = on_model(model)
    assert (metric.key, metric.value, metric.run_id) == ("eval/judge_score", 2.5, run_id)
    assert (metric.dataset_name, metric.dataset_digest) == ("held-out prompts", ("ab" * 32)[:36])
    run = tracking.client().get_run(run_id)
    assert math.isnan(run.data.metrics["eval/reward_score"]) and run.data.metrics["usage/seconds"] == 9.0
    assert [point.value for point in tracking.client().get_metric_history(run_id, "eval/judge_score")] == [2.5], "once"
    assert run.inputs is not None and [one.model_id for one in run.inputs.model_inputs] == [
        model.uri[len("models:/") :]
    ]


@pytest.mark.parametrize("params", [{"gate": True}, {"part": "test"}])
def test_neither_a_gates_nor_a_test_parts_numbers_pass_for_them(model: Artifact, params: dict[str, Any]) -> None:
    run_id = evaluated(model, **params)
    assert on_model(model) == [] and tracking.client().get_run(run_id).data.metrics["eval/judge_score"] == 2.5


def test_a_model_that_is_gone_costs_no_number(model: Artifact, caplog: pytest.LogCaptureFixture) -> None:
    gone = model.model_copy(update={"uri": "models:/m-" + "0" * 32})
    with caplog.at_level(logging.WARNING, "alignflow"):
        run_id = evaluated(gone)
    assert tracking.client().get_run(run_id).data.metrics["eval/judge_score"] == 2.5
    assert "the model's page will not show its evaluation" in caplog.text
    outside = evaluated(Artifact(uri="/a/folder", sha256="0"))
    assert tracking.client().get_run(outside).data.metrics["eval/judge_score"] == 2.5


def test_cost_comes_after_quality_on_mlflows_pages_and_keeps_its_name_in_results(ready_home: Path) -> None:
    """Sweeps read the training tokens of results, those of before too."""
    asked = Request(stage="evaluate", version=1, params={}, experiment="trial")
    with StageRun(asked) as run:
        run.metrics({"compute/train_tokens": 5.0}, step=2)
        result = run.finish(NUMBERS)
    names = sorted(tracking.client().get_run(run.run_id).data.metrics)
    assert names == ["eval/judge_score", "eval/reward_score", "usage/seconds", "usage/train_tokens"]
    assert "compute/seconds" in result.metrics
    found = tracking.find(asked.key())
    assert found is not None and found.metrics["compute/seconds"] == 9.0
