"""Sweeps: their variants, equal training tokens with exact resume, and the frontier over seeds."""

import json
import logging
import math
import os
import signal
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from flows.planning import dry_run, memory, requests, sweep
from flows.planning.plan import Node, last_test, params_of, plan
from flows.results import announce
from schemas.config import PipelineConfig, SFTConfig, methods
from schemas.config.methods import MethodConfig
from schemas.config.training import Training
from schemas.errors import StageError
from schemas.stage import Artifact, Result
from stages import align, budget
from stages.engine.data.codec import Codec
from stages.engine.models.loading import load_scorer
from stages.engine.models.saving import save_scorer
from stages.engine.scoring.evaluation_record import Evaluation, Sample
from stages.engine.training.loop import train
from tests.support import models
from tests.support.context import MemoryContext

# --- the grid ---


def swept(methods: str = "dpo,kto,ppo", beta: str = "0.1", seeds: str = "0,1", *sets: str, **more: Any) -> Any:
    return sweep.load("demo", sets, methods, beta, seeds, **more).config


def nodes(config: PipelineConfig) -> dict[str, Node]:
    return plan(config).nodes


def test_a_sweep_is_a_plain_config_with_all_variants() -> None:
    config = swept("ppo,dpo", "0.3,0.05", "1,0")
    assert list(config.align) == [f"{m}-{b}-s{s}" for m in ("ppo", "dpo") for b in ("0.05", "0.3") for s in (0, 1)]
    ppo, dpo = config.align["ppo-0.3-s1"], config.align["dpo-0.05-s0"]
    assert isinstance(ppo, methods.PPO) and (ppo.kl_coef, ppo.seed, ppo.iterations) == (0.3, 1, 32)
    assert isinstance(dpo, methods.DPO) and (dpo.beta, dpo.seed, dpo.learning_rate) == (0.05, 0, 3e-4)
    assert config.equal_tokens and config.sweep == config.name == "demo"
    fixed = swept("dpo", "0.1", "0", tokens=5000, name="mine")
    assert not fixed.equal_tokens and fixed.sweep == "mine" and fixed.align["dpo-0.1-s0"].train_tokens == 5000
    assert PipelineConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_method_that_the_config_does_not_name_has_its_defaults() -> None:
    config = swept("dpo", "0.2", "0", "align={strong: {method: dpo, epochs: 2}}")
    assert config.align["dpo-0.2-s0"].epochs == 2
    assert swept("dpo", "0.2", "0", "align={}").align["dpo-0.2-s0"] == methods.DPO(beta=0.2, seed=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("dpoo",), "--methods = dpoo: there is no such method. Fix: use dpo"),
        (("dpo,dpo",), "--methods = dpo,dpo: the list is empty or names something twice"),
        ((",",), "--methods = ,: the list is empty"),
        (("dpo", "0.1,high"), "--beta = high: this is not a number"),
        (("dpo", "0.1,0.10"), "--beta = 0.1,0.10: a number stands twice"),
        (("dpo", "0.1", "0,1.5"), "--seeds = 1.5: this is not a whole number"),
        (("dpo", "-1", "0"), "--beta = -1: dpo takes no such beta: it must be greater than 0. Fix: give numbers"),
        (("ppo,dpo", "0", "0"), "--beta = 0: dpo takes no such beta"),
        (("ppo", "-0.1", "0"), "--beta = -0.1: ppo takes no such beta: it must be greater than or equal to 0"),
        (("kto", "inf", "0"), "--beta = inf: kto takes no such beta: it must be a finite number"),
        (
            ("dpo", "nan", "0"),
            "--beta = nan: dpo takes no such beta: it must be a number, which NaN is not. Fix: give",
        ),
        (("dpo,kto", "0.1,1e300", "0"), "--beta = 1e+300: it must be less than 1e15. Fix: give numbers such as"),
        (("dpo", "0.3,0.30000000000000004"), "--beta = 0.3,0.30000000000000004: two numbers differ beyond 15 digits"),
        (("dpo,kto", "0.1,0.3", "0,-1"), "--seeds = -1: it must be greater than or equal to 0. Fix: give whole"),
        (("dpo", "0.1", "9223372036854775808"), "--seeds = 9223372036854775808: it must be less than"),
        (("ppo", "0.1", "0", "align.ppo.kl_target=6"), "align.ppo.kl_target = 6.0: a sweep needs a fixed KL"),
    ],
)
def test_what_cannot_be_swept_is_named(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(StageError) as caught:
        swept(*arguments)
    assert str(caught.value).startswith(words)


def test_ppo_alone_can_be_swept_without_a_kl_penalty() -> None:
    ppo = swept("ppo", "0,0.1", "0").align["ppo-0-s0"]
    assert isinstance(ppo, methods.PPO) and ppo.kl_coef == 0


def test_a_config_that_promotes_can_be_swept() -> None:
    assert swept("dpo", "0.1", "0,1", "promote.candidate=dpo").promote is None


def test_a_seed_changes_the_alignment_run_alone() -> None:
    one, both = nodes(swept("dpo,ppo", "0.1", "1")), nodes(swept("dpo,ppo", "0.1", "0,1"))
    assert {name for name in one if one[name] != both[name]} == {"compare"}
    assert both["dpo-0.1-s1"].seed == 1 and both["eval dpo-0.1-s1"].seed == 0
    assert both["eval dpo-0.1-s1"].about["seed"] == "1"
    first, second = both["dpo-0.1-s0"], both["dpo-0.1-s1"]
    assert first.params == second.params and "seed" not in first.params
    variant = {"group": "ppo-0.1", "method": "ppo", "beta": 0.1, "learning_rate": 5e-4, "seed": 1}
    assert both["compare"].params["variants"]["ppo-0.1-s1"] == variant


def test_learning_rates_are_an_axis() -> None:
    config = swept("dpo,ppo", "0.1", "0", learning_rates="3e-6,1e-6")
    assert list(config.align) == [
        f"{method}-0.1-lr{rate}-s0" for method in ("dpo", "ppo") for rate in ("1e-06", "3e-06")
    ]
    assert [method.learning_rate for method in config.align.values()] == [1e-6, 3e-6] * 2
    variants = nodes(config)["compare"].params["variants"]
    assert [variant["group"] for variant in variants.values()] == [name.removesuffix("-s0") for name in config.align]


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ("1e-6,fast", "--learning-rate = fast: this is not a number"),
        ("0", "--learning-rate = 0: dpo takes no such rate: it must be greater than 0. Fix: give numbers"),
        ("1e20", "--learning-rate = 1e+20: it must be less than 1e15"),
        ("1e-6,1e-6", "--learning-rate = 1e-6,1e-6: the list is empty or names something twice"),
    ],
)
def test_learning_rates_that_cannot_be_are_named(rates: str, words: str) -> None:
    with pytest.raises(StageError) as caught:
        swept("dpo", "0.1", "0", learning_rates=rates)
    assert str(caught.value).startswith(words)


