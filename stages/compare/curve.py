"""What the SFT model gives without any alignment: sharpened, or the best of n of its answers. No torch.

The curve is the best that mixing these baselines gives at a distance: the least concave function above their points
that never falls. A mixture, which tosses a coin before it answers, scores the mean of its parts, and its KL is at most
the mean of theirs, since KL is convex. Beyond the last point the curve is as high as there.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from stages.engine.scoring.evaluation_record import Evaluation, Sample
from stages.engine.scoring.intervals import Interval, bootstraps
from stages.engine.scoring.paired import scores_alone


@dataclass(frozen=True)
class Point:
    """A baseline, or the SFT model itself."""

    name: str
    kl: float
    """Nats per answer from the SFT model; of the best of n an upper bound."""
    heights: np.ndarray
    """Per prompt: the mean of the judge's scores; of a judge that only compares, of the wins over SFT."""

    @property
    def height(self) -> float:
        return float(self.heights.mean())


@dataclass(frozen=True)
class Gain:
    """How far a model is above the curve at its own distance: the mean over prompts of the paired differences."""

    model: str
    kl: float
    gain: float
    interval: Interval
    against: tuple[str, ...]
    """The one or two baselines whose mixture the curve is there."""
    differences: np.ndarray = field(default_factory=lambda: np.zeros(0), compare=False)
    """Per prompt, what `gain` is the mean of."""

    @property
    def clear(self) -> bool:
        """Whether the interval is above 0."""
        return self.interval.low > 0

    def as_json(self) -> dict[str, Any]:
        """For comparison.json."""
        plain = {name: value for name, value in vars(self).items() if name != "differences"}
        return plain | {"interval": vars(self.interval), "clear": self.clear}


def heights(samples: Sequence[Sample], judge: Mapping[str, Any]) -> np.ndarray:
    """Per prompt, in order, the mean over its draws of the score, or of the win where the judge only compares."""
    draws = max(sample.draw for sample in samples) + 1
    values = [sample.score if scores_alone(judge) else sample.win for sample in samples]
    return np.array(values, dtype=np.float64).reshape(-1, draws).mean(1)


def points(sft: Evaluation, baselines: Mapping[str, Evaluation]) -> list[Point]:
    """The SFT model at temperature 1 and its baselines, from near to far."""
    judge = sft.settings["judge"]
    every = [Point("sft", 0.0, heights(sft.at(1.0), judge))]
    for name, evaluation in baselines.items():
        every.append(Point(name, evaluation.metrics["eval/kl_to_reference"], heights(evaluation.samples, judge)))
    return sorted(every, key=lambda point: (point.kl, -point.height))


def hull(points: Sequence[Point]) -> list[Point]:
    """The corners of the curve, from the SFT model to the highest point."""
    corners: list[Point] = []
    for point in points:
        if corners and point.height <= corners[-1].height:
            continue
        while len(corners) > 1 and _slope(corners[-2], point) >= _slope(corners[-2], corners[-1]):
            corners.pop()
        corners.append(point)
    return corners


def _slope(one: Point, other: Point) -> float:
    """Nearly vertical where two points are equally far."""
    return (other.height - one.height) / max(other.kl - one.kl, 1e-12)


def at(corners: Sequence[Point], kl: float) -> list[tuple[float, Point]]:
    """The curve at a distance, as shares of one or two corners."""
    for near, far in itertools.pairwise(corners):
        if kl < far.kl:
            share = max(0.0, kl - near.kl) / max(far.kl - near.kl, 1e-12)
            return [(1 - share, near), (share, far)] if share > 0 else [(1.0, near)]
    return [(1.0, corners[-1])]


def gains(evaluations: Mapping[str, Evaluation], models: Sequence[str], corners: Sequence[Point]) -> dict[str, Gain]:
    """By model, its gain over the curve at temperature 1, with its interval over clusters of prompts.

    The interval takes the distances and the choice of corners as they were measured.
    """
    found, rows, clusters = [], [], []
    for name in models:
        samples = evaluations[name].at(1.0)
        kl = evaluations[name].metrics["eval/kl_to_reference"]
        shares = at(corners, kl)
        rows.append(
            heights(samples, evaluations[name].settings["judge"])
            - sum(share * point.heights for share, point in shares)
        )
        clusters = [sample.cluster for sample in samples if sample.draw == 0]
        found.append((name, kl, tuple(point.name for _, point in shares)))
    intervals = bootstraps(rows, clusters, **evaluations[models[0]].resampling) if models else []
    return {
        name: Gain(name, kl, fmean(row), interval, against, row)
        for (name, kl, against), row, interval in zip(found, rows, intervals, strict=True)
    }
