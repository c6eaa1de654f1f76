"""When a candidate becomes champion: the bounds of the gate, and what it decided on a candidate and why."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from schemas import Strict, no_truth
from schemas.promotion import exact
from schemas.text import short

GATE_TAG = "gate"
"""MLflow tag of evaluations that the gate has asked for."""


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
    alpha: float | None = None
    """What this look has spent of the year's error; None in decisions of before there was a budget."""
    decided: int | None = None
    """Clusters of prompts that were won or lost."""
    power: str = ""
    """What the gate could have seen with so many prompts."""

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
    """When a candidate becomes champion: every bound must hold. A number that is missing or not finite fails.

    Ratios and differences are measured against the SFT model and against the champion, each on its own. Those that are
    means over prompts must hold at the unfavourable end of their 95 % interval over prompts.
    """

    win_rate_min: float = Field(default=0.5, ge=0, lt=1)
    """The candidate's true win rate, over prompts, must be above this: against the champion (the SFT model where there
    is none yet), and against the SFT model made as sharp as the candidate. By an exact sign test at the look's share of
    `error`."""
    error: float = Field(default=0.05, gt=0, lt=1)
    """Chance to promote, within any 365 days, at least one candidate that is no better than the champion of its day."""
    looks_per_year: int = Field(default=53, ge=1)
    """Each decision on a candidate (a look) spends `error` / `looks_per_year`; when all is spent the gate is closed
    until the oldest look is a year old. A weekly schedule has 53 looks in some windows of 365 days."""
    kl_max: float = Field(default=25.0, gt=0)
    """Nats per answer from the current SFT model. Picking the best of n answers costs less than log n nats, so that 25
    is more than choosing among 10^10 answers can need: beyond that is another model, not a better choice. It is a
    sum over tokens; for answers of many hundred tokens measure your own good models, and raise it knowingly."""
    length_ratio_max: float = Field(default=1.5, gt=0)
    """Mean length of the answers over the other model's."""
    distinct_2_min: float = Field(default=0.8, ge=0)
    """Share of unique word pairs over the other model's; a constant phrase comes near 0."""
    reference_nll_min: float = Field(default=0.5, ge=0)
    """How odd the answers look to the SFT model over how odd the other model's do; below: it repeats what is likeliest.
    """
    reference_nll_max: float = Field(default=2.0, gt=0)
    """The same; above: its answers are unlikely under the SFT model."""
    unended_more_max: float = Field(default=0.1, ge=0, le=1)
    """By how much the share of answers that are cut off may be above the other model's."""
    empty_max: float = Field(default=0.01, ge=0, le=1)
    """Share of empty answers."""
    relevance_min: float = Field(default=0.5, ge=0)
    """How much likelier the SFT model finds the answers behind their own prompts than behind other ones, over the same
    of the other model's answers; 0: not asked. Answers that ignore their prompt come near 0."""
    prompts_min: int = Field(default=400, ge=1)
    """Prompts that candidate, champion and SFT model have answered. With 400 a true win rate of .6 passes in 80 % of
    looks, with 200 one of .641."""
    tolerances: dict[str, Annotated[float, BeforeValidator(no_truth), Field(ge=0)]] = {}
    """`eval/` metric (`preference_accuracy: 0.02`) -> by how much it may be worse than the champion's, or than the SFT
    model's where there is no champion yet: the upper end of the difference's 95 % interval over prompts."""

    @property
    def alpha(self) -> float:
        """The p-value that a look must reach, which is also what it spends."""
        return self.error / self.looks_per_year

    def power(self, prompts: int) -> str:
        """What a look at so many prompts can see, for people."""
        least = exact.detectable(prompts, self.alpha, self.win_rate_min)
        if least is None:
            return f"{prompts} prompts: too few for any candidate to pass with 80 %"
        return f"{prompts} prompts: a candidate that truly wins {100 * least:.1f} % of prompts passes with 80 %"

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
    temperature: float = Field(default=0.3, gt=0)
    """At which all sides answer for the gate: that of the deployment."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Answers of each side to each prompt for the gate, drawn anew for every look. A second one raises the power about
    as far as twice the prompts would; but a prompt counts once, by the mean over its answers, and where some prompts
    tie far more often than others only `1` tests the win rate over answers itself."""
    approval: bool = False
    """Whether a person must approve what has passed the gate before it becomes champion: on Prefect's page of the run,
    or with `alignflow approve`."""
    approval_hours: float = Field(default=72.0, gt=0, le=8760)
    """How long the candidate waits for that; then it is rejected."""
    gate: Gate = Gate()
    smoke: bool = False
    """Before the alias moves, the candidate has to answer eight held-out prompts as it will be served: loaded by MLflow
    into plain transformers, in a process of its own. An empty answer, no answer that ends by itself, an error or too
    long a time reject it."""
    smoke_minutes: float = Field(default=10.0, gt=0)
    """How long that may take, loading included."""


class PromoteParams(Strict):
    """Stage `promote`."""

    gate: Gate = Gate()
    judge: dict[str, Any] | None = None
    """The endpoint judge that is asked about candidate and champion; None for judges that score."""
