"""The plan: which stages a config leads to, fed by what; and what is missing, said before anything runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.planning import config_file, dry_run
from flows.planning.plan import Node, plan, promotion
from flows.planning.requests import request_for
from schemas.config import PipelineConfig
from schemas.errors import StageError
from schemas.stage import Request

PAIRS = {"path": "pairs.jsonl", "kind": "preference", "gold_fraction": 0.4}
DEMO = {"sft": {"path": "demo:sft", "kind": "sft"}, "prompt": {"path": "demo:prompt", "kind": "prompt"}}
ALL = {"dpo": {}, "kto": {}, "ppo": {}}


def nodes(**config: Any) -> dict[str, Node]:
    config = {"name": "test", "model": {"path": "/model"}, "align": ALL, **config}
    planned = plan(PipelineConfig.model_validate(config)).nodes
    done: set[str] = set()
    for name, node in planned.items():  # an order in which they can run
        assert node.name == name and node.needs <= done
        done.add(name)
    return planned


def error(**config: Any) -> str:
    with pytest.raises(StageError) as caught:
        nodes(**config)
    assert caught.value.problem.fix
    return str(caught.value)


def test_pairs_feed_everything() -> None:
    made = nodes(data={"preference": PAIRS})
    data = ("data preference", "data")
    assert list(made)[:3] == ["base", "data preference", "sft"]
    assert made["data preference"].inputs == {"model": ("base", "model")}
    assert made["sft"].inputs == {"model": ("base", "model"), "data": data}
    assert made["reward"].inputs == {"model": ("sft", "model"), "data": data}
    assert made["reward"].params["rows"] == "train"
    for name in ("dpo", "kto"):
        assert made[name].inputs == {"model": ("sft", "model"), "data": data}
    assert made["ppo"].inputs == {"model": ("sft", "model"), "data": data, "reward": ("reward", "model")}
    seen = {"data": data, "pairs": data, "reward": ("reward", "model"), "reference": ("sft", "model")}
    assert made["eval sft"].inputs == {"model": ("sft", "model"), **seen}
    for name in ("base", "dpo", "kto", "ppo"):
        baseline = ("eval sft", "evaluation")
        assert made[f"eval {name}"].inputs == {"model": (name, "model"), "baseline": baseline, **seen}
    assert made["compare"].inputs == {
        **{name: (f"eval {name}", "evaluation") for name in ("base", "sft", "dpo", "kto", "ppo")},
        "baselines": ("baselines", "baselines"),
    }
    sft = ("sft", "model")
    assert made["baselines"].inputs == {"model": sft, "reference": sft, "data": data, "reward": ("reward", "model")}
    # Neither changes the other's key: temperatures are the baselines' own, and evaluations know no baselines.
    assert made["baselines"].params["temperatures"] == [0.7, 0.5, 0.3] and made["baselines"].params["best_of"]
    assert "baselines" not in made["eval sft"].params and "temperatures" in made["eval sft"].params
    assert [node.stage for node in made.values()].count("validate") == 1


def test_only_the_data_that_is_evaluated_on_must_hold_out_enough() -> None:
    made = nodes(data=DEMO, generate={"judge": "rule"}, evaluate={"judge": "rule", "min_prompts": 7})
    asked = {name: node.params.get("min_eval_prompts", 0) for name, node in made.items() if node.stage == "validate"}
    assert asked == {"data prompt": 7, "data sft": 0, "data generated": 0}


def test_too_few_prompts_are_a_warning_unless_a_gate_needs_them() -> None:
    """And what happens then changes no key: a run that was made under another setting is reused."""
    made = nodes(data=DEMO, generate={"judge": "rule"})
    assert made["data prompt"].params["few_prompts"] == "warn"
    strict = nodes(data=DEMO, generate={"judge": "rule"}, evaluate={"few_prompts": "refuse"})
    assert strict["data prompt"].params["few_prompts"] == "refuse"
    gated = nodes(data=DEMO, generate={"judge": "rule"}, promote={"model": "m"})["data prompt"]
    assert gated.params["few_prompts"] == "refuse" and gated.params["min_eval_prompts"] == 400
    for name in ("data prompt", "eval sft", "baselines"):
        node = made[name]
        keys = {
            Request(stage=node.stage, version=1, params=node.params | {"few_prompts": what}).key()
            for what in ("warn", "refuse")
        }
        assert len(keys) == 1 and "few_prompts" in node.params


def test_a_dry_run_says_that_few_prompts_will_be_held_out(tmp_path: Path) -> None:
    """300 lines, of which an eighth is held out: 38 prompts at most."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "p", "response": "r"}\n' * 300)
    data = {"sft": {"path": str(file), "kind": "sft", "eval_fraction": 0.125}}
    config: dict[str, Any] = {"name": "test", "model": {"path": "/model"}, "align": {}, "data": data}

    def said(**more: Any) -> list[str]:
        planned = plan(PipelineConfig.model_validate(config | more))
        return dry_run.few_prompts({n: dry_run.Outlook(node, "run") for n, node in planned.nodes.items()})

    (line,) = said()
    assert line.startswith("at most about 38 prompts will be held out, 100 are asked for: differences will be hard")
    assert "it will be refused" in said(evaluate={"few_prompts": "refuse"})[0]
    assert said(evaluate={"min_prompts": 38}) == [] and said(data=DEMO) == []


