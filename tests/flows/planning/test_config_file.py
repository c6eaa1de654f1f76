"""Every mistake in a config is found before anything starts, and its message names field, value and fix."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from flows.planning import config_file, explain
from schemas import Strict
from schemas.config import RewardConfig, SFTConfig
from schemas.config.methods import DPO, KTO, PPO
from schemas.config.training import LoRA
from schemas.errors import StageError
from schemas.stage import Result


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A small valid config, with its data file in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("{}\n")
    data = {"preference": {"path": "pairs.jsonl", "kind": "preference"}}
    return {"name": "test", "model": {"scratch": {}}, "data": data, "align": {"dpo": {}}, "evaluate": {"judge": "rule"}}


def load(raw: dict[str, Any], *overrides: str) -> Any:
    Path("config.yaml").write_text(yaml.safe_dump(raw))
    return config_file.load("config.yaml", overrides).config


def refused(raw: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(StageError) as caught:
        load(raw, *overrides)
    assert caught.value.status == "refused"
    assert caught.value.problem.kind == "config"
    return str(caught.value)


def test_a_valid_config_loads_with_vetted_defaults(raw: dict[str, Any]) -> None:
    config = load(raw)
    assert config.align["dpo"] == DPO()


def test_overrides_are_typed_by_yaml_and_make_maps(raw: dict[str, Any]) -> None:
    config = load(
        raw,
        "align.dpo.beta=0.3",
        "align.dpo.lora.rank=4",
        "align.mine={method: ppo, iterations: 7}",
        "sft.learning_rate=1e-5",
        "gold=null",
        "name=other",
    )
    assert config.align["dpo"].beta == 0.3
    assert config.align["dpo"].lora.rank == 4
    assert isinstance(config.align["mine"], PPO) and config.align["mine"].iterations == 7
    assert config.sft.learning_rate == 1e-5
    assert config.name == "other"


@pytest.mark.parametrize(
    "key", ["sft.lora.rank", "sft.epochs", "align.dpo.beta", "seed", "promote.gate.tolerances.distinct_2"]
)
def test_true_is_no_number(raw: dict[str, Any], key: str) -> None:
    assert refused(raw, f"{key}=true") == f"{key} = true: this is not a number. Fix: give a number"


NOT_FINITE = {".nan": "nan: must be a number, which NaN is not", ".inf": "inf: must be a finite number"}


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize(
    "key", ["seed", "generate.noise", "data.preference.eval_fraction", "promote.gate.kl_max", "sft.lora.alpha"]
)
def test_neither_nan_nor_infinity_is_a_setting(raw: dict[str, Any], key: str, value: str) -> None:
    assert refused(raw, f"{key}={value}").startswith(f"{key} = {NOT_FINITE[value]}")


def configs(model: type[Strict] = Strict) -> Iterator[type[Strict]]:
    for inner in model.__subclasses__():
        yield from configs(inner)
        if inner.__module__.startswith("schemas.") and inner is not Result:
            yield inner


def test_no_field_of_any_config_takes_nan() -> None:
    """Each by itself, so that a new one cannot slip through."""
    for model in set(configs()):
        for name in model.model_fields:
            with pytest.raises(ValidationError) as caught:
                model.model_validate({name: math.nan})
            assert name in {error["loc"][0] for error in caught.value.errors()}, f"{model}.{name}"


def test_one_e_minus_five_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1e-5\nb: [2E6, -3.e+2]\nc: 1e5x\nd: on\n")
    assert config_file.read(tmp_path / "a.yaml") == {"a": 1e-5, "b": [2e6, -300.0], "c": "1e5x", "d": "on"}


def test_what_several_ranks_need_is_asked_before_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of stages that no pool gets nobody knows where they start, once the run is submitted to other machines."""
    for here in (True, False):
        with pytest.raises(StageError, match="nodes = 2: stage sft runs on pool gpu, which is one node") as error:
            config_file.load("demo", ["nodes=2", "pools={sft: gpu}"], here=here)
        assert ("stage align runs on this machine" in str(error.value)) is here
    monkeypatch.setenv("ALIGNFLOW_LAUNCHER", "srun")
    config_file.load("demo", ["nodes=2", "pools={sft: gpu}"])
    for minutes in ("soon", "-1", "nan"):
        monkeypatch.setenv("ALIGNFLOW_RANK_MINUTES", minutes)
        with pytest.raises(StageError, match=f"ALIGNFLOW_RANK_MINUTES = {minutes}: this is not a time .* Fix: give"):
            config_file.load("demo", ["devices=2"])
    config_file.load("demo")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("align.dpo.betta=1", "align.dpo.betta: unknown key. Did you mean 'beta'?"),
        ("align.mine={method: kto, undesirable_wieght: 1}", "Did you mean 'undesirable_weight'?"),
        ("sfft={}", "sfft: unknown key. Did you mean 'sft'?"),
        ("sft.lr=1", "sft.lr: unknown key. Fix: write sft.learning_rate"),
        ("align.ppo.gae_lambda=1", "align.ppo.gae_lambda: unknown key. Fix: write align.ppo.lam"),
        ("sft.lora_r=8", "sft.lora_r: unknown key. Fix: write sft.lora.rank"),
        ("sft.lora={r: 8}", "sft.lora.r: unknown key. Fix: write sft.lora.rank"),
        ("num_gpus=2", "num_gpus: unknown key. Fix: write devices"),
        ("devices=999", "rows for 999 ranks (1 nodes x 999 devices). Fix: set it to at least 999, or ask for fewer"),
        ("nodes=2", "nodes = 2: stage sft runs on this machine, which is one node. Fix: place it where there are"),
        (
            "num_train_epochs=3",
            "num_train_epochs: unknown key. Fix: write sft.epochs, reward.epochs, align.dpo.epochs",
        ),
        ("model_name_or_path=x", "model_name_or_path: unknown key. Fix: write model.path"),
        ("sft.bf16=true", "sft.bf16: unknown key. Fix: write sft.precision (fp32 or bf16)"),
        ("align.dpo.cliprange=1", "align.dpo.cliprange: unknown key. Known here: adam_beta1, adam_beta2, adam_eps"),
        ("sft.lora={rnk: 1}", "sft.lora.rnk: unknown key. Did you mean 'rank'?"),
        ("model.zzz=1", "model.zzz: unknown key. Known here: chat_template, path, revision, scratch, system_prompt"),
        ("evaluate.judge={judge: endpoint, ulr: x}", "evaluate.judge.ulr: unknown key. Did you mean 'url'?"),
        ("evaluate.judge={judge: endpoint, url: x}", "evaluate.judge.model: missing. Fix: add it"),
        ("data.preference.kind=prefrence", "= 'prefrence': must be 'sft', 'preference', 'ranking', 'feedback' or"),
        ("data.preference.kind=prefrence", "Did you mean 'preference'?"),
        ("align.dpo.beta=-1", "align.dpo.beta = -1: must be greater than 0"),
        ("align.dpo.beta=much", "align.dpo.beta = 'much': must be a valid number"),
        ("align.grpo={}", "align.grpo: method 'grpo' is not known. Fix: use one of dpo, kto, ppo"),
        ("evaluate.judge=vibes", "evaluate.judge: judge 'vibes' is not known"),
        ("name=a b", "name = 'a b': must be up to 63 letters"),
        ("sft", "--set sft: is not of the form a.b=value"),
        ("evaluate.judge.model=x", "evaluate.judge is 'rule' and has no keys"),
        ("sft.epochs=[1", "the value is not valid YAML"),
        ("seed=9223372036854775808", "seed = 9223372036854775808: must be less than 9223372036854775808"),
        ("align.dpo.seed=9223372036854775808", "align.dpo.seed = 9223372036854775808: must be less than"),
        ("data.preference.path='hub:'", "data.preference.path = 'hub:': must name a file, or hub:NAME"),
        ("data.preference.path=/", "data.preference.path = /: this is a folder, not a file. Fix: name a file in it"),
        ("model.chat_template=chat.jinja", "model.chat_template = chat.jinja: no such file. Fix: give its path"),
        (
            "model.scratch.heads=7",
            "model.scratch: hidden_size is 96, of which 7 heads cannot take an even part each. Fix: ",
        ),
        ("sft.epochs=1e308", "sft.epochs = 1e+308: must be less than or equal to 1000000"),
        (f"sweep={'x' * 300}", "should have at most 250 characters"),
        (
            "align.dpo.lora={target: '('}",
            "align.dpo.lora.target = '(': is not a regular expression: missing ), unterminated",
        ),
        (
            "evaluate.judge={judge: endpoint, url: 'h:80', model: m}",
            "evaluate.judge.url = h:80: this is not an http(s) address",
        ),
        (
            "evaluate.judge={judge: endpoint, url: 'http://h', model: ''}",
            "evaluate.judge.model = '': string should have",
        ),
        ("evaluate.bootstrap=1000000000", "evaluate.bootstrap = 1000000000: must be less than or equal to 100000"),
        ("align.dpo=3", "align.dpo = 3: must be keys with values"),
        ("sft.lora=true", "sft.lora = true: must be keys with values"),
        ("evaluate.judge=3", "evaluate.judge = 3: must be one of rule, sentiment, reward, endpoint, or keys with"),
        ("align.dpo.beta=.inf", "align.dpo.beta = inf: must be a finite number"),
        ("sft={epochs: null}", "sft.epochs = null: training has no end. Fix: set epochs or max_steps"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_fix(raw: dict[str, Any], override: str, message: str) -> None:
    assert message in refused(raw, override)


def test_an_unknown_key_of_one_method_is_not_taken_from_another(raw: dict[str, Any]) -> None:
    raw["align"] = {"kto": {"iteration": 3}}
    assert "Did you mean" not in refused(raw)


def test_what_runs_elsewhere_may_name_what_is_only_there(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["data"]["preference"]["path"] = raw["model"]["path"] = f"{tmp_path}/there"
    raw["model"]["scratch"] = None
    assert refused(raw).count("no such") == 2
    assert config_file.load("config.yaml", here=False).config.model.path == f"{tmp_path}/there"
    Path("there").mkdir()  # what is here is looked at
    with pytest.raises(StageError, match=r"model\.path = .*there: the folder holds no config\.json"):
        config_file.load("config.yaml", here=False)
    with pytest.raises(StageError, match=r"data\.preference\.path = none\.jsonl: no such file"):
        config_file.load("config.yaml", ["data.preference.path=none.jsonl"], here=False)


def test_a_judges_key_is_missed_before_anything_is_trained(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw["evaluate"]["judge"] = {"judge": "endpoint", "url": "http://h/v1", "model": "m", "api_key_env": "JUDGES_KEY"}
    monkeypatch.delenv("JUDGES_KEY", raising=False)
    assert (
        refused(raw)
        == "evaluate.judge.api_key_env = JUDGES_KEY: this variable is not set. Fix: export JUDGES_KEY first"
    )
    load(raw, "pools.evaluate=cpu")  # its workers have the key
    config_file.load("config.yaml", here=False)
    monkeypatch.setenv("JUDGES_KEY", "k")
    load(raw)


def test_all_mistakes_come_at_once(raw: dict[str, Any]) -> None:
    lines = refused(raw, "sft.epoch=1", "seed=-1").splitlines()
    assert sorted(lines) == [
        "seed = -1: must be greater than or equal to 0",
        "sft.epoch: unknown key. Did you mean 'epochs'?",
    ]


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("name: a\nseed: 1\nname: b\n")
    with pytest.raises(StageError, match=r'twice.yaml:3:1: found duplicate key "name"'):
        config_file.read(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2\n", "bad.yaml:2"),
        ("- a\n", "holds list, not keys"),
        ("", "holds NoneType"),
        ("\x00", "not valid YAML"),
    ],
)
def test_bad_yaml_names_its_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(StageError) as caught:
        config_file.read(file)
    assert message in str(caught.value)


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    file = tmp_path / "code.yaml"
    file.write_text("a: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(StageError, match="could not determine a constructor"):
        config_file.read(file)


def test_an_unknown_preset_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError, match="Did you mean 'demo'"):
        config_file.find("demoo")
    with pytest.raises(StageError, match="neither a preset nor a file"):
        config_file.find("nowhere.yaml")
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    with pytest.raises(StageError, match=r"Did you mean 'mine\.yaml'"):
        config_file.find("mine.yml")


def test_a_missing_data_file_is_found_before_anything_starts(raw: dict[str, Any]) -> None:
    message = refused(raw, "data.preference.path=pair.jsonl")
    assert message == "data.preference.path = pair.jsonl: no such file. Fix: Did you mean 'pairs.jsonl'?"
    assert "give its path as seen from" in refused(raw, "data.preference.path=other.jsonl")  # only the ending is alike


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model={path: ./nowhere}"], "model.path = ./nowhere: no such folder"),
        (["model={path: .}"], "the folder holds no config.json"),
        (["model={path: some/name}"], "the Hugging Face Hub cannot be asked for its commit"),
        (
            ["model={path: 'package:no-such-package'}"],
            "is installed. Fix: pip install no-such-package",
        ),
        (["model={path: none.gguf}"], "model.path = none.gguf: no such file"),
        (["model={}"], "neither is set"),
        (["model.path=x"], "both are set"),
        (["data.preference.path='hub:some/data'"], "Fix: set data.preference.revision"),
        (["reward_model=nowhere"], "reward_model = nowhere: no such folder"),
        (["evaluate.judge={judge: reward, model: nowhere}"], "evaluate.judge.model = nowhere: no such folder"),
        (["evaluate.judge=reward"], "gold = "),
        (
            ["evaluate.judge=reward", "gold={}"],
            "data.preference.gold_fraction = 0",
        ),
        (["align={ppo: {}}", "reward=null"], "align.ppo = "),
        (
            ["data={prompt: {path: pairs.jsonl, kind: prompt}}", "sft=null"],
            "align.dpo",
        ),
        (["data={prompt: {path: pairs.jsonl, kind: prompt}}"], "sft = "),
        (
            ["data.preference.kind=sft"],
            "data.preference.kind = sft",
        ),
    ],
)
def test_what_would_stop_the_run_later_is_found_first(raw: dict[str, Any], overrides: list[str], message: str) -> None:
    assert message in refused(raw, *overrides)


