"""Which model beats which: all pairs of models on the same prompts, draws and temperature. No torch.

What is said is about these models. With one training run of each it is not about the methods: the intervals cover other
prompts, and no other seed.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Protocol

import numpy as np

from schemas.errors import StageError
from stages.engine.scoring import metrics
from stages.engine.scoring.evaluation_record import Evaluation, Sample
from stages.engine.scoring.intervals import Interval, bootstraps, holm, sign_test, signs
from stages.engine.scoring.paired import scores_alone, wins_between

STARTING_POINTS = ("base", "sft")
ALPHA = 0.05
ASKED = 6  # aligned models up to which a judge that only compares is asked about each pair of them

Ask = Callable[[tuple[str, str], Sequence[Sample], Sequence[Sample]], list[float]]
"""Wins of one model's samples over another's, as `wins_between` gives them."""


@dataclass(frozen=True)
class Duel:
    """One model against another at one temperature; its numbers are None where `reason` says why there are none."""

    model: str
    other: str
    temperature: float
    win_rate: float | None = None
    """Share of answers that the judge prefers to the other model's, ties counted half."""
    rate: Interval | None = None
    """Of the win rate, by bootstrap over clusters of prompts."""
    difference: float | None = None
    """Mean paired difference of the judge's scores; None of a judge that only compares."""
    gap: Interval | None = None
    """Of the difference."""
    p: float | None = None
    """Of the exact sign test over clusters of prompts."""
    adjusted_p: float | None = None
    """The same after Holm's correction over all pairs of this temperature."""
    reason: str = ""

    @property
    def clear(self) -> bool:
        """Whether the two can be told apart: adjusted_p below 5 %."""
        return self.adjusted_p is not None and self.adjusted_p < ALPHA

    @property
    def beats(self) -> bool:
        """Whether the first is clearly the better one."""
        return self.clear and self.win_rate is not None and self.win_rate > 0.5

    def turned(self) -> "Duel":
        """The same seen from the other model."""
        return replace(
            self,
            model=self.other,
            other=self.model,
            win_rate=None if self.win_rate is None else 1 - self.win_rate,
            rate=self.rate and replace(self.rate, low=1 - self.rate.high, high=1 - self.rate.low),
            difference=None if self.difference is None else -self.difference,
            gap=self.gap and replace(self.gap, low=-self.gap.high, high=-self.gap.low),
        )

    def as_json(self) -> dict[str, Any]:
        """For comparison.json."""
        return asdict(self) | {"clear": self.clear}


Matrix = Mapping[tuple[str, str], Duel]
"""(model, other) -> their duel, in both directions, at one temperature."""


def matrix(
    evaluations: Mapping[str, Evaluation], temperature: float, ask: Ask | None = None
) -> dict[tuple[str, str], Duel]:
    """Every pair of models at one temperature, in both directions; Holm's correction is over the pairs, once each.

    `ask` is for judges that only compare: they are asked about the aligned models, and have been asked about SFT. The
    seed and number of resamples are those of the evaluations, so that equal evaluations give equal intervals.
    """
    samples = {name: evaluation.at(temperature) for name, evaluation in evaluations.items()}
    settings = next(iter(evaluations.values())).settings
    pairs = list(itertools.combinations(samples, 2))
    asked: set[tuple[str, str]] = set()
    if ask is not None:  # about all aligned models where these are few, else about the one that most often beats SFT
        aligned = [name for name in samples if name not in STARTING_POINTS]
        asked = set(itertools.combinations(aligned, 2))
        if len(aligned) > ASKED:
            best = max(aligned, key=lambda name: fmean(sample.win for sample in samples[name]))
            asked = {pair for pair in asked if best in pair}
    duels: list[Duel] = []
    wins: list[list[float] | None] = []
    for pair in pairs:
        won, reason = None, "the judge only compares, and was not asked about this pair"
        try:
            won = _won(pair, samples, settings, ask if pair in asked else None)
        except StageError as error:
            reason = error.problem.message
        wins.append(won)
        duels.append(Duel(*pair, temperature, reason="" if won is not None else reason))
    duels = _measured(duels, wins, samples, next(iter(evaluations.values())))
    return {(duel.model, duel.other): duel for both in duels for duel in (both, both.turned())}


def _won(
    pair: tuple[str, str], samples: Mapping[str, Sequence[Sample]], settings: Mapping[str, Any], ask: Ask | None
) -> list[float] | None:
    """Wins of the first over the other, per answer; None where the judge should have been asked, and was not."""
    one, other = (samples[name] for name in pair)
    if scores_alone(settings["judge"]):
        return wins_between(pair, one, other, settings["judge"])
    if pair[1] == "sft":
        return [sample.win for sample in one]
    if pair[0] == "sft":
        return [1 - sample.win for sample in other]
    return ask(pair, one, other) if ask is not None else None