def test_generated_preferences() -> None:
    made = nodes(data=DEMO, generate={"noise": 0.5, "judge": "rule"})
    assert made["data prompt"].inputs == {"model": ("base", "model")}
    assert made["data sft"].inputs == {"model": ("base", "model"), "evaluation": ("data prompt", "data")}
    assert made["generate"].inputs == {"model": ("sft", "model"), "data": ("data prompt", "data")}
    rows = made["data generated"]
    assert rows.params["path"] == "input:rows" and rows.params["kind"] == "ranking"
    assert rows.params["eval_fraction"] == made["data prompt"].params["eval_fraction"]
    assert rows.inputs["rows"] == ("generate", "rows") and rows.inputs["evaluation"] == ("data prompt", "data")
    for name in ("reward", "dpo", "kto"):
        assert made[name].inputs["data"] == ("data generated", "data")
    assert made["ppo"].inputs["data"] == ("data prompt", "data")
    assert made["eval ppo"].inputs["pairs"] == ("data generated", "data")


def test_prompts_of_the_sft_rows_are_answered_when_no_others_are_there() -> None:
    made = nodes(data={"sft": DEMO["sft"]}, generate={})
    assert made["generate"].inputs["data"] == made["ppo"].inputs["data"] == ("data sft", "data")


def test_slots_of_their_own() -> None:
    feedback = {"path": "thumbs.jsonl", "kind": "feedback"}
    evaluation = {"path": "questions.jsonl", "kind": "prompt"}
    made = nodes(data={**DEMO, "preference": PAIRS, "feedback": feedback, "evaluation": evaluation})
    assert made["data evaluation"].params["eval_fraction"] == 1.0
    assert "evaluation" not in made["data evaluation"].inputs
    for slot in ("sft", "preference", "feedback", "prompt"):
        assert made[f"data {slot}"].inputs["evaluation"] == ("data evaluation", "data")
    used = {name: made[name].inputs["data"][0] for name in ("sft", "reward", "dpo", "kto", "ppo", "eval ppo")}
    assert used == {
        "sft": "data sft",
        "reward": "data preference",
        "dpo": "data preference",
        "kto": "data feedback",
        "ppo": "data prompt",
        "eval ppo": "data evaluation",
    }


def test_what_nobody_needs_is_not_planned() -> None:
    feedback = {"path": "thumbs.jsonl", "kind": "feedback"}
    made = nodes(data={"preference": PAIRS, "feedback": feedback}, align={"dpo": {}}, reward=None, gold={})
    assert not {"data feedback", "reward", "gold"} & set(made)


def test_gold_judges() -> None:
    made = nodes(data={"preference": PAIRS}, gold={"epochs": 2}, evaluate={"judge": "reward"})
    gold, reward = made["gold"], made["reward"]
    assert gold.params["rows"] == "gold" and gold.params["epochs"] == 2
    assert gold.seed != reward.seed and gold.inputs == reward.inputs
    assert made["eval dpo"].inputs["judge"] == ("gold", "model")
    assert made["eval dpo"].inputs["reward"] == ("reward", "model")