def test_another_beta_leaves_all_other_stages_as_they_are() -> None:
    few, more = nodes(swept(beta="0.1")), nodes(swept(beta="0.1,0.3"))
    assert {name for name in few if few[name] != more[name]} == {"compare"}
    assert {more[name].stage for name in more.keys() - few.keys()} == {"align", "evaluate"}
    assert {settings["method"] for settings in more["budget"].params["methods"]} == {"dpo", "kto", "ppo"}
    assert more["budget"].inputs["evaluation"] == ("eval sft", "evaluation")


def test_an_unset_limit_is_not_in_the_request() -> None:
    """So a config without one has the keys that it had before there was one."""
    assert not {"train_tokens", "seed"} & params_of(methods.DPO(seed=3)).keys()
    assert "value_start" not in params_of(methods.PPO())
    assert params_of(methods.PPO(value_start="zero"))["value_start"] == "zero"
    assert "value_warmup_share" not in params_of(methods.PPO())
    assert params_of(methods.PPO(value_warmup_share=0.5))["value_warmup_share"] == 0.5
    assert params_of(SFTConfig(train_tokens=9))["train_tokens"] == 9


def test_all_runs_carry_the_sweeps_tag() -> None:
    config = swept("dpo", "0.1", "0")
    assert requests.request_for(nodes(config)["base"], config, {}).tags["sweep"] == "demo"


def test_a_comparison_is_told_the_spread_of_the_reward_models_scores() -> None:
    made = nodes(swept("dpo,ppo", "0.1", "0"))
    outputs = {output: Artifact(uri=output, sha256=output) for output in ("evaluation", "baselines")}
    results = {
        name: Result(status="done", key=name, outputs=outputs, metrics=metrics)
        for name, metrics in {**{key: {} for key in made}, "reward": {"data/score_std": 1.7}}.items()
    }
    request = requests.request_for(made["compare"], swept("dpo,ppo", "0.1", "0"), results)
    assert request.params["score_std"] == 1.7 and request.params["chosen"] == "by these numbers"
    plain = PipelineConfig.model_validate(swept("dpo", "0.1", "0").model_dump() | {"sweep": None})
    assert "score_std" not in requests.request_for(nodes(plain)["compare"], plain, results | {}).params


# --- the test part ---

TESTED = "data.sft.test_fraction=0.2"


def test_the_last_test_takes_the_memory_of_an_evaluation(ready_home: Path) -> None:
    told = dry_run.as_json(sweep.load("demo", (TESTED,), "dpo", "0.1", "0"))
    assert told["test sft"]["bytes"] == told["eval sft"]["bytes"] is not None


