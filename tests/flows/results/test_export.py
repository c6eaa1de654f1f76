"""What runs leave in MLflow is found by the names people use, and an exported model loads in plain transformers."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.results import export, lookup
from schemas.config.training import Training
from schemas.errors import StageError
from schemas.stage import Request, Result
from stages import tracking
from stages.engine.data.codec import Codec
from stages.engine.models.loading import load_policy, load_scorer
from stages.engine.models.saving import save_policy, save_scorer
from stages.tracking import StageRun
from tests.support.models import LORA, model_folder


def finish(outputs: dict[str, Path], metrics: dict[str, float] | None = None, **request: Any) -> Result:
    """A finished stage run with the given outputs; models are those called `model`."""
    pipeline_run = request.pop("pipeline_run", "run-1")
    whole = Request(version=1, pipeline_run=pipeline_run, experiment="trial", **request)
    with StageRun(whole) as run:
        for name, folder in outputs.items():
            run.publish(name, folder, model=name == "model")
        return run.finish(metrics or {})


@pytest.fixture
def aligned(ready_home: Path, tmp_path: Path) -> Result:
    """A pipeline run with one aligned model, its evaluation and a comparison."""
    params = {"method": "dpo", "beta": 0.3, "lora": None}
    trained = finish(
        {"model": model_folder(tmp_path / "model")},
        stage="align",
        name="dpo",
        params=params,
        tags={"data.version": "d1"},
    )
    about = {"train.run_id": str(trained.run_id)}
    finish({}, {"eval/win_rate_vs_sft": 0.75}, stage="evaluate", name="dpo", params={}, about=about)
    table = tmp_path / "comparison"
    table.mkdir()
    (table / "table.txt").write_text("a table\n")
    finish({"comparison": table}, stage="compare", name="compare", params={})
    return trained


def test_a_place_that_cannot_be_written_is_named(aligned: Result, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match=r"--out = .*file/model: cannot be written: .*Fix: name a place"):
        export.export("dpo", tmp_path / "file" / "model")


def test_an_exported_model_loads_in_plain_transformers(aligned: Result, tmp_path: Path) -> None:
    out = export.export("dpo", tmp_path / "exported")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids_BT = tokenizer.apply_chat_template(
        [{"role": "user", "content": "red blue"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )["input_ids"]
    assert torch.equal(model(ids_BT).logits, before(ids_BT).logits)
    assert {"config.json", "model.safetensors", "generation_config.json", "README.md"} <= {
        f.name for f in out.iterdir()
    }


def test_the_card_tells_method_parameters_metrics_and_data(aligned: Result, tmp_path: Path) -> None:
    card = (export.export("dpo", tmp_path / "exported") / "README.md").read_text()
    for line in ("# dpo", "method `dpo`", "data version: `d1`", "| beta | 0.3 |", "| eval/win_rate_vs_sft | 0.75 |"):
        assert line in card


def test_the_cards_code_runs(aligned: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = export.export("dpo", tmp_path / "exported")
    code = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    exec(code[0], {})


def test_a_reward_model_is_exported_with_code_that_scores_as_we_do(
    ready_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = model_folder(tmp_path / "base")
    codec = Codec.load(base)
    save_scorer(load_scorer(base, seed=1), codec, tmp_path / "scorer")
    finish({"model": tmp_path / "scorer"}, stage="reward", name="reward", params={})
    out = export.export("reward", tmp_path / "exported")
    code = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code[0], names)
    ids = codec.prompt([{"role": "user", "content": "Hello!"}]) + codec.answer("Hello to you.")
    assert names["tokenizer"](names["text"], add_special_tokens=False)["input_ids"] == ids
    assert "tensor" in capsys.readouterr().out


def test_the_card_tells_the_adapters_base(ready_home: Path, tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    (made,) = finish({"model": base}, stage="base", name="base", params={}).outputs.values()
    policy = load_policy(base, Training(lora=LORA))
    save_policy(policy, Codec.load(base), tmp_path / "model", base=made.sha256)
    finish({"model": tmp_path / "model"}, stage="sft", name="sft", params={}, inputs={"model": made})
    card = (export.export("sft", tmp_path / "exported") / "README.md").read_text()
    assert f"Its base is `{made.uri}` (sha256 `{made.sha256[:12]}`" in card
    assert "adapter" not in (export.export("base", tmp_path / "plain") / "README.md").read_text().partition("merged")[2]


def test_the_cards_metadata_tell_the_hub_what_it_is_and_how_it_did(aligned: Result, tmp_path: Path) -> None:
    data = ModelCard.load(export.export("dpo", tmp_path / "exported") / "README.md").data
    assert data.to_dict() | {"model-index": 0} == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["alignflow"],
        "model-index": 0,
    }
    assert isinstance(data, ModelCardData) and data.eval_results is not None
    (result,) = data.eval_results
    assert (data.model_name, result.metric_type, result.metric_value) == ("dpo", "eval/win_rate_vs_sft", 0.75)
    bare = ModelCard.load(export.export(str(tmp_path / "model"), tmp_path / "bare") / "README.md").data
    assert bare.to_dict() == {name: value for name, value in data.to_dict().items() if name != "model-index"}


@pytest.mark.parametrize("what", ["uri", "run", "registered", "folder"])
def test_a_model_is_found_by_uri_and_folder(
    aligned: Result, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.tracking_uri())  # MLflow's registry looks nowhere else
    uri = aligned.outputs["model"].uri
    if what == "registered":
        client = tracking.client()
        client.create_registered_model("assistant")
        client.create_model_version("assistant", uri, run_id=aligned.run_id)
        client.set_registered_model_alias("assistant", "champion", "1")
    names = {
        "uri": uri,
        "run": f"runs:/{aligned.run_id}/model",
        "registered": "models:/assistant@champion",
        "folder": str(tmp_path / "model"),
    }
    found = lookup.model(names[what])
    assert tracking.digest(found.folder) == aligned.outputs["model"].sha256
    assert (found.metrics == {"eval/win_rate_vs_sft": 0.75}) == (what != "folder")


def test_the_last_used_model_of_a_name_counts(aligned: Result, tmp_path: Path) -> None:
    model_folder(tmp_path / "other", seed=1)
    other = finish({"model": tmp_path / "other"}, stage="align", name="dpo", params={"method": "dpo", "beta": 0.5})
    assert tracking.digest(lookup.model("dpo").folder) == other.outputs["model"].sha256
    tracking.note_reuse(aligned, "run-3")
    assert tracking.digest(lookup.model("dpo").folder) == aligned.outputs["model"].sha256


def test_a_run_from_a_time_to_come_is_not_the_last(
    aligned: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its host's clock was a day ahead."""
    model_folder(tmp_path / "other", seed=1)
    with monkeypatch.context() as ahead:
        now = time.time
        ahead.setattr("time.time", lambda: now() + 86_400)
        other = finish({"model": tmp_path / "other"}, stage="align", name="dpo", params={"method": "dpo", "beta": 0.5})
    assert tracking.digest(lookup.model("dpo").folder) == aligned.outputs["model"].sha256
    tracking.note_reuse(other, "run-3")  # by a clock that is right
    assert tracking.digest(lookup.model("dpo").folder) == other.outputs["model"].sha256