def test_models_of_ones_own() -> None:
    judge = {"judge": "reward", "model": "/judge"}
    made = nodes(data={"preference": PAIRS}, sft=None, reward_model="/reward", evaluate={"judge": judge})
    assert "sft" not in made and "eval base" not in made
    assert made["dpo"].inputs["model"] == made["eval sft"].inputs["model"] == ("base", "model")
    assert made["reward"].stage == made["judge"].stage == "base"
    assert made["reward"].params["path"] == "/reward" and made["judge"].params["path"] == "/judge"
    assert made["eval dpo"].inputs["judge"] == ("judge", "model")


def test_a_dry_run_counts_no_steps_of_a_reward_model_of_ones_own() -> None:
    raw = {"name": "test", "model": {"path": "/model"}, "align": ALL, "data": {"preference": PAIRS}}
    planned = plan(PipelineConfig.model_validate({**raw, "reward_model": "/reward"}))
    assert dry_run.training_of(planned.nodes["reward"], planned.config) is None
    assert dry_run.training_of(planned.nodes["sft"], planned.config) == planned.config.sft


def test_methods_by_other_names() -> None:
    align = {"dpo": {"beta": 0.3}, "dpo-low": {"method": "dpo", "beta": 0.01, "learning_rate": 1e-3}}
    made = nodes(data={"preference": PAIRS}, align=align)
    low = made["eval dpo-low"]
    assert low.model == "dpo-low" and low.tags == {"method": "dpo"}
    assert low.about == {"method": "dpo", "seed": "0", "beta": "0.01", "learning_rate": "0.001"}
    assert made["eval base"].about == {"method": "base", "seed": "0"}


def test_only_the_changed_method_changes() -> None:
    before = nodes(data={"preference": PAIRS})
    after = nodes(data={"preference": PAIRS}, align={**ALL, "dpo": {"beta": 0.5}})
    assert {name for name in before if before[name].params != after[name].params} == {"dpo"}


def test_devices_are_for_training() -> None:
    made = nodes(data={"preference": PAIRS}, devices=2)
    assert {name for name, node in made.items() if node.devices == 2} == {"sft", "reward", "dpo", "kto", "ppo"}
    placed = nodes(data={"preference": PAIRS}, nodes=3)
    assert {name for name, node in placed.items() if node.nodes == 3} == {"sft", "reward", "dpo", "kto", "ppo"}


def test_copies_of_weights_are_placement_and_divide_the_devices() -> None:
    raw = {"name": "a", "model": {"scratch": {}}, "data": {"preference": PAIRS}, "align": ALL}
    config = PipelineConfig.model_validate({**raw, "devices": 4, "replicas": 2})
    node = plan(config).nodes["base"]
    copies = request_for(replace(node, devices=4), config, {})
    one = request_for(replace(node, devices=4), config.model_copy(update={"replicas": 1}), {})
    assert (copies.placement.replicas, one.placement.replicas) == (2, 1) and copies.key() == one.key()
    with pytest.raises(StageError, match=r"replicas = 3: .* Fix: set it to a divisor of nodes x devices \(4\)"):
        plan(config.model_copy(update={"replicas": 3}))