def test_a_gold_judge_with_rows_of_its_own_is_fine(raw: dict[str, Any]) -> None:
    load(raw, "evaluate.judge=reward", "gold={}", "data.preference.gold_fraction=0.4")


def test_generated_pairs_feed_every_method(raw: dict[str, Any]) -> None:
    data = "data={sft: {path: 'demo:sft', kind: sft}}"
    load(raw, data, "generate={}", "align={dpo: null, kto: null, ppo: null}")


def test_a_result_with_nan_and_infinity_reads_back() -> None:
    result = Result(status="done", key="k", metrics={"eval/nan": math.nan, "eval/infinite": math.inf})
    again = Result.model_validate_json(result.model_dump_json())
    assert math.isnan(again.metrics["eval/nan"]) and again.metrics["eval/infinite"] == math.inf


@pytest.mark.parametrize("judge", ["rule", "sentiment", "reward", {"judge": "rule"}])
def test_what_a_deployed_run_is_checked_by_takes_a_judge_as_a_config_does(judge: Any) -> None:
    """Prefect's server checks parameters by the flow's schema, before any of our code sees them."""
    from prefect.utilities.callables import parameter_schema
    from prefect.utilities.schema_tools import validate

    from flows.pipeline import pipeline

    schema: Any = parameter_schema(pipeline.fn).model_dump_for_openapi()
    config = {
        "name": "t",
        "model": {"scratch": {}},
        "data": {"sft": {"path": "demo:sft", "kind": "sft"}},
        "sft": {"learning_rate": 1e-3},
        "align": {},
        "evaluate": {"judge": judge},
    }
    assert validate({"config": config}, schema) == []
    assert validate({"config": {**config, "evaluate": {"judge": "nobody"}}}, schema) != []
    assert validate({"config": {**config, "evaluate": {"judge": judge, "temperature": 0.7}}}, schema) == []
    assert validate({"config": {**config, "evaluate": {"judge": judge, "temperatur": 0.7}}}, schema) != []


