"""People's verdicts on two models, and how far the judge agrees with them. No torch.

A prompt counts once, by the majority of those who judged it, and prompts of one cluster together: as in the judge's own
sign test (head_to_head.py).
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from schemas import Strict, read_stored
from schemas.errors import refuse
from schemas.promotion.exact import upper_tail
from stages.engine.scoring.intervals import Interval, groups, signs, two_sided
from stages.runtime import workspace

LEVEL = 0.95
HALVINGS = 60  # of an interval from 0 to 1, to where floats end


class Agreement(Strict):
    """The judge beside people on the same prompts."""

    agreed: int
    """Prompts on which both prefer the same answer."""
    decided: int
    """Prompts on which both prefer one of the two."""
    low: float
    high: float
    """Exact interval of agreed / decided."""
    kappa: float | None
    """Cohen's, over all prompts with the verdicts won, lost and tied; None where chance alone agrees always."""
    win_rate: float
    """The judge's own for the first model on these prompts, ties counted half."""


class People(Strict):
    """What people said of two models."""

    model: str
    other: str
    evaluations: tuple[str, str]
    """Digests of both evaluations, of which the answers are."""
    annotators: int = Field(ge=1)
    verdicts: int
    prompts: int
    """Judged by at least one person."""
    won: int
    """Clusters of prompts in which people prefer the first model's answers."""
    lost: int
    tied: int
    low: float
    high: float
    """Exact interval of won / (won + lost)."""
    p: float
    """Of the exact sign test."""
    alpha: float | None = None
    """Krippendorff's, among people, where several judged the same prompt."""
    judge: Agreement | None = None

    @property
    def rate(self) -> float:
        """Share of the first model among the decided; 1/2 where nothing is decided."""
        return self.won / (self.won + self.lost) if self.won + self.lost else 0.5

    @property
    def sentences(self) -> list[str]:
        """What it says, for people: who is preferred, and how far to trust the judge."""
        decided, who = self.won + self.lost, "1 person" if self.annotators == 1 else f"{self.annotators} people"
        share = f"{100 * self.rate:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}] of {decided} decided prompts"
        clear = f"sign test p = {self.p:.2g}" if decided else "nothing is decided"
        ties = f", {self.tied} tied" if self.tied else ""
        lines = [f"People ({who}) prefer {self.model} to {self.other} on {share}{ties}; {clear}."]
        if self.judge is not None:
            one = self.judge
            if one.decided:
                reach = f"[{100 * one.low:.0f}, {100 * one.high:.0f}]"
                share = f"{100 * one.agreed / one.decided:.0f} % {reach} of {one.decided} prompts that both decide"
                kappa = "" if one.kappa is None else f"; Cohen's kappa {one.kappa:.2f}, ties included"
                lines.append(f"The judge agrees with them on {share}{kappa}.")
            lines.append(f"On the same prompts the judge's win rate of {self.model} is {100 * one.win_rate:.0f} %.")
        return lines


def exact_interval(successes: int, trials: int, level: float = LEVEL) -> Interval:
    """Clopper and Pearson's interval of a binomial chance (1934): at least its level, for any number of trials.

    Each end is the chance at which so many successes, or more (fewer), have probability (1 - level) / 2.
    """
    tail = (1 - level) / 2

    def lower(wanted: int) -> float:
        """The chance c with P(X >= wanted | c) = tail."""
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if upper_tail(wanted, trials, middle) < tail else (low, middle)
        return low

    low = lower(successes) if successes else 0.0
    high = 1 - lower(trials - successes) if successes < trials else 1.0
    return Interval(low, high)


def kappa(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Cohen's kappa (1960) of two raters: (p_o - p_e) / (1 - p_e), p_e from the margins; None where p_e is 1."""
    count = len(pairs)
    ones, others = Counter(one for one, _ in pairs), Counter(other for _, other in pairs)
    chance = sum(ones[value] * others[value] for value in ones) / count**2
    observed = sum(one == other for one, other in pairs) / count
    return (observed - chance) / (1 - chance) if chance < 1 else None


def agreement(pairs: Sequence[tuple[float, float]]) -> Agreement:
    """pairs: per prompt people's verdict and the judge's, each 1 (the first model won), 1/2 or 0; at least one."""
    decided = [(one, other) for one, other in pairs if 0.5 not in (one, other)]
    agreed = sum(one == other for one, other in decided)
    reach = exact_interval(agreed, len(decided)) if decided else Interval(0.0, 1.0)
    rate = sum(other for _, other in pairs) / len(pairs)
    ends = {"low": reach.low, "high": reach.high}
    return Agreement(agreed=agreed, decided=len(decided), kappa=kappa(pairs), win_rate=rate, **ends)


def counted(leads: Sequence[float], clusters: Sequence[str]) -> dict[str, float | int]:
    """Of People: won, lost and tied clusters, the interval and the p-value.

    leads: per prompt more than 0 where people prefer the first model, less where they prefer the other.
    """
    won, lost, tied = signs(leads, clusters)
    reach = exact_interval(won, won + lost) if won + lost else Interval(0.0, 1.0)
    counts = {"prompts": len(leads), "won": won, "lost": lost, "tied": tied}
    assert groups(clusters)[1] == won + lost + tied
    return counts | {"low": reach.low, "high": reach.high, "p": two_sided(min(won, lost), won + lost)}


def read(folder: Path) -> list[People]:
    """The results in a folder, by name.

    Raises:
        StageError: a file is none of ours.
    """
    results = []
    for file in sorted(folder.glob("*.json")):
        try:
            results.append(read_stored(People, file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            fix = "remove it, and let `alignflow ab` write it again"
            raise refuse("people", file, "this is not a result of `alignflow ab`.", fix, kind="input") from error
    return results


def write(result: People, file: Path) -> None:
    """As `read` reads it. All of it or nothing, and no other file in the folder, whose digest names it."""
    whole = file.parent.parent / f"{file.name}.new"
    workspace.write_whole(whole, json.dumps(result.model_dump(), indent=2) + "\n")
    whole.replace(file)