SFT_ONLY = {"sft": DEMO["sft"]}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"data": SFT_ONLY, "align": {"dpo": {}}}, "align.dpo = set: needs preference data, which nothing gives."),
        ({"data": SFT_ONLY, "align": {"kto": {}}}, "align.kto = set: needs feedback data, which nothing gives."),
        ({"data": SFT_ONLY, "align": {"ppo": {}}}, "align.ppo = set: needs a reward model, and there are no"),
        (
            {"data": {"preference": PAIRS}, "reward": None},
            "align.ppo = set: needs a reward model, and `reward` is null",
        ),
        (
            {"data": {"preference": {"path": "a", "kind": "sft"}}, "align": {"dpo": {}}},
            "data.preference.kind = sft: align.dpo needs rows of kind preference",
        ),
        ({"data": {"prompt": DEMO["prompt"]}, "align": {}}, "sft = set: needs sft data"),
        ({"data": {}, "align": {}, "sft": None}, "data.evaluation = null: there are no prompts"),
        ({"data": {"preference": PAIRS}, "generate": {}}, "generate = set: preferences are both given and generated"),
        ({"data": DEMO, "generate": {"judge": None}}, "generate.judge = null: answers that people rank end a pipeline"),
        (
            {"data": DEMO, "generate": {"judge": "reward"}},
            "generate.judge.model = gold: the gold model is trained after",
        ),
        (
            {"data": {"preference": PAIRS}, "evaluate": {"judge": "reward"}},
            "gold = null: no gold reward model is trained",
        ),
        (
            {
                "data": {"preference": {**PAIRS, "gold_fraction": 0}},
                "evaluate": {"judge": "reward"},
                "gold": {},
            },
            "data.preference.gold_fraction = 0: the gold reward model has no rows",
        ),
        (
            {"data": DEMO, "generate": {}, "evaluate": {"judge": "reward"}, "gold": {}},
            "data.preference = null: the gold",
        ),
        ({"data": {"preference": PAIRS}, "align": {"reward": {"method": "dpo"}}}, "align = reward: this name"),
        ({"data": {"preference": PAIRS}, "align": {"a b": {"method": "dpo"}}}, "align = a b: this name"),
    ],
)
def test_what_is_missing_is_named(config: dict[str, Any], words: str) -> None:
    assert error(**config).startswith(words)


# --- seeds ---


def test_every_method_is_trained_once_per_seed_from_one_start() -> None:
    given: dict[str, Any] = {"data": {"preference": PAIRS}}
    one, three = nodes(**given), nodes(**given, seeds=[4, 0, 2])
    align = [node for node in three.values() if node.stage == "align"]
    assert [node.name for node in align] == [f"{name}-s{seed}" for name in ("dpo", "kto", "ppo") for seed in (4, 0, 2)]
    for node in align:
        name, _, seed = node.name.rpartition("-s")
        assert node == replace(one[name], name=node.name, model=node.name, seed=int(seed)), "nothing else differs"
        assert three[f"eval {node.name}"].seed == one["eval dpo"].seed
        assert three[f"eval {node.name}"].about["seed"] == seed
    shared = [name for name in one if not {"dpo", "kto", "ppo"} & set(name.split()) and name != "compare"]
    assert all(three[name] == one[name] for name in shared) and "reward" in shared
    variants = three["compare"].params["variants"]
    groups = {name: (variant["group"], variant["seed"]) for name, variant in variants.items()}
    assert groups == {node.name: (node.name.rpartition("-s")[0], node.seed) for node in align}
    assert "variants" not in one["compare"].params


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seeds": [1, 1]}, "seeds = [1, 1]: a seed stands twice"),
        ({"seeds": [0], "align": {"dpo": {"seed": 3}}}, "align.dpo.seed = 3: `seeds` sets the seed of every method"),
        ({"seeds": [0], "align": {"a" * 62: {"method": "dpo"}}}, "align = "),
    ],
)
def test_seeds_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    assert error(data={"preference": PAIRS}, **settings).startswith(words)


def test_of_several_seeds_the_first_is_the_candidate_unless_another_is_named() -> None:
    """Not the best: it would be chosen on the prompts that the gate judges by."""
    for named, model in ((None, "dpo-s5"), ("dpo", "dpo-s5"), ("dpo-s1", "dpo-s1")):
        given: dict[str, Any] = {"data": {"preference": PAIRS}, "align": {"dpo": {}}, "seeds": [5, 1]}
        config = {"name": "test", "model": {"path": "/model"}, **given, "promote": {"candidate": named}}
        judging = promotion(plan(PipelineConfig.model_validate(config)), champion=False)
        promote = judging.nodes["promote"]
        assert promote.about["candidate"] == model
        assert judging.nodes[promote.inputs["candidate"][0]].inputs["model"] == (model, "model")
    assert "promote.candidate = dpo-s7" in error(**{**given, "promote": {"candidate": "dpo-s7"}})


# --- what data holds out ---


