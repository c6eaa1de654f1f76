"""The small charts of the report: numbers of an SVG that takes the colours of the page, also in print. No torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.compare.origin import Training

WIDTH, HEIGHT = 300.0, 150.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 8.0, 8.0, 20.0
MOST = 100  # points of a line; more are drawn as means of neighbours
BINS = 24


@dataclass(frozen=True)
class Scale:
    """Values on an axis, as places of pixels."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The place of a value; the middle where all values are equal."""
        part = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + part * (self.end - self.start), 1)


def ticks(low: float, high: float) -> list[float]:
    """Three to five round numbers from low to high: multiples of 1, 2 or 5 times a power of ten; of equal ends one."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10(high - low))
    for factor in (1.0, 0.5, 0.2, 0.1):
        first, last = math.ceil(low / (step * factor) - 1e-9), math.floor(high / (step * factor) + 1e-9)
        if last >= first + 2:
            return [number * step * factor for number in range(first, last + 1)][:: math.ceil((last - first + 1) / 5)]
    return [low, high]


def thinned(points: Sequence[tuple[int, float]]) -> tuple[list[tuple[float, float]], int]:
    """At most MOST points, each the mean of as many neighbours; and of how many."""
    each = math.ceil(len(points) / MOST)
    parts = [points[start : start + each] for start in range(0, len(points), each)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts], each


def line(training: Training, what: str, points: Sequence[tuple[int, float]], held_out: float | None) -> dict[str, Any]:
    """One curve over the steps of a training, with the value on held-out rows as a ring at its end."""
    drawn, each = thinned(points)
    values = [y for _, y in drawn] + ([] if held_out is None else [held_out])
    x = Scale(drawn[0][0], drawn[-1][0], LEFT, WIDTH - RIGHT)
    y = Scale(min(values), max(values), HEIGHT - BOTTOM, TOP)
    ends = f"from {drawn[0][1]:.3g} at step {points[0][0]} to {drawn[-1][1]:.3g} at step {points[-1][0]}"
    said = f"{training.model}, {what}: {ends}" + ("" if held_out is None else f"; on held-out rows {held_out:.3g}")
    return {
        "title": f"{training.model}: {what}",
        "model": training.model,
        "says": said,
        "path": "M" + "L".join(f"{x.at(step)} {y.at(value)}" for step, value in drawn),
        "ring": None if held_out is None else {"x": x.end, "y": y.at(held_out), "text": f"held out {held_out:.3g}"},
        "rows": [(y.at(value), f"{value:.4g}") for value in ticks(y.low, y.high)],
        "first": str(points[0][0]),
        "last": f"step {points[-1][0]}",
        "each": each,
    }


def histograms(values: Mapping[str, Sequence[float]], unit: str) -> list[dict[str, Any]]:
    """One chart per model of how often its values fall into equal bins; both axes are the same for all models.

    A value on an edge counts in the bin above it, the highest one in the last. Values that are not finite are left out.
    """
    finite = {name: [value for value in own if math.isfinite(value)] for name, own in values.items()}
    every = [value for own in finite.values() for value in own]
    if not every:
        return []
    low, high = min(every), max(every)
    x, size = Scale(low, high, LEFT, WIDTH - RIGHT), (high - low) / BINS
    counted = {}
    for name, own in finite.items():
        counts = [0] * BINS
        for value in own:
            counts[min(BINS - 1, int((value - low) / size)) if size else BINS // 2] += 1
        counted[name] = counts
    most = max(max(counts) for counts in counted.values())
    y = Scale(0, most, HEIGHT - BOTTOM, TOP)
    width = (WIDTH - RIGHT - LEFT) / BINS
    charts = []
    for name, counts in counted.items():
        mean = sum(finite[name]) / len(finite[name]) if finite[name] else None
        bars = [(round(LEFT + place * width + 0.5, 1), y.at(count)) for place, count in enumerate(counts) if count]
        told = (
            "no values" if mean is None else f"mean {mean:.2f}, from {min(finite[name]):.3g} to {max(finite[name]):.3g}"
        )
        charts.append(
            {
                "title": name,
                "model": name,
                "says": f"{name}, {unit}: {told}",
                "told": told,
                "bars": [{"x": at, "y": top, "height": round(y.start - top, 1)} for at, top in bars],
                "width": round(width - 1, 1),
                "mean": None if mean is None else x.at(mean),
                "rows": [(y.at(count), f"{count:g}") for count in ticks(0, most)],
                "columns": [(x.at(value), f"{value:.4g}") for value in ticks(low, high)],
            }
        )
    return charts