def test_a_model_whose_result_cannot_be_read_is_passed_over(
    aligned: Result, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model_folder(tmp_path / "other", seed=1)
    other = finish({"model": tmp_path / "other"}, stage="align", name="dpo", params={"method": "dpo", "beta": 0.5})
    file = tracking.locate(f"runs:/{other.run_id}/result.json")
    whole = file.read_text()
    file.write_text("")
    assert tracking.digest(lookup.model("dpo").folder) == aligned.outputs["model"].sha256
    assert f"run {other.run_id} is passed over" in caplog.text
    file.write_text(whole.replace('"status"', '"of_another_version": 1, "status"', 1))
    config = tracking.locate(f"runs:/{other.run_id}/config.json")
    config.write_text(config.read_text().replace('"stage"', '"of_another_version": 1, "stage"', 1))
    assert tracking.digest(lookup.model("dpo").folder) == other.outputs["model"].sha256


def test_runs_of_all_experiments_are_looked_through(aligned: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow answers a thousand experiments at a time, and a thousand runs: here one."""
    for name in ("one", "two", "three"):
        tracking.experiment(name)
    client = tracking.plain_client()
    for what in ("search_experiments", "search_runs"):
        real = getattr(client, what)
        monkeypatch.setattr(client, what, lambda *given, real=real, **named: real(*given, **named, max_results=1))
    assert tracking.digest(lookup.model("dpo").folder) == aligned.outputs["model"].sha256


def test_an_unknown_model_names_those_that_are_there(aligned: Result, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"MODEL = ppo: there is no such model. Fix: name one of dpo"):
        export.export("ppo", tmp_path / "exported")
    with pytest.raises(StageError, match="cannot hold quotes"):
        export.export("o'neill", tmp_path / "exported")
    with pytest.raises(StageError):
        export.export("models:/nobody@champion", tmp_path / "exported")


def test_an_export_overwrites_nothing(aligned: Result, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("keep me")
    with pytest.raises(StageError, match="already exists"):
        export.export("dpo", tmp_path / "mine")
    assert (tmp_path / "mine" / "file").read_text() == "keep me"
    (tmp_path / "empty").mkdir()
    assert export.export("dpo", tmp_path / "empty") == tmp_path / "empty"


def test_an_altered_model_is_not_exported(aligned: Result, tmp_path: Path) -> None:
    weights = lookup.model("dpo").folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(StageError, match="altered"):
        export.export("dpo", tmp_path / "exported")


def test_the_last_comparison_is_found_by_run_and_by_name(aligned: Result) -> None:
    assert (lookup.comparison().folder / "table.txt").read_text() == "a table\n"
    assert lookup.comparison("trial").pipeline_run == "run-1"
    assert lookup.comparison("run-1").pipeline_run == "run-1"
    with pytest.raises(StageError, match="there is no finished pipeline run called 'other'"):
        lookup.comparison("other")


def test_a_comparison_is_found_by_the_start_of_its_runs_id_and_none_across_runs_counts(
    aligned: Result, tmp_path: Path
) -> None:
    folders = {name: tmp_path / name for name in ("long", "across")}
    for name, folder in folders.items():
        folder.mkdir()
        (folder / "table.txt").write_text(name)
    run, tags = "8634f932-aaa5-4444-8c65-94d054d2f74b", {lookup.ACROSS: "run-1 run-2"}
    finish({"comparison": folders["long"]}, stage="compare", name="compare", params={"a": 1}, pipeline_run=run)
    finish({"comparison": folders["across"]}, stage="compare", name="compare", params={"a": 2}, tags=tags)
    assert lookup.comparison("8634f932").pipeline_run == lookup.comparison().pipeline_run == run
    assert (lookup.comparison("run-1").folder / "table.txt").read_text() == "a table\n"
    with pytest.raises(StageError, match="called '8634'"):
        lookup.comparison("8634")


def test_without_any_run_the_message_says_what_to_do(ready_home: Path) -> None:
    with pytest.raises(StageError, match="alignflow run"):
        lookup.comparison()
