"""`alignflow ab` outside its process: whose answers, where results are kept, and the comparison made anew."""

import json
from pathlib import Path

import pytest

from flows.planning import requests
from flows.planning.nodes import Node
from flows.results import ab
from schemas.config import PipelineConfig
from schemas.errors import StageError
from schemas.stage import BASELINES, PEOPLE, STAGES, Artifact, Request, Result
from stages import tracking

SHAS = {"dpo": "d" * 64, "sft": "5" * 64, BASELINES: "b" * 64}


def asked(tmp_path: Path, **more: object) -> Request:
    inputs = {name: Artifact(uri=str(tmp_path / name), sha256=sha256) for name, sha256 in SHAS.items()}
    values = {"stage": "compare", "version": 1, "params": {}, "inputs": inputs, "pipeline_run": "run 7", **more}
    return Request.model_validate(values)


def said(request: Request) -> Path:
    results = requests.people_folder(request.inputs) / "results"
    results.mkdir(parents=True)
    (results / "dpo-sft.json").write_text("{}")
    return results


def test_names_are_put_in_one_order() -> None:
    assert ab.ordered("sft", "dpo") == ("dpo", "sft") == ab.ordered("dpo", "sft")
    assert ab.ordered("ppo", "kto") == ("kto", "ppo") and ab.ordered("zeta", "base") == ("zeta", "base")


def test_models_that_the_run_has_not_compared_are_refused(tmp_path: Path) -> None:
    for names, message in ((("dpo", "none"), "MODEL = none"), (("dpo", BASELINES), "MODEL = baselines")):
        with pytest.raises(
            StageError, match=f"{message}: the run has compared no such model. Fix: name two of dpo, sft"
        ):
            ab.evaluations(asked(tmp_path), *names)
    with pytest.raises(StageError, match="the same model"):
        ab.evaluations(asked(tmp_path), "dpo", "dpo")
    with pytest.raises(StageError, match="kept no answers"):
        ab.evaluations(asked(tmp_path, log_text=False), "dpo", "sft")


def test_results_belong_to_what_was_compared(home: Path, tmp_path: Path) -> None:
    folder = requests.people_folder(asked(tmp_path).inputs)
    assert folder.parent == home / "ab"
    others = asked(tmp_path).inputs | {PEOPLE: Artifact(uri="u", sha256="p"), BASELINES: Artifact(uri="u", sha256="x")}
    assert requests.people_folder(others) == folder
    assert requests.people_folder(asked(tmp_path).inputs | {"sft": Artifact(uri="u", sha256="x")}) != folder


def test_a_run_takes_along_what_people_said_of_its_models(home: Path, tmp_path: Path) -> None:
    raw = {"name": "t", "model": {"scratch": {}}, "align": {"dpo": {}}}
    raw["data"] = {"preference": {"path": "pairs.jsonl", "kind": "preference"}}
    config = PipelineConfig.model_validate(raw)
    results = {
        name: Result(status="done", key=name, outputs={"evaluation": Artifact(uri="u", sha256=SHAS[name])})
        for name in ("dpo", "sft")
    }
    node = Node("compare", "compare", "align", {}, {name: (name, "evaluation") for name in results})
    before = requests.request_for(node, config, results)
    assert PEOPLE not in before.inputs
    kept = said(before)
    after = requests.request_for(node, config, results)
    assert after.key() != before.key()
    (kept / "dpo-sft.json").write_text(json.dumps({"more": 1}))  # somebody judges on before the comparison reads it
    assert (tracking.fetch(after.inputs[PEOPLE]) / "dpo-sft.json").read_text() == "{}"
    assert requests.request_for(node, config, results).inputs[PEOPLE] != after.inputs[PEOPLE]
    elsewhere = PipelineConfig.model_validate(raw | {"pools": {"compare": "gpu"}})
    assert PEOPLE not in requests.request_for(node, elsewhere, results).inputs
    compares = Node("compare", "compare", "align", {"judge": {"judge": "endpoint"}}, node.inputs)
    assert PEOPLE not in requests.request_for(compares, config, results).inputs  # it would be asked again, for money


def test_the_comparison_is_made_anew_with_people(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Request] = []

    def run_stage(request: Request) -> Result:
        made.append(request)
        return Result(status="done", key="k", run_id="r", outputs={"comparison": Artifact(uri="u", sha256="s")})

    monkeypatch.setattr(ab.process, "run_stage", run_stage)
    monkeypatch.setattr(ab.tracking, "fetch", lambda artifact: tmp_path)
    monkeypatch.setattr(ab.tracking, "note_reuse", lambda result, run: None)
    request = asked(tmp_path)
    assert ab.refresh(request) is None and made == [] and ab.shown(request, requests.people_folder(request.inputs))
    results = said(request)
    assert ab.refresh(request) == tmp_path / "report.html"
    assert made[0].inputs[PEOPLE].sha256 == tracking.digest(results) and set(made[0].inputs) == {*SHAS, PEOPLE}
    assert made[0].version == STAGES["compare"].version and made[0].pipeline_run == "run 7"
    folder = requests.people_folder(request.inputs)
    assert not ab.shown(request, folder)  # also where the command was stopped before it compared
    (results / "dpo-sft.json").write_text(json.dumps({"more": 1}))
    assert ab.shown(
        request.model_copy(update={"inputs": {**request.inputs, **requests.people_said(request.inputs, {})}}), folder
    )
    assert ab.refresh(asked(tmp_path, params={"judge": {"judge": "endpoint"}})) is None