def test_adapters_learn_ten_times_as_fast_unless_a_rate_is_given() -> None:
    for given in (DPO, KTO, PPO, SFTConfig, RewardConfig):
        plain = given()
        assert given(lora=LoRA()).learning_rate == pytest.approx(10 * plain.learning_rate)
        assert given.model_validate({"lora": {}, "learning_rate": 3e-5}).learning_rate == 3e-5
        assert given.model_validate({"lora": None}).learning_rate == plain.learning_rate
        assert given.model_validate(given(lora=LoRA()).model_dump()) == given(lora=LoRA())


def test_null_takes_a_method_out_where_it_is_set(raw: dict[str, Any]) -> None:
    raw["align"] = {"dpo": None, "kto": {"beta": 0.3}}
    assert load(raw).align["dpo"] == DPO()  # in a file `dpo:` alone is DPO with its defaults
    assert list(load(raw, "align.kto=null").align) == ["dpo"]
    assert list(load(raw, "align.ppo=null").align) == ["dpo", "kto"]


def test_names_of_other_trainers_lead_to_keys_that_exist() -> None:
    """Each of our keys in the table is a key of some place, or the answer would send people in a circle."""
    raw = config_file.raw_of("demo")
    raw["align"]["ppo"] = {"method": "ppo"}
    places = [(), ("model",), ("data", "preference"), ("sft",), ("align", "ppo"), ("align", "kto"), ("align", "dpo")]
    known = {key for place in places for key in explain.known_keys((*place, "?"), raw)}
    lora = set(explain.known_keys(("sft", "lora", "?"), {"sft": {"lora": {}}}))
    for ours, _ in explain._OTHER_NAMES.values():
        first, _, rest = ours.partition(".")
        assert first in known and (first != "lora" or not rest or rest in lora)
