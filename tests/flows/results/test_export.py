"""What runs leave in MLflow is found by the names people use, and an exported model loads in plain transformers."""

import re
import time
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.results import export, lookup
from flows.results.export import origins
from schemas.config.training import Training
from schemas.errors import StageError
from schemas.stage import Result
from stages import tracking
from stages.engine.data.codec import Codec
from stages.engine.models.loading import load_policy, load_scorer
from stages.engine.models.saving import save_policy, save_scorer
from tests.support.finished import finish
from tests.support.models import LORA, model_folder


def exported(what: str, out: Path, **options: Any) -> Path:
    """The folder that an export has written."""
    made = export.export(what, out, **options).folder
    assert made == out
    return out


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
        exported("dpo", tmp_path / "file" / "model")


def test_an_exported_model_loads_in_plain_transformers(aligned: Result, tmp_path: Path) -> None:
    out = exported("dpo", tmp_path / "exported")
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
    card = (exported("dpo", tmp_path / "exported") / "README.md").read_text()
    lines = (
        "# dpo",
        "method `dpo`",
        "data version: `d1`",
        "| beta | 0.3 |",
        "| Win rate against the SFT model | 75.0 % |",
    )
    assert [line for line in lines if line not in card] == [] and "lora" not in card


def test_the_cards_code_runs(aligned: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = exported("dpo", tmp_path / "exported")
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
    out = exported("reward", tmp_path / "exported")
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
    card = (exported("sft", tmp_path / "exported") / "README.md").read_text()
    assert f"Its base is `{made.uri}` (sha256 `{made.sha256[:12]}`" in card
    assert "adapter" not in (exported("base", tmp_path / "plain") / "README.md").read_text().partition("merged")[2]


def test_the_cards_metadata_tell_the_hub_what_it_is_and_how_it_did(aligned: Result, tmp_path: Path) -> None:
    data = ModelCard.load(exported("dpo", tmp_path / "exported") / "README.md").data
    assert data.to_dict() | {"model-index": 0} == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["alignflow", "dpo"],
        "model-index": 0,
    }
    assert isinstance(data, ModelCardData) and data.eval_results is not None
    (result,) = data.eval_results
    assert (data.model_name, result.metric_type, result.metric_value) == ("dpo", "win_rate_vs_sft", 0.75)
    bare = ModelCard.load(exported(str(tmp_path / "model"), tmp_path / "bare") / "README.md").data
    known = {name: value for name, value in data.to_dict().items() if name != "model-index"}
    assert bare.to_dict() == known | {"tags": ["alignflow"]}


