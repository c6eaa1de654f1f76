"""Answers of an evaluation on MLflow's evaluation pages, in a real store."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from schemas.stage import Artifact, Request
from stages import tracking
from stages.commands.label import mlflow_traces
from stages.tracking import StageRun
from tests.support import answered
from tests.support.finished import finish


def datasets(run_id: str) -> list[Any]:
    run = tracking.plain_client().get_run(run_id)
    assert run.inputs is not None
    return [one.dataset for one in run.inputs.dataset_inputs]


def test_answers_are_read_back_as_they_were_given_however_often_they_were(ready_home: Path) -> None:
    first, second = answered.log(times=2), answered.log(other=1)
    assert answered.read_back(first) == answered.EXPECTED
    client = tracking.plain_client()
    assert client.get_run(first).data.tags["mlflow.runType"] == "genai_evaluate"
    experiment = client.get_run(first).info.experiment_id
    (dataset,) = client.search_datasets(experiment_ids=[experiment])  # the same prompts, so the same data set
    (one,), (other,) = datasets(first), datasets(second)
    assert (one.name, one.digest, one.source) == (other.name, other.digest, other.source)
    assert one.source_type == "mlflow_evaluation_dataset"
    assert json.loads(one.source) == {"dataset_id": dataset.dataset_id}
    with tracking.as_default():
        prompts = [record.inputs["messages"] for record in dataset.records]
    assert sorted(map(str, prompts)) == sorted(str(messages) for messages, _, _ in answered.EXPECTED)


def test_two_evaluations_at_once_share_one_data_set(ready_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen none; the other has made one before, whose records it has yet to put in."""
    create, others = SqlAlchemyStore.create_dataset, []

    def created(self: SqlAlchemyStore, *given: Any, **named: Any) -> Any:
        others.append(create(self, *given, **named))
        time.sleep(0.005)  # another millisecond
        return create(self, *given, **named)

    monkeypatch.setattr(SqlAlchemyStore, "create_dataset", created)
    run_id = answered.log()
    (dataset,) = datasets(run_id)
    (other,) = others
    assert json.loads(dataset.source) == {"dataset_id": other.dataset_id}
    client = tracking.plain_client()
    experiment = client.get_run(run_id).info.experiment_id
    assert [one.dataset_id for one in client.search_datasets(experiment_ids=[experiment])] == [other.dataset_id]


def test_traces_name_their_model_and_can_be_read_as_thumbs(ready_home: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("w")
    model: Artifact = finish({"model": tmp_path / "model"}, stage="align", name="dpo", params={}).outputs["model"]
    asked = Request(stage="evaluate", version=1, params={}, name="dpo", experiment="trial", inputs={"model": model})
    with StageRun(asked) as run:
        run.answers(answered.ANSWERS[:1], "rule")
        run.finish({})
    client = tracking.plain_client()
    experiment = client.get_run(run.run_id).info.experiment_id
    (trace,) = client.search_traces(locations=[experiment], run_id=run.run_id)
    assert trace.info.trace_metadata["mlflow.modelId"] == model.uri.removeprefix("models:/")
    assert {one.source.source_type for one in trace.info.assessments} == {"CODE"}
    assert (trace.info.request_preview, trace.info.response_preview) == ("say one", "one")
    record = json.loads(trace.to_json())
    source = {"source_type": "HUMAN", "source_id": "ann"}
    record["info"]["assessments"].append({"assessment_name": "good", "source": source, "feedback": {"value": True}})
    ((_, (told,)),) = mlflow_traces.read([record], None)  # the judge's assessments are not people's
    assert (told.question.prompt, told.question.texts, told.verdict) == (answered.ANSWERS[0].prompt, ["one"], "up")


@pytest.mark.parametrize("error", [MlflowException("no room"), AttributeError("no such call"), NotImplementedError()])
def test_an_mlflow_that_does_not_take_them_costs_the_pages_alone(
    error: Exception, ready_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(SqlAlchemyStore, "log_spans", refuse)
    with caplog.at_level(logging.WARNING, "alignflow"):
        run_id = answered.log()
    assert tracking.plain_client().get_run(run_id).info.status == "FINISHED"
    assert "the answers of dpo are not all on MLflow's evaluation pages" in caplog.text and "Fix: " in caplog.text
