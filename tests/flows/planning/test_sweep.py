"""Sweeps: their variants, equal training tokens with exact resume, and the frontier over seeds."""

import json
import logging
import math
import os
import signal
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch

from flows.planning import memory, requests, sweep
from flows.planning.plan import Node, params_of, plan
from flows.results import announce
from schemas import methods
from schemas.config import PipelineConfig, SFTConfig
from schemas.errors import StageError
from schemas.methods import MethodConfig
from schemas.training import Training
from stages import align, budget, compare
from stages.compare import frontier
from stages.compare.page import render_html
from stages.compare.table import Comparison
from stages.engine.data.codec import Codec
from stages.engine.models.loading import load_scorer
from stages.engine.models.saving import save_scorer
from stages.engine.scoring.evaluation_record import Evaluation, Sample
from stages.engine.training.loop import train
from tests.stages.test_compare import Page, evaluation
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
    assert params_of(SFTConfig(train_tokens=9))["train_tokens"] == 9


def test_all_runs_carry_the_sweeps_tag() -> None:
    config = swept("dpo", "0.1", "0")
    assert requests.request_for(nodes(config)["base"], config, {}).tags["sweep"] == "demo"


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

    with pytest.raises(StageError, match=rf"stopped by SIGTERM after \d+ of {TOKENS} tokens"):
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


# --- the frontier ---


def row(method: str, beta: float, seed: int, score: float, kl: float) -> dict[str, Any]:
    named = {"model": f"{method}-{beta}-s{seed}", "method": method, "beta": beta, "seed": seed}
    return named | {
        "judge_score": score,
        "kl_to_reference": kl,
        "kl_to_reference_se": 0.1,
        "win_rate_vs_sft": score / 4,
    }


TABLE = [
    {"model": "sft", "judge_score": 1.0, "kl_to_reference": 0.0, "kl_to_reference_se": 0.0, "win_rate_vs_sft": 0.5},
    row("ppo", 0.3, 0, 2.0, 3.0),
    row("ppo", 0.3, 1, 2.4, 3.6),
    row("ppo", 0.3, 2, 2.5, 3.3),
    row("ppo", 0.05, 0, 3.0, 9.0),
    row("dpo", 0.1, 0, 2.0, 5.0),
    row("dpo", 0.1, 1, 2.2, 5.0),
]


def test_points_are_means_with_standard_errors_over_the_seeds() -> None:
    low, high, dpo = frontier.points(TABLE)
    assert [(p["method"], p["beta"], p["seeds"]) for p in (low, high, dpo)] == [
        ("ppo", 0.05, [0]),
        ("ppo", 0.3, [0, 1, 2]),
        ("dpo", 0.1, [0, 1]),
    ]
    assert high["judge_score"] == pytest.approx(2.3) and high["kl_to_reference"] == pytest.approx(3.3)
    assert high["judge_score_se"] == pytest.approx(stdev([2.0, 2.4, 2.5]) / math.sqrt(3))
    assert low["judge_score_se"] is None and dpo["kl_to_reference_se"] == 0.0
    # DPO scores 2.1 at distance 5, PPO more at less.
    assert [p["on_frontier"] for p in (low, high, dpo)] == [True, True, False]
    assert frontier.points(TABLE[:1]) == []


def test_the_frontier_in_words_and_pictures() -> None:
    points = frontier.points(TABLE)
    lines = frontier.render_text(points).splitlines()
    assert len(lines) == 2 + 3 + 1 and "standard error over the seeds" in lines[-1]
    assert "2.30 ± 0.15" in lines[3] and "3.30 ± 0.17" in lines[3] and lines[3].endswith("yes")
    assert "±" not in lines[2]
    said = frontier.headline(points)
    assert said.startswith("The highest mean judge score is that of ppo at beta 0.05: 3.00, at KL 9.00.")
    assert said.endswith("from near to far: ppo 0.3, ppo 0.05.")
    light, dark = frontier.draw(points, TABLE), frontier.draw(points, TABLE, dark=True)
    assert light.startswith(b"\x89PNG") and light != dark
    page = Page(render_html(Comparison(TABLE, prompts=[], answers={}, judge="a rule")))
    assert (
        page.tags.count("tr") == (1 + 3) + (1 + len(TABLE))
        and page.tags.count("img") == 1
        and "2.30 ± 0.15" in page.text
    )


def test_the_comparison_of_a_sweep_has_the_frontier(tmp_path: Path) -> None:
    variants: Any = {
        f"dpo-{beta}-s{seed}": {"method": "dpo", "beta": beta, "seed": seed} for beta in (0.1, 0.3) for seed in (0, 1)
    }
    given = {name: evaluation(1.0 + v["beta"] + v["seed"], 0.7, 2.0, answer=name) for name, v in variants.items()}
    folders = {}
    others = {"champion": evaluation(0.5, 0.6, 1.0), "sft": evaluation(0.0, 0.5, 0.0)}
    for name, value in {**given, **others}.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        value.save(folders[name])
    run = MemoryContext(tmp_path / "work", {"variants": variants}, folders, stage="compare")
    compare.run(run)
    comparison = run.published["comparison"]

    points = json.loads((comparison / "frontier.json").read_text())
    assert [point["models"] for point in points] == [["dpo-0.1-s0", "dpo-0.1-s1"], ["dpo-0.3-s0", "dpo-0.3-s1"]]
    # judge_score of `evaluation(score)` is score + 1.5: 2.6 and 3.6, then 2.8 and 3.8.
    assert [point["judge_score"] for point in points] == pytest.approx([3.1, 3.3])
    table = json.loads((comparison / "table.json").read_text())
    assert [r["model"] for r in table] == ["sft", *variants, "champion"] and table[2]["seed"] == 1
    assert (comparison / "table.txt").read_text().startswith("Method")
    page = Page((comparison / "report.html").read_text())
    assert "The highest mean judge score is that of dpo at beta 0.3: 3.30 ± 0.50" in page.text
    assert "dpo-0.3-s0 0" in page.text and "dpo-0.3-s1 0" not in page.text, "answers of the first seed"
    assert page.tags.count("img") == 1


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
