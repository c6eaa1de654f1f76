"""From a config to the stages that run: a pure function, no files, no servers.

    base -> data * -> sft -> [generate -> data generated] -> reward, gold -> [budget] -> align * -> eval * -> compare
    retraining, after these: -> eval champion -> promote

A node is planned when something needs it; what a method needs and nothing gives is an error here, before anything runs.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from schemas.config import DERIVES, DataConfig, EndpointJudge, ModelConfig, PipelineConfig, RewardConfig, RewardJudge
from schemas.errors import refuse
from schemas.methods import MethodConfig
from schemas.promotion import PromoteConfig
from schemas.source import GENERATED
from schemas.training import Training

Output = tuple[str, str]
"""A node's name and the name of one of its outputs."""

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
RESERVED = {"base", "sft", "generate", "reward", "gold", "judge", "budget", "compare", "promote", "champion"}
# What decides how many tokens a method sees by itself, of all methods.
EXTENT = {"method", "epochs", "max_steps", "train_tokens", "batch_size", "max_length"}
EXTENT |= {"iterations", "rollout_size", "ppo_epochs", "max_new_tokens"}


@dataclass(frozen=True)
class Node:
    """One stage to run."""

    name: str
    """Unique in the plan, for people: `sft`, `data preference`, `dpo`, `eval dpo`."""
    stage: str
    params: dict[str, Any]
    inputs: dict[str, Output] = field(default_factory=dict)
    seed: int = 0
    label: str | None = None
    """The request's name: of an evaluation, the model that is evaluated."""
    devices: int = 1
    tags: dict[str, str] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    """For an evaluation: parameters of the training behind the model."""

    @property
    def needs(self) -> set[str]:
        """Names of the nodes that must be done first."""
        return {name for name, _ in self.inputs.values()}


def plan(config: PipelineConfig) -> list[Node]:
    """The nodes of a run, each after those that it needs.

    Raises:
        StageError: a method lacks the data it needs, or parts of the config exclude each other.
    """
    return Planner(config).plan()


def promotion(config: PipelineConfig, champion: bool) -> list[Node]:
    """What retraining does after `plan`: evaluate the champion, when there is one, and decide on the candidate.

    The champion's model is the output `model` of a node `champion` that is in no plan: whoever runs these nodes brings
    its result, as well as those of the plan.

    Raises:
        StageError: it is not clear who the candidate is, or the gate can never open.
    """
    planner = Planner(config)
    before = {node.name for node in planner.plan()}
    planner.promote(champion)
    return [node for node in planner.nodes.values() if node.name not in before]


def candidate(config: PipelineConfig) -> str:
    """The name in `align` of the model that may become champion. Raises StageError when that is not clear."""
    named, known = (config.promote or PromoteConfig()).candidate, list(config.align)
    if named is None and len(known) == 1:
        return known[0]
    if named not in known:
        message = "there is no such method." if named else f"align has {', '.join(known) or 'no method'}."
        fix = f"set it to one of {', '.join(known)}" if known else "set align to one method, dpo: {} for example"
        raise refuse("promote.candidate", named, message, fix)
    return named


def params_of(training: Training) -> dict[str, Any]:
    """A training's settings as a request has them: the seed is the request's own, and an unset limit is not named."""
    unset = {"train_tokens"} if training.train_tokens is None else set[str]()
    return training.model_dump(mode="json", exclude={"seed"} | unset)


def variants_of(config: PipelineConfig) -> dict[str, Any]:
    """Name of an aligned model -> its method, beta (for PPO `kl_coef`) and seed."""
    return {
        name: {
            "method": method.method,
            "beta": getattr(method, method.strength, None),
            "seed": config.seed if method.seed is None else method.seed,
        }
        for name, method in config.align.items()
    }