PEFT_WARNS = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def from_the_hub(ready_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    """An SFT model with LoRA on a Hub model, and KTO with LoRA on that, on a data set of the Hub and a file."""
    card = tmp_path / "their-card.md"
    card.write_text("---\nlicense: apache-2.0\n---\n# Theirs\n")
    monkeypatch.setattr(origins, "try_to_load_from_cache", lambda *asked, **named: str(card))
    folder = model_folder(tmp_path / "base")
    params = {"path": "their/base", "revision": COMMIT, "scratch": None}
    (base,) = finish({"model": folder}, stage="base", name="base", params=params).outputs.values()
    rows = tmp_path / "rows"
    rows.mkdir()
    sources: Any = [{"name": "chat", "path": "hub:their/rows"}, {"name": "mine", "path": "pairs.jsonl"}]
    data = finish({"data": rows}, stage="validate", params={"sources": sources}).outputs["data"]
    (rows / "one").write_text("")
    held_out = finish({"data": rows}, stage="validate", params={"path": "hub:their/test"}).outputs["data"]
    below = base
    for stage, name in (("sft", "sft"), ("align", "kto")):
        policy = load_policy(folder, Training(lora=LORA))
        torch.manual_seed(1)
        for weights in policy.parameters():  # a fresh adapter changes nothing
            if weights.requires_grad:
                torch.nn.init.normal_(weights.data, std=0.1)
        folder = tmp_path / name
        save_policy(policy, Codec.load(tmp_path / "base"), folder, base=below.sha256)
        inputs = {"model": below, "data": data, "evaluation": held_out}
        made = finish({"model": folder}, stage=stage, name=name, params={"method": name, "lora": None}, inputs=inputs)
        below = made.outputs["model"]
    about = {"train.run_id": str(made.run_id)}
    numbers = {"win_rate_vs_sft": 0.9, "win_rate_vs_sft_low": 0.85, "win_rate_vs_sft_high": 0.94, "reward_score": nan}
    numbers |= {"kl_to_reference": 5.25, "kl_to_reference_se": 0.125, "t0.3/length": 20.0, "chat/judge_score": 2.0}
    metrics = {f"eval/{name}": value for name, value in numbers.items()} | {"compute/seconds": 9.0}
    judging: Any = {"judge": {"judge": "rule"}, "max_new_tokens": 64}
    finish({}, metrics, stage="evaluate", name="kto", params=judging, about=about)
    return made


def test_the_card_names_the_hubs_base_its_licence_and_the_data(from_the_hub: Result, tmp_path: Path) -> None:
    data = ModelCard.load(exported("kto", tmp_path / "exported") / "README.md").data
    assert (data.get("base_model"), data.get("license"), data.get("datasets")) == (
        "their/base",
        "apache-2.0",
        ["their/rows"],
    )
    assert isinstance(data, ModelCardData) and data.eval_results is not None
    assert {one.metric_name: one.metric_value for one in data.eval_results} == {
        "Win rate against the SFT model": 0.9,
        "Win rate against the SFT model, lower end": 0.85,
        "Win rate against the SFT model, upper end": 0.94,
        "KL to the SFT model, nats per answer": 5.25,
        "KL to the SFT model, nats per answer, standard error": 0.125,
        "Tokens per answer at temperature 0.3": 20.0,
        "Mean judge score on prompts of chat": 2.0,
    }, "the Hub refuses NaN"
    text = (tmp_path / "exported" / "README.md").read_text()
    assert "| Win rate against the SFT model | 90.0 [85.0, 94.0] % |" in text
    assert "| KL to the SFT model, nats per answer | 5.25 ± 0.125 |" in text
    assert "Judged by `rule` on held-out prompts, at most 64 tokens an answer" in text


@PEFT_WARNS
def test_an_adapter_alone_loads_in_peft_and_says_what_it_sits_on(from_the_hub: Result, tmp_path: Path) -> None:
    for what, base, commit in (("sft", None, COMMIT), ("kto", "me/sft", None)):
        out = exported(what, tmp_path / f"{what} adapter", adapter=True, base=base)
        files = {file.name for file in out.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json", "README.md"} <= files
        assert "model.safetensors" not in files and "config.json" not in files
        config = PeftConfig.from_pretrained(str(out))
        assert (config.base_model_name_or_path, config.revision) == (base or "their/base", commit)
        data = ModelCard.load(out / "README.md").data
        assert (data.get("base_model"), data.get("library_name")) == (base or "their/base", "peft")
        below = AutoModelForCausalLM.from_pretrained(tmp_path / ("base" if what == "sft" else "sft"))
        ids_BT = torch.tensor([[1, 5, 9, 2]])
        whole = AutoModelForCausalLM.from_pretrained(exported(what, tmp_path / f"{what} whole"))
        assert not torch.allclose(below(ids_BT).logits, whole(ids_BT).logits, atol=1e-2)
        assert torch.allclose(PeftModel.from_pretrained(below, out)(ids_BT).logits, whole(ids_BT).logits, atol=1e-5)


@PEFT_WARNS
def test_an_adapters_code_runs(from_the_hub: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = exported("kto", tmp_path / "exported", adapter=True, base=str(tmp_path / "sft"))
    code = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    exec(code[0], {})


def test_an_adapter_that_nobody_else_can_put_on_says_so(from_the_hub: Result, tmp_path: Path) -> None:
    card = (exported("kto", tmp_path / "exported", adapter=True) / "README.md").read_text()
    below = lookup.model("kto").request
    assert below is not None and f"The adapter's base is `{below.inputs['model'].uri}`" in card
    assert "base_model:" not in card and "FOLDER_OF_ITS_BASE" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": None}, "--out = not given: nothing says where the model is to go. Fix: give --out, --push, or both"),
        ({"adapter": True}, "--adapter = dpo: this model has no LoRA adapter"),
        ({"base": "me/sft"}, "--base = me/sft: only an adapter alone has one"),
        ({"public": True}, "--public = given: nothing is pushed"),
        ({"converter": Path("nowhere")}, "there is no convert_hf_to_gguf.py in it.*Fix: git clone"),
        ({"converter": Path("nowhere"), "adapter": True}, "an adapter alone becomes no GGUF model"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_a_file_is_written(
    aligned: Result, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(StageError, match=message):
        export.export("dpo", **{"out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_is_made_by_the_converter_of_a_checkout(aligned: Result, tmp_path: Path) -> None:
    """Called as llama.cpp's is, with what lies beside it at hand; its own last line is the reason where it fails."""
    checkout = tmp_path / "llama.cpp"
    checkout.mkdir()
    (checkout / "beside.py").write_text("SUFFIX = b' as gguf'\n")
    script = checkout / "convert_hf_to_gguf.py"
    script.write_text(
        "import argparse, pathlib, beside\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('model', type=pathlib.Path)\n"
        "parser.add_argument('--outfile', type=pathlib.Path)\n"
        "given = parser.parse_args()\n"
        "given.outfile.write_bytes((given.model / 'config.json').read_bytes() + beside.SUFFIX)\n"
    )
    out = exported("dpo", tmp_path / "mine", converter=checkout)
    assert (out / "mine.gguf").read_bytes() == (out / "config.json").read_bytes() + b" as gguf"
    script.write_text("raise NotImplementedError('BPE pre-tokenizer was not recognized')\n")
    with pytest.raises(StageError, match=r"converter failed: NotImplementedError: BPE pre-tokenizer .*Fix: the export"):
        export.export("dpo", tmp_path / "other", converter=checkout)
    assert (tmp_path / "other" / "model.safetensors").exists() and not (tmp_path / "other" / "other.gguf").exists()


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
        exported("ppo", tmp_path / "exported")
    with pytest.raises(StageError, match="cannot hold quotes"):
        exported("o'neill", tmp_path / "exported")
    with pytest.raises(StageError):
        exported("models:/nobody@champion", tmp_path / "exported")


def test_an_export_overwrites_nothing(aligned: Result, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("keep me")
    with pytest.raises(StageError, match="already exists"):
        exported("dpo", tmp_path / "mine")
    assert (tmp_path / "mine" / "file").read_text() == "keep me"
    (tmp_path / "empty").mkdir()
    assert exported("dpo", tmp_path / "empty") == tmp_path / "empty"


def test_an_altered_model_is_not_exported(aligned: Result, tmp_path: Path) -> None:
    weights = lookup.model("dpo").folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(StageError, match="altered"):
        exported("dpo", tmp_path / "exported")


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