def test_a_sweep_with_a_test_part_evaluates_its_winner_there_and_nothing_else_looks_at_it() -> None:
    planned = sweep.load("demo", [TESTED], "dpo", "0.1,0.3", "0,1")
    assert planned.nodes["data sft"].params["min_test_prompts"] == planned.config.evaluate.min_prompts
    tests = last_test(planned, ["dpo-0.3-s0", "dpo-0.3-s1"])
    assert tests is not None and list(tests.nodes) == ["test dpo-0.3-s0", "test dpo-0.3-s1"]
    node, usual = tests.nodes["test dpo-0.3-s1"], planned.nodes["eval dpo-0.3-s1"]
    assert (node.params, usual.params) == (usual.params | {"part": "test"}, usual.params | {"part": "eval"})
    assert node.inputs["baseline"] == ("test sft", "evaluation") and "pairs" not in node.inputs
    looking = {name for name, one in planned.nodes.items() if one.params.get("part") == "test"}
    assert looking == {"test sft"} and not looking & planned.nodes["compare"].needs
    assert planned.nodes["compare"].params["chosen"] == "tested"
    plain = sweep.load("demo", [], "dpo", "0.1,0.3", "0,1")
    assert last_test(plain, ["dpo-0.3-s0"]) is None and "test sft" not in plain.nodes
    run = plan(PipelineConfig.model_validate(planned.config.model_dump() | {"sweep": None}))
    assert "test sft" not in run.nodes and run.nodes["data sft"].params["min_test_prompts"] == 0


def test_the_winner_is_that_of_the_highest_mean_and_its_test_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    points = [
        {"judge_score": score, "models": [f"{name}-s0", f"{name}-s1"]} for name, score in (("a", 1.0), ("b", 2.0))
    ]
    (tmp_path / "frontier.json").write_text(json.dumps(points))
    monkeypatch.setattr("stages.tracking.fetch", lambda artifact: tmp_path)
    made = {"compare": Result(status="done", key="k", outputs={"comparison": Artifact(uri="u", sha256="s")})}
    assert sweep.winner(made) == ["b-s0", "b-s1"]
    assert sweep.test_text(made) == ""
    for model, score, rate in (("sft", 1.0, 0.5), ("b-s0", 2.0, 0.6), ("b-s1", 3.0, 0.7)):
        measured = {"judge_score": score, "win_rate_vs_sft": rate, "win_rate_vs_sft_low": rate - 0.1, "prompts": 120}
        measured |= {"win_rate_vs_sft_high": rate + 0.1}
        metrics = {f"eval/{name}": value for name, value in measured.items()}
        made[f"test {model}"] = Result(status="done", key="k", metrics=metrics)
    said = sweep.test_text(made).splitlines()
    assert "120 prompts that chose nothing (mean of 2 seeds): judge score 2.50" in said[0]
    assert "of the SFT model 1.00; win rate 65 %" in said[0] and said[-1] == "  b-s1: score 3.00, 70 % [60, 80]"


# --- equal tokens ---

COMMON: dict[str, Any] = {"batch_size": 4, "learning_rate": 1e-3, "checkpoint_steps": 2, "warmup": 0.0}
ROLLOUTS: dict[str, Any] = {"iterations": 1, "rollout_size": 8, "ppo_epochs": 2, "max_new_tokens": 6}
SETTINGS: dict[str, MethodConfig] = {
    "dpo": methods.DPO(**COMMON),
    "kto": methods.KTO(**COMMON),
    "ppo": methods.PPO(**COMMON, **ROLLOUTS, schedule="linear"),
}
TOKENS = 700


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    model = models.model_folder(folder / "model")
    save_scorer(load_scorer(model, seed=4), Codec.load(model), folder / "reward", mean=0.1, std=0.5)
    kinds: dict[str, Any] = {"preference": models.rows(20, *models.PAIRS), "feedback": models.rows(20, *models.THUMBS)}
    data = models.data_folder(folder / "data", **kinds, prompt=models.rows(20, {}))
    return {"model": model, "reward": folder / "reward", "data": data}


