"""The flow: order, reuse, failures, and what Prefect and MLflow show of it. Its stages are scripted_stage.py's."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.utilities.callables import parameter_schema

from flows import cli, pipeline
from flows.execution import process, warm
from flows.planning import dry_run, requests
from flows.planning.plan import Node, Plan
from flows.results import announce
from flows.results.summary import Compared
from flows.servers import local_prefect
from schemas.config import PipelineConfig
from schemas.errors import EXIT_CODES, Problem, StageError
from schemas.stage import STAGES, Artifact, Result, StageSpec
from stages import tracking


def config(**more: Any) -> PipelineConfig:
    data = {"sft": {"path": "demo:sft", "kind": "sft"}}
    return PipelineConfig.model_validate({"name": "tests", "model": {"path": "/m"}, "data": data, "align": {}, **more})


def fake(name: str, *needs: str, **params: Any) -> Node:
    inputs = {need: (need, "folder") for need in needs}
    return Node(name, "fake", name, {"who": name, "steps": 2, **params}, inputs)


def a_plan(**last: Any) -> list[Node]:
    """One after another, then two side by side, then one that needs both."""
    return [fake("first"), fake("left", "first"), fake("right", "first", **last), fake("both", "left", "right")]


@pytest.fixture
def planned(forked: Path, warmed: warm.Warm, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Node]]:
    """The nodes that the flow will run; change the list to change the plan."""
    nodes = a_plan()
    monkeypatch.setattr(process.warm, "warm", lambda: contextlib.nullcontext(warmed))
    monkeypatch.setitem(STAGES, "fake", StageSpec(1))
    monkeypatch.setattr(pipeline, "plan", lambda config: plan_of(nodes, config))
    yield nodes


def plan_of(nodes: list[Node], config: PipelineConfig) -> Plan:
    return Plan(config, {node.name: node for node in nodes})


def run(nodes: list[Node], **more: Any) -> dict[str, Result]:
    return pipeline.run(plan_of(nodes, config(**more))).results


def outlooks(nodes: list[Node]) -> dict[str, str]:
    return {name: one.state for name, one in dry_run.dry_run(plan_of(nodes, config())).items()}


def test_a_run_and_its_reuse(prefect: SyncPrefectClient, planned: list[Node], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert outlooks(planned) == {"first": "run", "left": "unknown", "right": "unknown", "both": "unknown"}
    results = run(planned, parallel=2)
    assert next(iter(results)) == "first" and list(results)[-1] == "both"
    assert all(result.status == "done" and not result.reused for result in results.values())
    assert list(outlooks(planned).values()) == ["reused"] * 4

    (flow_run,) = prefect.read_flow_runs()
    assert flow_run.name == "tests" and flow_run.state is not None and flow_run.state.is_completed()
    assert {run.name for run in prefect.read_task_runs()} == {"first", "left", "right", "both"}
    assert prefect.read_global_concurrency_limits() == []  # no leases on a server that nobody shares
    (left,) = tracking.client().search_runs([tracking.experiment("tests")], "attributes.run_name = 'left'")
    assert left.data.tags["pipeline.run"] == str(flow_run.id)

    planned[2] = fake("right", "first", steps=3)
    assert outlooks(planned) == {"first": "reused", "left": "reused", "right": "run", "both": "unknown"}
    again = run(planned)
    assert {name for name, result in again.items() if result.reused} == {"first", "left"}
    assert "reused 2 of 4 stages: first, left" in caplog.text
    assert again["both"].key != results["both"].key


def test_without_a_server_a_run_keeps_its_name_tags_table_and_links_for_later(
    prefect: SyncPrefectClient, planned: list[Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "table.txt").write_text("dpo is better")
    (tmp_path / "comparison.json").write_text('{"best": ["dpo"]}')
    (tmp_path / "table.json").write_text("[]")
    monkeypatch.setattr(announce, "compared", lambda results: Compared(tmp_path))
    monkeypatch.setattr(announce, "mlflow_pages", lambda: ("http://127.0.0.1:5000", "  (start `alignflow ui`)"))
    planned[:] = [fake("eval a"), fake("eval b")]
    made = config(name="kept", align={"first": {"method": "dpo"}, "second": {"method": "dpo"}})
    run_id = pipeline.run(plan_of(planned, made), ["align.dpo.beta=0.3", "model.path=/some/where"]).run
    (flow_run,) = [one for one in prefect.read_flow_runs() if str(one.id) == run_id]
    assert flow_run.name == "kept dpo.beta=0.3 model.path=where"
    assert sorted(flow_run.tags) == ["align.dpo.beta=0.3", "dpo", "model.path=/some/where", "pipeline"]
    of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run.id]))
    artifacts = {one.key: one for one in prefect.read_artifacts(artifact_filter=of_run)}
    assert artifacts.keys() == {"comparison", "metrics-in-mlflow", "answers-in-mlflow"}
    assert "dpo is better" in str(artifacts["comparison"].data)
    assert "](http://127.0.0.1:5000/" in str(artifacts["comparison"].data)


def test_another_server_than_our_own_is_shared(prefect: SyncPrefectClient) -> None:
    assert not local_prefect.has_shared_server()
    with temporary_settings({PREFECT_API_URL: "http://prefect.example/api"}):
        assert local_prefect.has_shared_server()


def test_a_stage_that_is_killed_is_started_again_and_resumes(
    prefect: SyncPrefectClient, planned: list[Node], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    planned[:] = [fake("dies", steps=4, die_at=2)]
    results = run(planned)
    assert results["dies"].status == "done" and results["dies"].metrics["resumed/at"] == 1.0
    assert "was killed by SIGKILL" in caplog.text and "Started again, try 2 of 3" in caplog.text
    assert [one.run_count for one in prefect.read_task_runs() if one.name == "dies"] == [2]
    (kept,) = tracking.client().search_runs([tracking.experiment("tests")], "attributes.run_name = 'dies'")
    history = tracking.client().get_metric_history(kept.info.run_id, "train/loss")
    assert sorted(point.step for point in history) == [0, 1, 2, 3]


def test_log_lines_reach_prefect(prefect: SyncPrefectClient, planned: list[Node]) -> None:
    planned[:] = [fake("only")]
    run(planned)
    end = time.monotonic() + 30
    while not any("only  2/2 steps" in line.message for line in prefect.read_logs()):  # sent from a side thread
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_failure_stops_what_needs_it_only(
    prefect: SyncPrefectClient, planned: list[Node], caplog: pytest.LogCaptureFixture
) -> None:
    planned[:] = a_plan(end="refuse")
    with pytest.raises(StageError) as stopped:
        run(planned)
    assert str(stopped.value) == "right: path = x.jsonl: the rows are bad. Fix: fix them"
    assert EXIT_CODES[stopped.value.status] == 65
    assert "not done: right, both" in caplog.text
    failed = [run for run in prefect.read_flow_runs() if run.state is not None and run.state.is_failed()]
    assert [run.state.message for run in failed if run.state] == [str(stopped.value)]
    assert list(outlooks(planned).values()) == ["reused", "reused", "run", "unknown"]


def test_automations_are_told_of_a_divergence_and_of_the_failure_that_it_is(
    prefect: SyncPrefectClient, planned: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr(announce, "emit", lambda *event: told.append(event))
    lost = Problem(kind="diverged", message="the loss is nan at step 3.", fix="lower learning_rate")
    ended = Result(status="diverged", key="k", error=lost)
    monkeypatch.setattr(process, "run_stage", lambda request, log: ended)
    planned[:] = [fake("dpo")]
    with pytest.raises(StageError, match="the loss is nan"):
        run(planned)
    words = "dpo: the loss is nan at step 3. Fix: lower learning_rate"
    assert told == [("diverged", "tests", words), ("failed", "tests", words)]
    stopped = ended.model_copy(update={"status": "preempted"})
    monkeypatch.setattr(process, "run_stage", lambda request, log: stopped)
    with pytest.raises(StageError):  # a stop is no failure: the same command resumes
        run(planned)
    assert len(told) == 2


def test_two_side_by_side_and_no_more(
    prefect: SyncPrefectClient, planned: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned[:] = [fake(name) for name in "abc"]
    counts = []

    def counted(*arguments: Any) -> int:
        counts.append(1)
        try:
            return original(*arguments)
        finally:
            counts.append(-1)

    original = process.run_process
    monkeypatch.setattr(process, "run_process", counted)
    run(planned, parallel=2)
    assert max(accumulate(counts)) == 2 and len(counts) == 6


def test_a_missing_file_is_named(prefect: SyncPrefectClient, planned: list[Node], tmp_path: Path) -> None:
    planned[:] = [Node("data sft", "validate", "data.sft", {"path": str(tmp_path / "none.jsonl"), "kind": "sft"})]
    with pytest.raises(StageError, match=r"^data\.sft\.path = .*none\.jsonl: there is no such file"):
        run(planned)


def test_what_is_missing_is_said_before_a_server_starts(home: Path, tmp_path: Path) -> None:
    raw = config(model={"scratch": {}}, align={"kto": {}}).model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(json.dumps(raw))
    with pytest.raises(StageError, match=r"align\.kto"):
        cli.run.run(str(tmp_path / "config.yaml"))
    assert list(home.iterdir()) == []


def done(key: str, **outputs: str) -> Result:
    made = {name: Artifact(uri=f"/{sha256}", sha256=sha256) for name, sha256 in outputs.items()}
    return Result(status="done", key=key, run_id=f"run of {key}", outputs=made)


def test_a_request_carries_cause_beside_effect() -> None:
    results = {"dpo": done("k1", model="a" * 64), "data prompt": done("k2", data="b" * 64)}
    inputs = {"model": ("dpo", "model"), "data": ("data prompt", "data")}
    node = Node("eval dpo", "evaluate", "evaluate", {}, inputs, 3, "dpo", tags={"method": "dpo"}, about={"beta": "0.1"})
    request = requests.request_for(node, config(parallel=2), results, "run 7")
    assert request.name == "dpo" and request.seed == 3 and request.pipeline_run == "run 7"
    assert request.tags == {"method": "dpo", "data.version": "b" * 16}
    assert request.about == {"beta": "0.1", "model.key": "k1", "train.run_id": "run of k1"}
    assert request.inputs["model"].sha256 == "a" * 64 and request.experiment == "tests"
    assert request.placement.threads is not None


def test_the_longest_chain_goes_first() -> None:
    nodes = [fake("a"), fake("dpo", "a"), fake("reward", "a"), fake("ppo", "a", "reward"), fake("end", "ppo", "dpo")]
    assert [node.name for node in pipeline.longest_chain_first(nodes)] == ["a", "reward", "dpo", "ppo", "end"]


def test_a_preset_with_changes_is_run_from_a_form_of_three_fields(
    prefect: SyncPrefectClient, planned: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    form = parameter_schema(pipeline.from_preset.fn)
    assert list(form.properties) == ["preset", "overrides", "until"] and form.required == ["preset"]
    asked: list[PipelineConfig] = []
    monkeypatch.setattr(pipeline, "plan", lambda config: asked.append(config) or plan_of(planned, config))
    planned[:] = [fake("only")]
    results: Any = pipeline.from_preset("demo", ["align.dpo.beta=0.3"])
    assert [result.status for result in results.values()] == ["done"]
    assert asked[0].align["dpo"].beta == 0.3  # type: ignore[attr-defined]
    with pytest.raises(StageError, match="is neither a preset nor a file"):
        pipeline.from_preset("dmo")
    names = [run.name for run in sorted(prefect.read_flow_runs(), key=lambda run: str(run.created))]
    assert names[-2:] == ["demo dpo.beta=0.3", "dmo"]
