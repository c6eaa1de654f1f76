"""When a candidate becomes champion: the bounds of the gate, and what it decided on a candidate and why."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from schemas import Strict, no_truth
from schemas.text import short


class Check(Strict):
    """One bound of the gate beside the number that was found."""

    metric: str
    """The metric that is logged as `gate/<metric>`."""
    value: float | None
    """None where it is missing, or no finite number."""
    relation: Literal[">", "<=", ">="]
    bound: float
    meaning: str
    passed: bool

    def __str__(self) -> str:
        measured = "missing or not finite" if self.value is None else f"{self.value:.4g}"
        return f"{self.metric} is {measured}, must be {self.relation} {self.bound:.4g} ({self.meaning})"


class Decision(Strict):
    """Whether the candidate becomes champion."""

    promote: bool
    against: Literal["champion", "sft"]
    checks: list[Check]

    @property
    def reasons(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if not check.passed]


BETTER: dict[str, Literal["higher", "lower"]] = {
    "judge_score": "higher",
    "win_rate_vs_sft": "higher",
    "length_controlled_win_rate": "higher",
    "reward_score": "higher",
    "preference_accuracy": "higher",
    "distinct_2": "higher",
    "ended": "higher",
    "kl_to_reference": "lower",
    "reference_nll": "lower",
    "empty": "lower",
}
"""The `eval/` metrics of which one direction is the better."""


class Gate(Strict):
    """When a candidate becomes champion: every bound must hold. A number that is missing or not finite fails."""

    win_rate_min: float = Field(default=0.5, ge=0, lt=1)
    """The lower end of the 95 % interval of the win rate must be above this: against the champion on the same prompts,
    or against the SFT model where there is no champion yet."""
    kl_max: float = Field(default=25.0, gt=0)
    """Nats per answer from the current SFT model. Picking the best of n answers costs less than log n nats, so that 25
    is more than choosing among 10^10 answers can need: beyond that is another model, not a better choice. It is a
    sum over tokens; for answers of many hundred tokens measure your own good models, and raise it knowingly."""
    length_ratio_max: float = Field(default=1.5, gt=0)
    """Mean length of the answers over the SFT model's."""
    distinct_2_min: float = Field(default=0.8, ge=0)
    """Share of unique word pairs over the SFT model's; a constant phrase comes near 0."""
    reference_nll_min: float = Field(default=0.5, ge=0)
    """How odd the answers look to the SFT model over how odd its own do; below: it repeats what is likeliest."""
    reference_nll_max: float = Field(default=2.0, gt=0)
    """The same; above: its answers are unlikely under the SFT model."""
    empty_max: float = Field(default=0.01, ge=0, le=1)
    """Share of empty answers."""
    prompts_min: int = Field(default=100, ge=1)
    """Prompts that candidate, champion and SFT model have answered."""
    tolerances: dict[str, Annotated[float, BeforeValidator(no_truth), Field(ge=0)]] = {}
    """`eval/` metric (`preference_accuracy: 0.02`) -> by how much it may be worse than the champion's, or than the SFT
    model's where there is no champion yet."""

    @field_validator("tolerances")
    @classmethod
    def _have_a_better_side(cls, tolerances: dict[str, float]) -> dict[str, float]:
        for name in tolerances:
            if name not in BETTER:
                raise ValueError(f"{short(name)} is not a metric with a better direction. Fix: use {', '.join(BETTER)}")
        return tolerances


class PromoteConfig(Strict):
    """`alignflow retrain`: which model is the candidate, where it is registered, and what it must reach."""

    model: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Name of the registered model in MLflow; default the config's name."""
    candidate: str | None = None
    """Which of `align`; default the only one. With `seeds` it is the first seed's model, or name another: `dpo-s1`."""
    gate: Gate = Gate()


class PromoteParams(Strict):
    """Stage `promote`."""

    gate: Gate = Gate()