class Planner:
    """Adds nodes as they are asked for; every method returns the output that was asked for."""

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config
        self.nodes: dict[str, Node] = {}

    def plan(self) -> list[Node]:
        """All nodes, in an order in which they can run."""
        self.check_names()
        self.check_judges()
        if self.config.promote is not None:
            self.check_gate()
        self.base()
        self.tuned()
        if self.config.generate is not None:
            self.generated()
        if self.reward_is_there():
            self.reward("reward")
        models = self.models()
        self.compare({name: self.evaluation(name, models) for name in models})
        return list(self.nodes.values())

    def add(self, node: Node, output: str) -> Output:
        self.nodes[node.name] = node
        return node.name, output

    # --- Checks ---

    def check_names(self) -> None:
        """Names of aligned models must not be those of other nodes."""
        for name in self.config.align:
            if name in RESERVED or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,62}", name, re.ASCII):
                fix = f"letters, digits, dots, dashes and underscores, and none of {', '.join(sorted(RESERVED))}"
                raise refuse("align", name, "this name cannot be used.", fix)

    def check_judges(self) -> None:
        """The gold judge needs rows of its own; generated preferences cannot be judged by what is trained on them."""
        config = self.config
        generate = config.generate
        if generate is not None and config.data.preference is not None:
            fix = "leave out one of them; generated answers want data.prompt or data.sft"
            raise refuse("generate", "set", "preferences are both given and generated.", fix)
        if generate is not None and generate.judge is None:
            fix = "set generate.judge, or export with `alignflow generate` and give the ranked file as data.preference"
            raise refuse("generate.judge", None, "answers that people rank end a pipeline run.", fix)
        if generate is not None and isinstance(generate.judge, RewardJudge) and generate.judge.model == "gold":
            fix = "set it to the folder of a reward model"
            raise refuse("generate.judge.model", "gold", "the gold model is trained after `generate`.", fix)
        if self.judged_by_gold():
            self.check_gold()
        if not config.log_text:
            self.check_endpoints()

    def check_endpoints(self) -> None:
        """Without texts in evaluations there is nothing to compare, and what a server keeps or quotes is its own."""
        parts = {"evaluate": self.config.evaluate, "generate": self.config.generate}
        for name, part in parts.items():
            if part is not None and isinstance(part.judge, EndpointJudge):
                fix = "use a judge that runs here (rule, sentiment, reward), or log_text: true"
                message = "an endpoint is sent prompts and answers, which log_text: false forbids."
                raise refuse(f"{name}.judge", "endpoint", message, fix)

    def judged_by_gold(self) -> bool:
        judge = self.config.evaluate.judge
        return isinstance(judge, RewardJudge) and judge.model == "gold"

    def check_gold(self) -> None:
        preference = self.config.data.preference
        if self.config.gold is None:
            raise refuse("gold", None, "no gold reward model is trained.", "set gold: {}, or another evaluate.judge")
        if preference is None:
            fix = "set data.preference, or another evaluate.judge"
            raise refuse("data.preference", None, "the gold reward model needs preferences.", fix)
        if preference.gold_fraction == 0:
            fix = "set it, for example to 0.4: the gold model learns from these rows, the policies from the others"
            raise refuse("data.preference.gold_fraction", 0, "the gold reward model has no rows.", fix)

    def check_gate(self) -> None:
        """It is clear who the candidate is, and the gate gets as many prompts as it asks for."""
        candidate(self.config)
        gate, evaluate = (self.config.promote or PromoteConfig()).gate, self.config.evaluate
        for name, value in (("limit", evaluate.limit), ("min_prompts", evaluate.min_prompts)):
            if value is not None and value < gate.prompts_min:
                fix = f"raise evaluate.{name}, or lower promote.gate.prompts_min"
                message = f"evaluate.{name} is {value}, which may be too few for the gate."
                raise refuse("promote.gate.prompts_min", gate.prompts_min, message, fix)

    def reward_is_there(self) -> bool:
        """Whether there is a reward model: a given one, or one trained on the preferences unless `reward` is null."""
        given = self.config.reward_model is not None
        return given or (self.config.reward is not None and self.gives("preference"))

    # --- Models ---

    def models(self) -> dict[str, Output]:
        """All models that are compared, by name."""
        models = {"base": self.base()} if self.config.sft is not None else {}
        models["sft"] = self.tuned()
        return models | {name: self.aligned(name, method) for name, method in self.config.align.items()}

    def base(self) -> Output:
        seed = self.config.seed if self.config.model.scratch is not None else 0
        return self.published("base", self.config.model, seed)

    def published(self, name: str, model: ModelConfig, seed: int = 0) -> Output:
        """A model that is given, as an artifact."""
        params = model.model_dump(mode="json")
        return self.add(Node(name, "base", params, seed=seed, label=name), "model")

    def tuned(self) -> Output:
        """The SFT model, which is the reference of all methods."""
        if self.config.sft is None:
            return self.base()
        inputs = {"model": self.base(), "data": self.data_for("sft", "sft")}
        return self.training("sft", "sft", params_of(self.config.sft), inputs, self.config.seed)

    def training(self, name: str, stage: str, params: dict[str, Any], inputs: dict[str, Output], seed: int) -> Output:
        node = Node(name, stage, params, inputs, seed=seed, label=name, devices=self.config.devices)
        return self.add(node, "model")

    def reward(self, name: str) -> Output:
        """The policies' reward model, or the gold one that judges."""
        config = self.config
        if name == "reward" and config.reward_model is not None:
            return self.published("reward", ModelConfig(path=config.reward_model))
        settings = (config.reward if name == "reward" else config.gold) or RewardConfig()
        params = params_of(settings) | {"rows": "train" if name == "reward" else "gold"}
        inputs = {"model": self.tuned(), "data": self.data_for("preference", name)}
        # another seed, so that judge and judged do not begin with the same head
        seed = config.seed if name == "reward" else config.seed + 1
        return self.training(name, "reward", params, inputs, seed)

    def aligned(self, name: str, method: MethodConfig) -> Output:
        inputs = {"model": self.tuned()}
        kinds = [kind for kind in ("preference", "feedback", "prompt") if kind in method.needs]
        for number, kind in enumerate(kinds):
            inputs["data" if number == 0 else kind] = self.data_for(kind, f"align.{name}")
        if "reward" in method.needs:
            inputs["reward"] = self.reward_for(name)
        if self.config.equal_tokens:
            inputs["budget"] = self.budget()
        seed = self.config.seed if method.seed is None else method.seed
        return self.training(name, "align", params_of(method), inputs, seed)

    def budget(self) -> Output:
        """How many tokens all methods train on. What does not decide it, such as beta and seed, is left out."""
        methods = {name: method.model_dump(mode="json", include=EXTENT) for name, method in self.config.align.items()}
        inputs = {"model": self.tuned()}
        for name, method in self.config.align.items():
            inputs |= {kind: self.data_for(kind, f"align.{name}") for kind in method.needs - {"reward"}}
        if "prompt" in inputs:  # for the length of a policy's own answers
            inputs["evaluation"] = self.evaluation("sft", {"sft": self.tuned()})
        distinct = {json.dumps(settings, sort_keys=True): settings for settings in methods.values()}
        params = {"methods": [distinct[key] for key in sorted(distinct)]}
        return self.add(Node("budget", "budget", params, inputs, label="budget"), "budget")

    def reward_for(self, name: str) -> Output:
        if self.reward_is_there():
            return self.reward("reward")
        what = "`reward` is null" if self.config.reward is None else "there are no preferences to train one on"
        fix = "set reward and give data.preference or generate, or set reward_model"
        raise refuse(f"align.{name}", "set", f"needs a reward model, and {what}.", fix)

    # --- Data ---

    def slot(self, kind: str) -> str | None:
        """The slot of `data` that gives rows of a kind, else None."""
        for slot in SLOTS[kind]:
            source: DataConfig | None = getattr(self.config.data, slot)
            if source is not None and kind in DERIVES[source.kind]:
                return slot
        return None

    def gives(self, kind: str) -> bool:
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
            given = ", ".join(sorted(DERIVES[source.kind]))
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
        source: DataConfig = getattr(self.config.data, slot)
        params = source.model_dump(mode="json")
        if slot == "evaluation":
            params["eval_fraction"] = 1.0
        if slot == self.evaluation_slot():
            params["min_eval_prompts"] = self.config.evaluate.min_prompts
        return self.validated(slot, params)

    def validated(self, slot: str, params: dict[str, Any], inputs: dict[str, Output] | None = None) -> Output:
        name = f"data {slot}"
        if name not in self.nodes:
            inputs = {"model": self.base(), **(inputs or {})}
            if slot != self.evaluation_slot():
                inputs["evaluation"] = self.data(self.evaluation_slot())
            self.add(Node(name, "validate", params, inputs, label=name), "data")
        return name, "data"

    def generated(self) -> Output:
        """Preferences sampled from the SFT model, then validated like any others."""
        generate, slot = self.config.generate, self.slot("prompt")
        assert generate is not None
        if slot is None:
            raise refuse("generate", "set", "there are no prompts to answer.", "set data.prompt or data.sft")
        inputs = {"model": self.tuned(), "data": self.data(slot)}
        if isinstance(generate.judge, RewardJudge):
            name = "judge" if generate.judge == self.config.evaluate.judge else "generate judge"
            inputs["judge"] = self.published(name, ModelConfig(path=generate.judge.model))
        params = generate.model_dump(mode="json")
        rows = self.add(Node("generate", "generate", params, inputs, self.config.seed, "generate"), "rows")
        source: DataConfig = getattr(self.config.data, slot)
        kept = source.model_dump(include={"eval_fraction", "max_bad", "max_length"})
        made = DataConfig(path=GENERATED, kind="ranking", **kept)
        return self.validated("generated", made.model_dump(mode="json"), {"rows": rows})

    # --- Evaluation ---

    def judge(self) -> Output | None:
        """The reward model that judges, when one does."""
        judge = self.config.evaluate.judge
        if not isinstance(judge, RewardJudge):
            return None
        return self.reward("gold") if judge.model == "gold" else self.published("judge", ModelConfig(path=judge.model))

    def evaluation(self, name: str, models: dict[str, Output]) -> Output:
        """Stage `evaluate` of one model, beside the SFT model's."""
        inputs = {"model": models[name], "reference": models["sft"], "data": self.data(self.evaluation_slot())}
        judge = self.judge()
        if judge is not None:
            inputs["judge"] = judge
        if "reward" in self.nodes:
            inputs["reward"] = ("reward", "model")
        if self.gives("preference"):
            inputs["pairs"] = self.data_for("preference", "evaluate")
        if name != "sft":
            inputs["baseline"] = self.evaluation("sft", models)
        tags, about = self.behind(name)
        params = self.config.evaluate.model_dump(mode="json")
        node = Node(f"eval {name}", "evaluate", params, inputs, self.config.seed, name, tags=tags, about=about)
        return self.add(node, "evaluation")

    def behind(self, name: str) -> tuple[dict[str, str], dict[str, str]]:
        """Tags and parameters that show on an evaluation what the model was trained with."""
        method = self.config.align.get(name)
        training = method or (self.config.sft if name == "sft" else None)
        seed = method.seed if method and method.seed is not None else self.config.seed
        about = {"method": method.method if method else name, "seed": str(seed)}
        for setting in ("beta", "learning_rate", "kl_coef", "kl_target"):
            value = getattr(training, setting, None)
            if value is not None:
                about[setting] = str(value)
        return {"method": about["method"]}, about

    def compare(self, evaluations: dict[str, Output]) -> Output:
        params = {"variants": variants_of(self.config)} if self.config.sweep is not None else {}
        return self.add(Node("compare", "compare", params, dict(evaluations), label="compare"), "comparison")

    # --- Promotion ---

    def promote(self, champion: bool) -> Output:
        """Stage `promote` of the candidate, against the champion when there is one."""
        self.check_gate()
        models = self.models() | ({"champion": ("champion", "model")} if champion else {})
        seats = {"candidate": candidate(self.config), "sft": "sft"} | ({"champion": "champion"} if champion else {})
        inputs = {seat: self.evaluation(name, models) for seat, name in seats.items()}
        params = {"gate": (self.config.promote or PromoteConfig()).gate.model_dump(mode="json")}
        about = {"candidate": seats["candidate"]}
        node = Node("promote", "promote", params, inputs, self.config.seed, "promote", about=about)
        return self.add(node, "decision")