def _measured(
    duels: Sequence[Duel],
    wins: Sequence[Sequence[float] | None],
    samples: Mapping[str, Sequence[Sample]],
    first: Evaluation,
) -> list[Duel]:
    """The duels with their numbers, where they have wins."""
    places = [place for place, won in enumerate(wins) if won is not None]
    rows = [won for won in wins if won is not None]
    clusters = [sample.cluster for sample in next(iter(samples.values()))]
    drawn = first.resampling
    rates = bootstraps(rows, clusters, **drawn)
    p_values: list[float] = []
    for won in rows:
        leads = [win - 0.5 for win in won]
        up, down, _ = signs(leads, clusters)
        # Where the clusters point one way and the win rate the other nobody is ahead. That can be where clusters differ
        # in size, or several answers to a prompt are won in part.
        p_values.append(sign_test(leads, clusters) if (up - down) * fmean(leads) > 0 else 1.0)
    measured = list(duels)
    for place, won, rate, p, adjusted in zip(places, rows, rates, p_values, holm(p_values), strict=True):
        measured[place] = replace(duels[place], win_rate=metrics.win_rate(won), rate=rate, p=p, adjusted_p=adjusted)
    if not scores_alone(first.settings["judge"]):
        return measured
    score = {name: np.array([sample.score for sample in own]) for name, own in samples.items()}
    gaps = [score[duel.model] - score[duel.other] for duel in measured]
    intervals = bootstraps(gaps, clusters, **drawn)
    return [
        replace(duel, difference=float(gap.mean()), gap=interval)
        for duel, gap, interval in zip(measured, gaps, intervals, strict=True)
    ]


def ranked(matrix: Matrix, models: Sequence[str], scores: Mapping[str, float]) -> list[str]:
    """Models from best to worst: by their mean win rate against the others of them, then score, then name.

    Where a pair has no number the judge's scores alone decide (of a judge that only compares, the wins over SFT).
    """
    rates = {
        model: [duel.win_rate for (one, other), duel in matrix.items() if one == model and other in models]
        for model in models
    }
    whole = all(rate is not None for own in rates.values() for rate in own)
    place = {name: fmean(rate or 0.0 for rate in own) if whole and own else 0.0 for name, own in rates.items()}
    return sorted(models, key=lambda name: (-place[name], -scores[name], name))


def logged(matrix: Matrix, first: bool) -> dict[str, float]:
    """The pairs as metrics, `eval/<model>/vs_<other>/win_rate` with `_low` and `_high`, `score_difference` likewise.

    They are on the comparison's run: an evaluation's own is closed by then, and belongs to other comparisons too. Each
    pair is there in both directions. Of other temperatures than the first: `eval/<model>/vs_<other>/t0.3/win_rate`.
    """
    values: dict[str, float] = {}
    for (model, other), duel in matrix.items():
        start = f"eval/{model}/vs_{other}/{'' if first else f't{duel.temperature:.15g}/'}"
        for name, value, interval in (
            ("win_rate", duel.win_rate, duel.rate),
            ("score_difference", duel.difference, duel.gap),
        ):
            if value is not None and interval is not None:
                values |= {f"{start}{name}": value, f"{start}{name}_low": interval.low}
                values[f"{start}{name}_high"] = interval.high
    return values


# --- words ---


class Ends(Protocol):
    """Whatever has the ends of an interval."""

    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def percent(value: float, interval: Ends | None) -> str:
    """`63 % [58, 69]`."""
    ends = "" if interval is None else f" [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"
    return f"{100 * value:.0f} %{ends}"


def cell(duel: Duel | None) -> str:
    """A pair's win rate in the matrix, `-` where there is none; an asterisk where the two can be told apart."""
    if duel is None or duel.win_rate is None:
        return "-"
    return f"{percent(duel.win_rate, duel.rate)}{'*' if duel.clear else ''}"


def measured(duel: Duel) -> str:
    """A pair's win rate; with the p-value that decides, where the interval alone would say more."""
    text = percent(duel.win_rate or 0.0, duel.rate)
    if duel.clear or duel.rate is None or duel.adjusted_p is None or duel.rate.low <= 0.5 <= duel.rate.high:
        return text
    return f"{text}, p {duel.adjusted_p:.2f} after Holm's correction"


def sentence(duel: Duel) -> str:
    """What a pair says: `dpo beats kto 63 % [58, 69]`."""
    if duel.win_rate is None:
        return f"{duel.model} and {duel.other}: - ({duel.reason})"
    if not duel.clear:
        return f"cannot tell {duel.model} from {duel.other} apart: {measured(duel)}"
    duel = duel if duel.win_rate > 0.5 else duel.turned()
    return f"{duel.model} beats {duel.other} {percent(duel.win_rate or 0.0, duel.rate)}"


def overoptimised(matrix: Matrix, table: Sequence[Mapping[str, Any]]) -> str:
    """A line where the model with the highest reward score is judged clearly below another one; else nothing."""
    rewarded = [row for row in table if row.get("reward_score") is not None and row["model"] not in STARTING_POINTS]
    if not rewarded:
        return ""
    top = max(rewarded, key=lambda row: row["reward_score"])["model"]
    others = [duel for (one, other), duel in matrix.items() if other == top and one not in STARTING_POINTS]
    # Whose scores are clearly the higher ones; by wins where the judge gives none.
    above = [duel for duel in others if (duel.beats if duel.gap is None else duel.gap.low > 0)]
    if not above:
        return ""
    duel = max(above, key=lambda duel: (duel.difference or 0.0, duel.win_rate or 0.0))
    by = f"beats it {percent(duel.win_rate or 0.0, duel.rate)}"
    if duel.difference is not None and duel.gap is not None:
        by = f"is judged higher by {duel.difference:.2f} [{duel.gap.low:.2f}, {duel.gap.high:.2f}]"
    return f"{top} has the highest reward score, but {duel.model} {by}: {top} may have over-optimised the reward model."