def test_all_data_leaves_out_what_any_holds_out() -> None:
    """`data.evaluation` apart, of which the other data leaves out what it has in common with it."""
    held = {"sft": 0.2, "preference": 0.1, "prompt": 0.0, "evaluation": 0.5}
    test = {"sft": 0.0, "preference": 0.05, "prompt": 0.0, "evaluation": 0.25}
    kinds = {"sft": "sft", "preference": "preference", "prompt": "prompt", "evaluation": "prompt"}
    data = {
        slot: {"path": f"{slot}.jsonl", "kind": kind, "eval_fraction": held[slot], "test_fraction": test[slot]}
        for slot, kind in kinds.items()
    }
    made = nodes(data=data)
    for slot in kinds:
        params = made[f"data {slot}"].params
        assert (params["others_eval_fraction"], params["others_test_fraction"]) == (0.2, 0.05)
        assert params["test_fraction"] == test[slot]
    assert made["data evaluation"].params["eval_fraction"] == 0.75, "all but the test part"
    sft = {"path": "a.jsonl", "kind": "sft", "test_fraction": 0.3}
    assert nodes(data={"sft": sft}, generate={})["data generated"].params["test_fraction"] == 0.3


# --- presets, and what a plain run does not need ---


@pytest.mark.parametrize("preset", config_file.presets())
def test_each_preset_can_be_planned_and_without_any_method_too(preset: str) -> None:
    given = ["model.path=/model", "data.preference.path=/pairs.jsonl"] if preset == "tinystories" else []
    given += ["data.preference.path=/pairs.jsonl"] if preset == "smollm2" else []
    for methods in ([], ["align={}"]):
        raw = config_file.raw_of(preset, [*given, *methods])
        assert "compare" in plan(PipelineConfig.model_validate(raw)).nodes


def test_a_plain_run_need_not_say_who_the_candidate_is_and_a_retraining_must() -> None:
    config = {"name": "test", "model": {"path": "/model"}, "data": {"preference": PAIRS}, "align": ALL, "promote": {}}
    planned = plan(PipelineConfig.model_validate(config))
    with pytest.raises(StageError, match=r"promote\.candidate = null: align has dpo, kto, ppo"):
        promotion(planned, champion=False)
    assert "promote.candidate = dpoo" in error(**{**config, "promote": {"candidate": "dpoo"}})


def test_models_are_held_against_baselines_at_temperature_1_alone() -> None:
    """A config for another single temperature, as of before there were several, still leads to its comparison."""
    for evaluate, held in (({}, True), ({"temperatures": [0.3, 1]}, True), ({"temperature": 0.7}, False)):
        made = nodes(data={"preference": PAIRS}, evaluate=evaluate)
        assert ("baselines" in made, "baselines" in made["compare"].inputs) == (held, held)


def test_who_asks_an_endpoint_about_two_models_has_its_address_from_the_config() -> None:
    judge = {"judge": "endpoint", "url": "http://127.0.0.1:9/v1", "model": "m"}
    for given, asked in ((judge, True), ("rule", False)):
        config: dict[str, Any] = {"name": "test", "model": {"path": "/model"}, "align": {"dpo": {}}}
        config |= {"data": {"preference": PAIRS}, "evaluate": {"judge": given}}
        planned = plan(PipelineConfig.model_validate(config))
        promote = promotion(planned, champion=True).nodes["promote"]
        for node in (planned.nodes["compare"], promote):
            assert ("judge" in node.params) == asked
            assert not asked or node.params["judge"]["url"] == judge["url"]


def test_the_data_that_sft_learns_from_knows_which_turns() -> None:
    """Only there do weights of earlier turns count; other data, and a run without SFT, stay as they are."""
    answers = {"path": "demo:sft", "kind": "sft"}
    made = nodes(data={"sft": answers, "preference": PAIRS}, sft={"learn": "all"})
    assert made["data sft"].params["learn"] == made["sft"].params["learn"] == "all"
    assert "learn" not in made["data preference"].params
    derived = nodes(data={"preference": PAIRS}, sft={"learn": "all"})
    assert derived["data preference"].params["learn"] == "all"
    assert "learn" not in nodes(data={"preference": PAIRS}, sft=None)["data preference"].params
