"""From a config to the stages that run: a pure function, no files, no servers.

    base -> data * -> sft -> [generate -> data generated] -> reward, gold -> [budget] -> align * -> eval * -> compare
    [baselines] -> compare
    retraining, after these: -> eval champion -> promote

A node is planned when something needs it; what a method needs and nothing gives is an error here, before anything runs.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from flows.planning import plan_checks
from flows.planning.nodes import Node, Output, Plan, params_of, variants_of
from schemas.config import (
    BaselinesParams,
    EndpointJudge,
    ModelConfig,
    PipelineConfig,
    RewardConfig,
    RewardJudge,
    seeded_name,
)
from schemas.config.data import DataConfig, Mixture, PipelineData
from schemas.config.methods import MethodConfig
from schemas.errors import refuse
from schemas.promotion import GATE_TAG, PromoteConfig
from schemas.source import GENERATED

# For each need, the slots of `data` that are asked for it, in this order.
SLOTS = {
    "sft": ("sft", "preference", "feedback"),
    "preference": ("preference",),
    "feedback": ("feedback", "preference"),
    "prompt": ("prompt", "preference", "sft", "feedback"),
}
FIXES = {
    "sft": "set data.sft or data.preference, or sft: null for a model that is tuned already",
    "preference": "set data.preference (pairs or rankings), or generate",
    "feedback": "set data.feedback or data.preference, or generate",
    "prompt": "set data.prompt",
}
# What decides how many tokens a method sees by itself, of all methods.
EXTENT = {"method", "epochs", "max_steps", "train_tokens", "batch_size", "max_length"}
EXTENT |= {"iterations", "rollout_size", "ppo_epochs", "max_new_tokens"}


def plan(config: PipelineConfig) -> Plan:
    """The stages of a run.

    Raises:
        StageError: a method lacks the data it needs, or parts of the config exclude each other.
    """
    plan_checks.check(config)
    planner = Planner(config, {})
    planner.run()
    return Plan(config, planner.nodes)


def promotion(before: Plan, champion: bool, seed: int | None = None) -> Plan:
    """What retraining does after a plan: candidate, SFT model and champion, when there is one, answer for the gate, and
    it decides on the candidate. `seed`: of their answers; default the config's.

    The champion's model is the output `model` of a node `champion` that is in no plan: whoever runs these nodes brings
    its result, as well as those of the plan.

    Raises:
        StageError: it is not clear who the candidate is, or the gate can never open.
    """
    plan_checks.check_gate(before.config)
    planner = Planner(before.config, dict(before.nodes))
    planner.promote(champion, before.config.seed if seed is None else seed)
    return Plan(before.config, {name: node for name, node in planner.nodes.items() if name not in before.nodes})


def last_test(before: Plan, chosen: Sequence[str]) -> Plan | None:
    """What a sweep does at its end: evaluate the chosen models on the test part; None where there is none."""
    planner = Planner(before.config, dict(before.nodes))
    if not planner.has_test():
        return None
    models = planner.models()
    for name in chosen:
        planner.evaluation(name, models, "test")
    return Plan(before.config, {name: node for name, node in planner.nodes.items() if name not in before.nodes})


class Planner:
    """Adds nodes as they are asked for; every method returns the output that was asked for."""

    def __init__(self, config: PipelineConfig, nodes: dict[str, Node]) -> None:
        self.config, self.nodes = config, nodes

    def run(self) -> None:
        """All nodes of a run."""
        self.base()
        self.sft_model()
        if self.config.generate is not None:
            self.generated()
        if self.has_reward():
            self.reward("reward")
        models = self.models()
        evaluations = {name: self.evaluation(name, models) for name in models}
        self.compare(evaluations, self.baselines())
        if self.has_test():  # here already: too few prompts should stop a sweep before it trains
            self.evaluation("sft", models, "test")

    def add(self, node: Node, output: str) -> Output:
        self.nodes[node.name] = node
        return node.name, output

    def has_reward(self) -> bool:
        """Whether there is a reward model: a given one, or one trained on the preferences unless `reward` is null."""
        given = self.config.reward_model is not None
        return given or (self.config.reward is not None and self.has_rows("preference"))

    # --- models ---

    def models(self) -> dict[str, Output]:
        """All models that are compared, by name."""
        models = {"base": self.base()} if self.config.sft is not None else {}
        models["sft"] = self.sft_model()
        return models | {name: self.aligned(name, method) for name, method in self.config.trained.items()}

    def base(self) -> Output:
        seed = self.config.seed if self.config.model.scratch is not None else 0
        return self.published("base", "model", self.config.model, seed)

    def published(self, name: str, field: str, model: ModelConfig, seed: int = 0) -> Output:
        """A model that is given, as an artifact."""
        return self.add(Node(name, "base", field, model.model_dump(mode="json"), seed=seed, model=name), "model")

    def sft_model(self) -> Output:
        """The SFT model, which is the reference of all methods."""
        if self.config.sft is None:
            return self.base()
        inputs = {"model": self.base(), "data": self.data_for("sft", "sft")}
        return self.trained(Node("sft", "sft", "sft", params_of(self.config.sft), inputs, self.config.seed))

    def trained(self, node: Node) -> Output:
        return self.add(replace(node, model=node.name, devices=self.config.devices, nodes=self.config.nodes), "model")

    def reward(self, name: str) -> Output:
        """The policies' reward model, or the gold one that judges."""
        config = self.config
        if name == "reward" and config.reward_model is not None:
            return self.published("reward", "reward_model", ModelConfig(path=config.reward_model))
        settings = (config.reward if name == "reward" else config.gold) or RewardConfig()
        params = params_of(settings) | {"rows": "train" if name == "reward" else "gold"}
        inputs = {"model": self.sft_model(), "data": self.data_for("preference", name)}
        # another seed, so that judge and judged do not begin with the same head
        seed = config.seed if name == "reward" else config.seed + 1
        return self.trained(Node(name, "reward", name, params, inputs, seed))

    def aligned(self, name: str, method: MethodConfig) -> Output:
        inputs = {"model": self.sft_model()}
        kinds = [kind for kind in ("preference", "feedback", "prompt") if kind in method.needs]
        for number, kind in enumerate(kinds):
            inputs["data" if number == 0 else kind] = self.data_for(kind, f"align.{name}")
        if "reward" in method.needs:
            inputs["reward"] = self.reward_for(name)
        if self.config.equal_tokens:
            inputs["budget"] = self.budget()
        field = name if name in self.config.align else name.removesuffix(seeded_name("", method.seed or 0))
        return self.trained(Node(name, "align", f"align.{field}", params_of(method), inputs, method.seed or 0))

    def budget(self) -> Output:
        """How many tokens all methods train on. What does not decide it, such as beta and seed, is left out."""
        methods = {name: method.model_dump(mode="json", include=EXTENT) for name, method in self.config.align.items()}
        inputs = {"model": self.sft_model()}
        for name, method in self.config.align.items():
            inputs |= {kind: self.data_for(kind, f"align.{name}") for kind in method.needs - {"reward"}}
        if "prompt" in inputs:  # for the length of a policy's own answers
            inputs["evaluation"] = self.evaluation("sft", {"sft": self.sft_model()})
        distinct = {json.dumps(settings, sort_keys=True): settings for settings in methods.values()}
        params = {"methods": [distinct[key] for key in sorted(distinct)]}
        return self.add(Node("budget", "budget", "equal_tokens", params, inputs), "budget")

    def reward_for(self, name: str) -> Output:
        if self.has_reward():
            return self.reward("reward")
        why = "`reward` is null" if self.config.reward is None else "there are no preferences to train one on"
        fix = "set reward and give data.preference or generate, or set reward_model"
        raise refuse(f"align.{name}", "set", f"needs a reward model, and {why}.", fix)

    # --- data ---

    def slot(self, kind: str) -> str | None:
        """The slot of `data` that gives rows of a kind, else None."""
        for slot in SLOTS[kind]:
            source: DataConfig | Mixture | None = getattr(self.config.data, slot)
            if source is not None and kind in source.gives:
                return slot
        return None

    def has_rows(self, kind: str) -> bool:
        """Whether there will be training rows of a kind."""
        generated = self.config.generate is not None and kind in ("preference", "feedback")
        return generated or self.slot(kind) is not None

    def data_for(self, kind: str, who: str) -> Output:
        """The data folder with training rows of a kind, which `who` needs."""
        own = getattr(self.config.data, kind) is not None
        if self.config.generate is not None and kind in ("preference", "feedback") and not own:
            return self.generated()
        slot = self.slot(kind)
        if slot is not None:
            return self.data(slot)
        if own:
            source = getattr(self.config.data, kind)
            given = ", ".join(sorted(source.gives))
            message = f"{who} needs rows of kind {kind}; from this kind come {given} only."
            raise refuse(f"data.{kind}.kind", source.kind, message, FIXES[kind])
        raise refuse(who, "set", f"needs {kind} data, which nothing gives.", FIXES[kind])

    def evaluation_slot(self) -> str:
        """The slot whose held-out prompts all models are evaluated on."""
        slot = "evaluation" if self.config.data.evaluation is not None else self.slot("prompt")
        if slot is None:
            raise refuse("data.evaluation", None, "there are no prompts to evaluate on.", "set data.evaluation")
        return slot

    def data(self, slot: str) -> Output:
        """Stage `validate` of one slot. All but the evaluation's leave out the evaluation's prompts."""
        params = self.data_params(slot)
        if slot == self.evaluation_slot():
            # Without these nothing is trained: the evaluation needs them, and where one is set, the gate.
            gate = 0 if self.config.promote is None else self.config.promote.gate.prompts_min
            params["min_eval_prompts"] = max(self.config.evaluate.min_prompts, gate)
            params["few_prompts"] = "refuse" if self.config.promote is not None else self.config.evaluate.few_prompts
            params["min_test_prompts"] = self.config.evaluate.min_prompts if self.has_test() else 0
        return self.validated(slot, f"data.{slot}", params, {})

    def data_params(self, slot: str) -> dict[str, Any]:
        """What decides the rows of a slot by themselves."""
        source: DataConfig | Mixture = getattr(self.config.data, slot)
        params = source.model_dump(mode="json")
        if isinstance(source, Mixture):
            seed = self.config.seed if source.seed is None else source.seed
            params["seed"] = seed if source.draws else None
        if slot == "evaluation":
            params["eval_fraction"] = 1.0 - source.test_fraction
        if slot == self.slot("sft") and self.config.sft is not None:
            params["learn"] = self.config.sft.learn
        return params

    def validated(self, slot: str, field: str, params: dict[str, Any], inputs: dict[str, Output]) -> Output:
        name = f"data {slot}"
        if name not in self.nodes:
            inputs = {"model": self.base(), **inputs}
            if slot != self.evaluation_slot():
                inputs["evaluation"] = self.data(self.evaluation_slot())
            self.add(Node(name, "validate", field, params | self.held_out_elsewhere(), inputs), "data")
        return name, "data"

    def held_out_elsewhere(self) -> dict[str, float]:
        """The largest shares that any data holds out: the same prompt may be in several files.

        `evaluation` holds out all it has, so that what it shares with others is told by the prompts themselves.
        """
        slots = (getattr(self.config.data, name) for name in PipelineData.model_fields if name != "evaluation")
        sources = [source for source in slots if source is not None]
        shares = ("eval_fraction", "test_fraction")
        return {f"others_{share}": max((getattr(source, share) for source in sources), default=0.0) for share in shares}

    def generated(self) -> Output:
        """Preferences sampled from the SFT model, then validated like any others."""
        generate, slot = self.config.generate, self.slot("prompt")
        assert generate is not None
        if slot is None:
            raise refuse("generate", "set", "there are no prompts to answer.", "set data.prompt or data.sft")
        inputs = {"model": self.sft_model(), "data": self.data(slot)}
        if isinstance(generate.judge, RewardJudge):
            name = "judge" if generate.judge == self.config.evaluate.judge else "generate judge"
            inputs["judge"] = self.published(name, "generate.judge", ModelConfig(path=generate.judge.model))
        params = generate.model_dump(mode="json")
        rows = self.add(Node("generate", "generate", "generate", params, inputs, self.config.seed), "rows")
        source: DataConfig | Mixture = getattr(self.config.data, slot)
        kept = source.model_dump(include={"eval_fraction", "test_fraction", "max_bad", "max_length"})
        made = DataConfig(path=GENERATED, kind="ranking", **kept)
        return self.validated("generated", "generate", made.model_dump(mode="json"), {"rows": rows})

    # --- evaluation ---

    def judge(self) -> Output | None:
        """The reward model that judges, when one does."""
        judge = self.config.evaluate.judge
        if not isinstance(judge, RewardJudge):
            return None
        if judge.model == "gold":
            return self.reward("gold")
        return self.published("judge", "evaluate.judge", ModelConfig(path=judge.model))

    def has_test(self) -> bool:
        """Whether the winner of a sweep is evaluated on prompts that it was not chosen by."""
        source: DataConfig | Mixture = getattr(self.config.data, self.evaluation_slot())
        return self.config.sweep is not None and source.test_fraction > 0

    def evaluation(self, name: str, models: dict[str, Output], part: Literal["eval", "test"] = "eval") -> Output:
        """Stage `evaluate` of one model, beside the SFT model's."""
        inputs = {"model": models[name], "reference": models["sft"], "data": self.data(self.evaluation_slot())}
        judge = self.judge()
        if judge is not None:
            inputs["judge"] = judge
        if "reward" in self.nodes:
            inputs["reward"] = ("reward", "model")
        if self.has_rows("preference") and part == "eval":
            inputs["pairs"] = self.data_for("preference", "evaluate")
        if name != "sft":
            inputs["baseline"] = self.evaluation("sft", models, part)
        about = self.training_labels(name)
        tags = {"method": about["method"]}
        params = self.config.evaluate.model_dump(mode="json", exclude={"baselines"}) | {"part": part}
        seed, title = self.config.seed, f"{part} {name}"
        node = Node(title, "evaluate", "evaluate", params, inputs, seed, name, tags=tags, about=about)
        return self.add(node, "evaluation")

    def training_labels(self, name: str) -> dict[str, str]:
        """Parameters that show on an evaluation what the model was trained with."""
        method = self.config.trained.get(name)
        training = method or (self.config.sft if name == "sft" else None)
        seed = method.seed if method else self.config.seed
        about = {"method": method.method if method else name, "seed": str(seed)}
        for setting in ("beta", "learning_rate", "kl_coef", "kl_target"):
            value = getattr(training, setting, None)
            if value is not None:
                about[setting] = str(value)
        return about

    def baselines(self) -> Output | None:
        """What the SFT model gives without alignment; none without aligned models, where it is not asked for, or where
        nobody answers at temperature 1, at which models are held against it.
        """
        evaluate = self.config.evaluate
        if evaluate.baselines is None or not self.config.align or 1.0 not in evaluate.temperatures:
            return None
        sft = self.sft_model()
        inputs = {"model": sft, "reference": sft, "data": self.data(self.evaluation_slot())}
        if (judge := self.judge()) is not None:
            inputs["judge"] = judge
        if "reward" in self.nodes:
            inputs["reward"] = ("reward", "model")
        own = evaluate.baselines.model_dump(mode="json")
        params = own | evaluate.model_dump(mode="json", include=set(BaselinesParams.model_fields) - own.keys())
        node = Node("baselines", "baselines", "evaluate.baselines", params, inputs, self.config.seed)
        return self.add(node, "baselines")

    def compare(self, evaluations: dict[str, Output], baselines: Output | None) -> Output:
        several = self.config.sweep is not None or self.config.seeds is not None
        params: dict[str, Any] = {"variants": variants_of(self.config)} if several else {}
        if self.config.sweep is not None:
            params["chosen"] = "tested" if self.has_test() else "by these numbers"
        params |= self.judge_to_ask()
        inputs = evaluations | ({} if baselines is None else {"baselines": baselines})
        return self.add(Node("compare", "compare", "align", params, inputs), "comparison")

    def judge_to_ask(self) -> dict[str, Any]:
        """A judge that only compares, for stages that ask it about two evaluations.

        Its address is the config's, which was checked, and not that of a stored evaluation.
        """
        judge = self.config.evaluate.judge
        return {"judge": judge.model_dump(mode="json")} if isinstance(judge, EndpointJudge) else {}

    # --- promotion ---

    def promote(self, champion: bool, seed: int) -> Output:
        """Stage `promote` of the candidate, against the champion when there is one."""
        models = self.models() | ({"champion": ("champion", "model")} if champion else {})
        seats = {"candidate": plan_checks.candidate(self.config), "sft": "sft"} | (
            {"champion": "champion"} if champion else {}
        )
        inputs = {seat: self.gate_evaluation(name, models, seed) for seat, name in seats.items()}
        params = {"gate": (self.config.promote or PromoteConfig()).gate.model_dump(mode="json")} | self.judge_to_ask()
        about = {"candidate": seats["candidate"]}
        node = Node("promote", "promote", "promote", params, inputs, seed, about=about)
        return self.add(node, "decision")

    def gate_evaluation(self, name: str, models: dict[str, Output], seed: int) -> Output:
        """Stage `evaluate` of one model for the gate: at the gate's temperature, with answers of its own."""
        node = self.nodes[self.evaluation(name, models)[0]]
        if name == "champion":  # who has been evaluated with its own run
            del self.nodes[node.name]
        promote = self.config.promote or PromoteConfig()
        params = node.params | {
            "temperatures": [promote.temperature],
            "samples_per_prompt": promote.samples_per_prompt,
            "gate": True,
        }
        inputs = dict(node.inputs)
        if name != "sft":
            inputs["baseline"] = self.gate_evaluation("sft", models, seed)
        model = name if name == "champion" else f"{name}-gate"  # apart from the run's own, in MLflow's lists
        tags = {**node.tags, GATE_TAG: "1"}
        made = replace(node, name=f"gate {name}", params=params, inputs=inputs, seed=seed, model=model, tags=tags)
        return self.add(made, "evaluation")