class Limited:
    """A method's training under the token limit, in a folder."""

    def __init__(self, name: str, work: Path, inputs: dict[str, Path]) -> None:
        self.config = SETTINGS[name].model_copy(update={"train_tokens": TOKENS})
        self.run = MemoryContext(work, self.config, inputs, seed=5)
        self.method: Any = align.METHODS[name](self.config, self.run)
        self.seen: list[float] = []
        """Training tokens of each step."""

    def train(self, stop_at: int | None = None) -> dict[str, float]:
        after_step = self.method.after_step

        def watched(metrics: dict[str, float]) -> dict[str, float]:
            self.seen.append(metrics["compute/train_tokens"])
            if len(self.seen) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return after_step(metrics)

        self.method.after_step = watched
        return train(self.method, self.run)

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.method.policy.parameters()]


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("name", SETTINGS)
def test_the_step_that_reaches_the_limit_is_the_last_also_after_a_resume(
    name: str, inputs: dict[str, Path], tmp_path: Path
) -> None:
    whole = Limited(name, tmp_path / "whole", inputs)
    cost = whole.train()
    assert sum(whole.seen[:-1]) < TOKENS <= sum(whole.seen) == cost["compute/train_tokens"]

    with pytest.raises(StageError, match=rf"stopped after \d+ of {TOKENS} tokens, saved"):
        Limited(name, tmp_path / "cut", inputs).train(stop_at=3)
    resumed = Limited(name, tmp_path / "cut", inputs)
    assert resumed.train()["compute/train_tokens"] == cost["compute/train_tokens"]
    assert resumed.seen == whole.seen[3:]
    assert all(map(torch.equal, whole.weights(), resumed.weights()))


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_the_schedule_runs_over_the_tokens(name: str, inputs: dict[str, Path], tmp_path: Path) -> None:
    limited = Limited(name, tmp_path, inputs)
    limited.train()
    before = [sum(limited.seen[:step]) / TOKENS for step in range(len(limited.seen))]
    cosine = name == "dpo"
    factors = [0.5 * (1 + math.cos(math.pi * done)) if cosine else 1 - done for done in before]
    assert limited.run.steps("train/learning_rate") == pytest.approx([1e-3 * factor for factor in factors])


def test_how_many_steps_a_limit_means_is_not_known_before() -> None:
    assert memory.steps(methods.DPO(train_tokens=100), 1000) is None
    assert memory.steps(methods.PPO(train_tokens=100), None) is None


def test_a_limit_is_end_enough() -> None:
    assert swept("dpo", "0.1", "0", "align.dpo={epochs: null, batch_size: 8}", tokens=100).align


@pytest.mark.usefixtures("home")
def test_the_budget_is_the_least_that_a_method_sees_by_itself(inputs: dict[str, Path], tmp_path: Path) -> None:
    row = Sample([{"role": "user", "content": "a"}], "yes", 1.0, "no", 0.0, 1.0, 3, 1, True, 0.0)
    (tmp_path / "evaluation").mkdir()
    Evaluation({}, [row], {}).save(tmp_path / "evaluation")
    own = [methods.DPO(batch_size=4, epochs=2), methods.PPO(**ROLLOUTS, batch_size=4)]
    folders = {"model": inputs["model"], "evaluation": tmp_path / "evaluation"}
    folders |= {kind: inputs["data"] for kind in ("preference", "prompt")}
    params: Any = {"methods": [config.model_dump(mode="json", exclude={"seed"}) for config in own]}
    run = MemoryContext(tmp_path / "work", params, folders, stage="budget")
    found = budget.run(run)

    codec = Codec.load(inputs["model"])
    prompts = [codec.prompt(r["prompt"]) for r in models.rows(20, {})]
    pairs = models.rows(20, *models.PAIRS)
    answers = [len(codec.answer(r["chosen"])) + len(codec.answer(r["rejected"])) for r in pairs]
    mean = fmean(len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True))
    assert found["budget/own_dpo"] == round(mean * 4 * 10)  # 20 rows twice in batches of 4
    assert found["budget/own_ppo"] == round(8 * 2 * (fmean(map(len, prompts)) + 3 + 1))  # 3 tokens and the end
    least = min(found["budget/own_dpo"], found["budget/own_ppo"])
    published = run.published["budget"] / align.BUDGET
    assert json.loads(published.read_text()) == {"train_tokens": least}
    assert least == found["budget/train_tokens"]


@pytest.mark.usefixtures("home")
def test_a_method_trains_on_the_budget_that_it_is_given(inputs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "budget").mkdir()
    (tmp_path / "budget" / align.BUDGET).write_text(json.dumps({"train_tokens": 123}))
    run = MemoryContext(tmp_path / "work", methods.DPO(), {**inputs, "budget": tmp_path / "budget"})
    assert align.within_budget(methods.DPO(beta=0.3), run) == methods.DPO(beta=0.3, train_tokens=123)


def test_other_training_is_bound_by_tokens_too() -> None:
    assert Training(epochs=None, train_tokens=5).train_tokens == 5
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Training(train_tokens=0)


# --- Prefect's page ---


def test_a_run_does_not_fail_for_want_of_an_artifact(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*arguments: Any, **named: Any) -> None:
        raise ConnectionError("the server is away")

    monkeypatch.setattr(announce, "create_markdown_artifact", away)
    monkeypatch.setattr(announce, "get_run_logger", lambda: logging.getLogger("alignflow"))
    announce.show_in_prefect("a table", {})
    assert "Prefect does not show the comparison: the server is away" in caplog.text
