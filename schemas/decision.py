"""What the gate has decided on a candidate, and why: stage `promote` writes it, the retraining flow acts on it."""

from typing import Literal

from schemas.stage import Strict


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
        found = "missing or not finite" if self.value is None else f"{self.value:.4g}"
        return f"{self.metric} is {found}, must be {self.relation} {self.bound:.4g} ({self.meaning})"


class Decision(Strict):
    """Whether the candidate becomes champion."""

    promote: bool
    against: Literal["champion", "sft"]
    checks: list[Check]

    @property
    def reasons(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if not check.passed]
