"""The frontier of a sweep: judge score against distance from the SFT model, by method and beta, over seeds. No torch.

A point is the mean over the seeds of one method and beta; its bars are the standard error of that mean over the seeds,
so they say how much another seed would change, and not how much other prompts would.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from stages.compare.plots import canvas, colours, png
from stages.compare.table import Row, lay_out
from stages.engine.scoring.metrics import mean_and_error

MEASURES = ("judge_score", "kl_to_reference", "win_rate_vs_sft")
HEAD = ["Method", "Beta", "Seeds", "Judge score", "KL to SFT", "Win rate vs SFT", "On the frontier"]
BARS = "Mean ± standard error over the seeds. Beta: of PPO it is kl_coef."


def points(table: Sequence[Row]) -> list[dict[str, Any]]:
    """One point per method and beta of the rows that name theirs, in the table's order of methods, then by beta.

    Each measure has its mean and `_se`, the standard error over the seeds, None for a single seed. `on_frontier`: no
    other point has a higher score at a distance as small.
    """
    rows = [row for row in table if "seed" in row]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    rows.sort(key=lambda row: (methods.index(row["method"]), row["beta"] or 0, row["seed"]))
    groups = itertools.groupby(rows, key=lambda row: (row["method"], row["beta"]))
    points = [_point(method, beta, list(group)) for (method, beta), group in groups]
    return [point | {"on_frontier": not any(_better(other, point) for other in points)} for point in points]


def _point(method: str, beta: float | None, rows: Sequence[Row]) -> dict[str, Any]:
    point: dict[str, Any] = {"method": method, "beta": beta, "seeds": [row["seed"] for row in rows]}
    point["models"] = [row["model"] for row in rows]
    for name in MEASURES:
        mean, error = mean_and_error([row[name] for row in rows])
        point |= {name: mean, f"{name}_se": error if len(rows) > 1 else None}
    return point


def _better(one: Row, other: Row) -> bool:
    """Whether the first has a higher score at no greater distance, or as high a one at a smaller."""
    gain, spared = (one[k] - other[k] for k in ("judge_score", "kl_to_reference"))
    return gain >= 0 and spared <= 0 and (gain > 0 or spared < 0)


def _measured(point: Row, name: str, digits: int = 2, factor: float = 1.0) -> str:
    error = point[f"{name}_se"]
    return f"{factor * point[name]:.{digits}f}" + ("" if error is None else f" ± {factor * error:.{digits}f}")


def cells(point: Row) -> list[str]:
    """A point's line of the table, under HEAD."""
    win_rate = f"{_measured(point, 'win_rate_vs_sft', 0, 100)} %"
    measured = [_measured(point, "judge_score"), _measured(point, "kl_to_reference"), win_rate]
    return [point["method"], _beta(point), str(len(point["seeds"])), *measured, "yes" if point["on_frontier"] else ""]


def label(point: Row) -> str:
    """A point's method and beta."""
    return f"{point['method']} {_beta(point)}"


def _beta(point: Row) -> str:
    return "-" if point["beta"] is None else f"{point['beta']:.15g}"


def render_text(points: Sequence[Row]) -> str:
    """The table of points for a terminal, in plain characters."""
    return f"{lay_out([HEAD, *map(cells, points)])}\n{BARS}"


def headline(points: Sequence[Row]) -> str:
    """Which point scores highest, which are not clearly below it, and which make up the frontier.

    Clearly below: by more than two standard errors of the difference, where both have more than one seed.
    """
    best = max(points, key=lambda point: point["judge_score"])
    edge = sorted((p for p in points if p["on_frontier"]), key=lambda p: p["kl_to_reference"])
    return (
        f"The highest mean judge score is that of {best['method']} at beta {_beta(best)}: "
        f"{_measured(best, 'judge_score')}, at KL {_measured(best, 'kl_to_reference')}{_level(best, points)}. "
        f"On the frontier, from near to far: {', '.join(map(label, edge))}."
    )


def _level(best: Row, points: Sequence[Row]) -> str:
    """Which other points are not clearly below the best; nothing where the seeds cannot say it."""
    several = [point for point in points if point is not best and point["judge_score_se"] is not None]
    if best["judge_score_se"] is None:
        return ""
    level = [
        label(point)
        for point in several
        if best["judge_score"] - point["judge_score"] <= 2 * math.hypot(best["judge_score_se"], point["judge_score_se"])
    ]
    return f"; not clearly below it: {', '.join(level)}" if level else ""


def draw(points: Sequence[Row], table: Sequence[Row], dark: bool = False) -> bytes:
    """PNG: a line per method over beta, with bars over seeds; full points are on the frontier, hollow ones are not."""
    figure, axes, ink = canvas(dark)
    colour = colours([point["method"] for point in points])
    for method, group in itertools.groupby(points, key=lambda point: point["method"]):
        line = list(group)
        x, y = ([point[k] for point in line] for k in ("kl_to_reference", "judge_score"))
        across, up = ([point[f"{k}_se"] or 0.0 for point in line] for k in ("kl_to_reference", "judge_score"))
        axes.errorbar(x, y, up, across, fmt="-", color=colour[method], elinewidth=1.4, capsize=3, label=method)
        for point in line:
            face = colour[method] if point["on_frontier"] else axes.get_facecolor()
            place = (point["kl_to_reference"], point["judge_score"])
            axes.plot(*place, "o", color=colour[method], markerfacecolor=face, markersize=8, zorder=4)
            axes.annotate(
                _beta(point), place, (7, 6), textcoords="offset points", color=colour[method], fontsize=9, zorder=5
            )
    for row in table:
        if row["model"] == "sft":
            place = (row["kl_to_reference"], row["judge_score"])
            axes.plot(*place, "D", color=colours(["sft"])["sft"], markersize=9, linestyle="none", label="sft")
    axes.legend(frameon=False, labelcolor=ink, loc="best")
    seeds = {len(point["seeds"]) for point in points}
    over = f"bars: standard error over {_span(seeds)}" if max(seeds) > 1 else "one seed, no bars"
    note = f"numbers: beta (PPO: kl_coef); {over}; hollow: another point scores as high, nearer"
    axes.set_title(note, loc="left", fontsize=9, color=ink, alpha=0.8, pad=6)
    figure.suptitle("Judge score against distance from the SFT model", x=0.02, ha="left", color=ink, fontsize=12)
    return png(figure)


def _span(counts: set[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{high} seeds" if low == high else f"{low} to {high} seeds"
