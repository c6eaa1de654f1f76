"""The configs of the alignment methods and their union. A new method adds its class here and to `AnyMethod`."""

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from schemas.config.training import Training
from schemas.text import short


class MethodConfig(Training):
    """What every alignment method has. `needs` names the inputs that must be there before training starts; `strength`
    the field that holds the policy to the reference, which a sweep calls beta."""

    needs: ClassVar[frozenset[str]]
    strength: ClassVar[str] = "beta"
    method: str
    learning_rate: float = Field(default=1e-6, gt=0)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of this method's training alone: data, SFT and reward model keep the run's. Default: the run's."""


SMOOTHED = ("sigmoid", "robust")
"""Losses of DPO that `label_smoothing` is part of."""


class DPO(MethodConfig):
    """Direct preference optimisation (Rafailov et al. 2023) and its variants, on pairs."""

    needs = frozenset({"preference"})
    method: Literal["dpo"] = "dpo"
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull to the reference model."""
    loss: Literal["sigmoid", "ipo_sum", "ipo_mean", "hinge", "robust"] = "sigmoid"
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of labels taken to be flipped: cDPO with `sigmoid`, the unbiased estimate with `robust`."""

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> Self:
        if self.label_smoothing and self.loss not in SMOOTHED:
            raise PydanticCustomError(
                "not_used",
                "label_smoothing = {value} changes nothing with loss {loss}. Fix: leave it out, or take {smoothed}",
                {"value": self.label_smoothing, "loss": self.loss, "smoothed": " or ".join(SMOOTHED)},
            )
        return self


class KTO(MethodConfig):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024), on thumbs up or down per answer."""

    needs = frozenset({"feedback"})
    method: Literal["kto"] = "kto"
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull to the reference model."""
    desirable_weight: float | None = Field(default=None, gt=0)
    """Weight of thumbs up; default from the class counts, so that both classes weigh the same."""
    undesirable_weight: float | None = Field(default=None, gt=0)
    """Weight of thumbs down; default as above."""


class PPO(MethodConfig):
    """Proximal policy optimisation (Schulman et al. 2017) of the reward model's score."""

    needs = frozenset({"prompt", "reward"})
    strength = "kl_coef"
    method: Literal["ppo"] = "ppo"
    iterations: int = Field(default=50, ge=1)
    """Rounds of: sample answers, score them, update."""
    rollout_size: int = Field(default=64, ge=1)
    """Answers sampled per iteration. `batch_size` is the rows of one optimizer step within it."""
    ppo_epochs: int = Field(default=4, ge=1)
    """Passes over each rollout."""
    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    kl_coef: float = Field(default=0.05, ge=0)
    """Coefficient of the per-token KL penalty; the start value when `kl_target` is set."""
    kl_target: float | None = Field(default=None, gt=0)
    """Nats per answer. When set, the coefficient adapts to reach it (Ziegler et al. 2019)."""
    kl_horizon: int = Field(default=10_000, ge=1)
    """Answers over which the adaptive coefficient reacts; more than a fifth of `rollout_size`."""
    max_kl: float | None = Field(default=100.0, gt=0)
    """Nats per answer from the reference. Farther away in `max_kl_iterations` iterations in a row, training stops as
    diverged, and nothing is published."""
    max_kl_iterations: int = Field(default=3, ge=1)
    clip: float = Field(default=0.2, gt=0)
    value_clip: float = Field(default=0.2, gt=0)
    value_coef: float = Field(default=0.1, ge=0)
    gamma: float = Field(default=1.0, gt=0, le=1)
    lam: float = Field(default=0.95, ge=0, le=1)
    missing_end_penalty: float = Field(default=1.0, ge=0)
    """Taken off the score of an answer that does not end by itself."""
    value_trunk: Literal["separate", "shared"] = "separate"
    """`shared` puts the value head on the policy's trunk: faster, less memory, and often a critic that explains little
    (train/explained_variance)."""
    value_start: Literal["reward", "zero"] = "reward"
    """What a separate critic's values begin as: the reward model's scores, or 0, on the reward model's trunk.

    The reward model's head was trained at the answers' ends alone. What it says before them may be worse than nothing
    (train/explained_variance far below 0), and is unlearnt first.
    """
    value_learning_rate: float | None = Field(default=None, gt=0)
    """Of the critic, under the same schedule; default ten times `learning_rate`: it has a mean to find, and nobody is
    harmed when it moves fast. On a shared trunk of the value head alone."""
    value_warmup: int = Field(default=2, ge=0)
    """Iterations in which the critic learns alone and the policy stays as it is; `value_warmup_share` bounds them."""
    value_warmup_share: float = Field(default=0.1, ge=0, lt=1)
    """Largest share of `iterations` that `value_warmup` may take. A critic of a large model sees a few hundred answers
    before it foretells more than a constant would (train/explained_variance); until then advantages are mostly noise.
    """
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = Field(default=0.0, ge=0, lt=1)
    adam_eps: float = Field(default=1e-5, gt=0)

    @property
    def critic_alone(self) -> int:
        """The first iterations, in which the critic learns alone."""
        return min(self.value_warmup, int(self.iterations * self.value_warmup_share + 1e-9))  # 100 * 0.29 is < 29

    @model_validator(mode="after")
    def _the_penalty_keeps_its_sign(self) -> Self:
        """One rollout may take at most 0.2 rollout_size / kl_horizon off the coefficient: less than all of it."""
        if self.kl_target is not None and 5 * self.kl_horizon <= self.rollout_size:
            raise PydanticCustomError(
                "kl_horizon",
                "kl_horizon = {value} would turn the sign of the KL penalty within one rollout of {size} answers. "
                "Fix: raise it above {least}",
                {"value": self.kl_horizon, "size": self.rollout_size, "least": self.rollout_size // 5},
            )
        return self


AnyMethod = DPO | KTO | PPO
CONFIGS: dict[str, type[MethodConfig]] = {c.model_fields["method"].default: c for c in get_args(AnyMethod)}


def _choose(value: Any) -> Any:
    """Pick the class by `method`, so that an error speaks of one class and not of every one in the union."""
    if isinstance(value, dict):
        name = value.get("method")
        if not isinstance(name, str) or name not in CONFIGS:
            raise ValueError(f"method {short(name)} is not known. Fix: use one of {', '.join(CONFIGS)}")
        return CONFIGS[name].model_validate(value)
    if not isinstance(value, MethodConfig):
        raise PydanticCustomError("dict_type", "must be keys with values")
    return value


Method = Annotated[AnyMethod, BeforeValidator(_choose)]
