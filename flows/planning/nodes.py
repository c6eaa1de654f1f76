"""What a plan is made of: nodes, their outputs, and what they say of the models that they train."""

from dataclasses import dataclass
from dataclasses import field as default
from typing import Any

from schemas.config import PipelineConfig, seeded_name
from schemas.config.training import Training
from schemas.errors import refuse

Output = tuple[str, str]
"""A node's name and the name of one of its outputs."""


@dataclass(frozen=True)
class Node:
    """One stage to run."""

    name: str
    """Unique in the plan, for people: `sft`, `data preference`, `dpo`, `eval dpo`."""
    stage: str
    field: str
    """The part of the config that asks for it: `data.preference`, `align.dpo`."""
    params: dict[str, Any]
    inputs: dict[str, Output] = default(default_factory=dict)
    seed: int = 0
    model: str | None = None
    """The model that it makes or evaluates, by its name in the comparison."""
    devices: int = 1
    """On each of its nodes."""
    nodes: int = 1
    tags: dict[str, str] = default(default_factory=dict)
    about: dict[str, str] = default(default_factory=dict)
    """For an evaluation: parameters of the training behind the model."""

    @property
    def needs(self) -> set[str]:
        """Names of the nodes that must be done first."""
        return {name for name, _ in self.inputs.values()}


@dataclass(frozen=True)
class Plan:
    """A config and the stages that it leads to."""

    config: PipelineConfig
    nodes: dict[str, Node]
    """By name, each after those that it needs."""


def until(planned: Plan, last: str) -> Plan:
    """The nodes of a plan up to one, by its name or its stage's, each with all that it needs.

    Raises:
        StageError: the plan has no such node.
    """
    wanted = {name for name, node in planned.nodes.items() if last in (name, node.stage)}
    if not wanted:
        stages = dict.fromkeys(node.stage for node in planned.nodes.values())
        fix = f"name one of {', '.join(stages)}, or one as `--dry-run` lists it"
        raise refuse("--until", last, "the run has no such stage.", fix)
    for name, node in reversed(planned.nodes.items()):
        wanted |= node.needs if name in wanted else set()
    return Plan(planned.config, {name: node for name, node in planned.nodes.items() if name in wanted})


def params_of(training: Training) -> dict[str, Any]:
    """A training's settings as a request has them: the seed is the request's own, and an unset limit is not named.

    Neither is what came later where it is as things were before: keys from then stay.
    """
    fields = type(training).model_fields
    later = fields.keys() & {
        *("train_tokens", "sharding", "gather", "value_start", "frozen", "optimizer", "publish"),
        "value_warmup_share",
    }
    unset = {name for name in later if getattr(training, name) == fields[name].default}
    return training.model_dump(mode="json", exclude={"seed"} | unset)


def variants_of(config: PipelineConfig) -> dict[str, Any]:
    """Name of an aligned model -> its group, whose models differ in their seeds alone, with what they have in common.

    `group` is the model's name without its seed; `beta` of PPO is `kl_coef`.
    """
    return {
        name: {
            "group": name.removesuffix(seeded_name("", method.seed or 0)),
            "method": method.method,
            "beta": getattr(method, method.strength, None),
            "learning_rate": method.learning_rate,
            "seed": method.seed,
        }
        for name, method in config.trained.items()
    }
