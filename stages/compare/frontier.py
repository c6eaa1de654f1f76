"""The frontier over seeds: judge score against distance from the SFT model, a point per method and setting. No torch.

A point is the mean over the seeds of one method, beta and learning rate. Its ± is the standard error of that mean over
the seeds: how much another seed would change. Intervals cover the prompts too, where the answers are known.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.compare.curve import Gain
from stages.compare.plots import canvas, colours, png
from stages.compare.table import Row, finite, lay_out
from stages.engine.scoring.evaluation_record import Evaluation
from stages.engine.scoring.intervals import apart, clustered_error, over_seeds
from stages.engine.scoring.metrics import mean_and_error

MEASURES = ("judge_score", "kl_to_reference", "win_rate_vs_sft")
HEAD = ["Method", "Beta", "KL cost", "n", "Judge score", "KL to SFT", "Win rate", "Edge"]
BARS = """Mean ± standard error over the seeds (n); in brackets: 95 % intervals over seeds
and prompts, none for one seed. Win rate: against SFT. Edge: no other scores as
high, nearer. KL cost: of a nat in raw reward scores; of PPO kl_coef x spread."""


def points(
    table: Sequence[Row],
    evaluations: Mapping[str, Evaluation] | None = None,
    score_std: float | None = None,
    gains: Mapping[str, Gain] | None = None,
) -> list[dict[str, Any]]:
    """One point per group of the rows that name theirs, in the table's order of methods, then by beta and rate.

    Each measure has its mean and `_se`, the standard error over the seeds, None for a single seed; the win rate and the
    score `_low` and `_high` too where the evaluations are given. `kl_cost`: beta, of PPO kl_coef times `score_std`, the
    standard deviation by which its reward model's scores were divided. `gain`: over the curve of the
    baselines, with its interval over seeds and prompts. `on_frontier`: no other point has a higher score at a distance
    as small. `below`: whether it is clearly below the point of the highest score; None: cannot be said.
    """
    rows = [row for row in table if "seed" in row]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    rows.sort(key=lambda row: (methods.index(row["method"]), row["beta"] or 0, _rate(row), group(row), row["seed"]))
    groups = [list(members) for _, members in itertools.groupby(rows, key=group)]
    several = len({(row["method"], _rate(row)) for row in rows}) > len(methods)
    answers = [_scores(members, evaluations or {}) for members in groups]
    made = [
        _point(members, scores, score_std, several) | _gain(members, scores, gains or {})
        for members, scores in zip(groups, answers, strict=True)
    ]
    if not made:
        return []
    best = max(range(len(made)), key=lambda i: made[i]["judge_score"])
    return [
        point
        | {
            "on_frontier": not any(_better(other, point) for other in made),
            "below": False if i == best else _below(groups[best], groups[i], answers[best], answers[i], len(made)),
        }
        for i, point in enumerate(made)
    ]


def group(row: Row) -> str:
    """The name of what a model has in common with those of other seeds."""
    return row.get("group") or f"{row['method']}-{row['beta']}-{_rate(row)}"


def _rate(row: Row) -> float:
    return row.get("learning_rate") or 0.0


Scores = tuple[np.ndarray, np.ndarray, list[str]]
"""Judge scores (seeds x samples), wins (the same), and the samples' clusters."""


def _scores(rows: Sequence[Row], evaluations: Mapping[str, Evaluation]) -> Scores | None:
    """Of models whose evaluations are all given, at the first temperature; of another group None."""
    samples = [evaluations[row["model"]].first for row in rows if row["model"] in evaluations]
    if not samples or len(samples) < len(rows):
        return None
    scores, won = (np.array([[getattr(s, name) for s in one] for one in samples]) for name in ("score", "win"))
    return scores, won, [sample.cluster for sample in samples[0]]


def _point(rows: Sequence[Row], scores: Scores | None, score_std: float | None, several: bool) -> dict[str, Any]:
    first = rows[0]
    point: dict[str, Any] = {"group": group(first), "method": first["method"], "beta": first["beta"]}
    point["learning_rate"] = first.get("learning_rate") if several else None
    spread = score_std if first["method"] == "ppo" else 1.0
    point["kl_cost"] = None if spread is None or first["beta"] is None else first["beta"] * spread
    point |= {"seeds": [row["seed"] for row in rows], "models": [row["model"] for row in rows]}
    for name in MEASURES:
        mean, error = mean_and_error([row[name] for row in rows])
        point |= {name: mean, f"{name}_se": error if len(rows) > 1 else None}
    if scores is not None and len(rows) > 1:
        score_SN, win_SN, clusters = scores
        for name, values_SN in (("judge_score", score_SN), ("win_rate_vs_sft", win_SN)):
            interval = over_seeds(values_SN.tolist(), clusters)
            ends = (
                (interval.low, interval.high) if name == "judge_score" else np.clip([interval.low, interval.high], 0, 1)
            )
            point |= {f"{name}_low": float(ends[0]), f"{name}_high": float(ends[1]), f"{name}_covers": interval.covers}
    return point


def _gain(rows: Sequence[Row], scores: Scores | None, gains: Mapping[str, Gain]) -> dict[str, Any]:
    """The mean gain over the seeds and its interval; None where there are no baselines, or one seed."""
    known = [gains[row["model"]].differences for row in rows if row["model"] in gains]
    if scores is None or len(rows) < 2 or len(known) < len(rows):
        return {"gain": None}
    draws = len(scores[2]) // len(known[0])
    interval = over_seeds([values.tolist() for values in known], scores[2][::draws])
    return {"gain": float(np.mean(known)), "gain_low": interval.low, "gain_high": interval.high}


def _below(
    best: Sequence[Row], other: Sequence[Row], best_scores: Scores | None, scores: Scores | None, count: int
) -> bool | None:
    """Whether a point is clearly below the best of `count` points; None where a single seed cannot say it."""
    if min(len(best), len(other)) < 2:
        return None
    means = [[row["judge_score"] for row in rows] for rows in (best, other)]
    parts = [(mean_and_error(values)[1] ** 2, len(values) - 1) for values in means]
    if best_scores is not None and scores is not None and len(set(scores[2])) > 1:
        difference_N = best_scores[0].mean(0) - scores[0].mean(0)
        parts.append((clustered_error(difference_N, scores[2]) ** 2, len(set(scores[2])) - 1))
    return apart(float(np.mean(means[0]) - np.mean(means[1])), parts, count)


def _better(one: Row, other: Row) -> bool:
    """Whether the first has a higher score at no greater distance, or as high a one at a smaller."""
    gain, spared = (one[k] - other[k] for k in ("judge_score", "kl_to_reference"))
    return gain >= 0 and spared <= 0 and (gain > 0 or spared < 0)


def _measured(point: Row, name: str, digits: int = 2, factor: float = 1.0) -> str:
    error = point[f"{name}_se"]
    return f"{factor * point[name]:.{digits}f}" + ("" if error is None else f" ± {factor * error:.{digits}f}")


def _bracketed(point: Row, name: str, digits: int, factor: float = 1.0) -> str:
    """The mean with its interval over seeds and prompts, else with its standard error."""
    if not finite(point, f"{name}_low"):
        return _measured(point, name, digits, factor)
    mean, low, high = (f"{factor * point[name + end]:.{digits}f}" for end in ("", "_low", "_high"))
    return f"{mean} [{low}, {high}]"


def cells(point: Row) -> list[str]:
    """A point's line of the table, under HEAD."""
    measured = [_bracketed(point, "judge_score", 2), _measured(point, "kl_to_reference")]
    measured.append(f"{_bracketed(point, 'win_rate_vs_sft', 0, 100)} %")
    cost = "-" if point["kl_cost"] is None else f"{point['kl_cost']:.3g}"
    edge = "yes" if point["on_frontier"] else ""
    return [_name(point), _beta(point), cost, str(len(point["seeds"])), *measured, edge]


def label(point: Row) -> str:
    """A point's method, learning rate where there are several, and beta; of PPO's the KL cost too."""
    cost = point["kl_cost"]
    shown = f" (KL cost {cost:.2g})" if cost is not None and cost != point["beta"] else ""
    return f"{_name(point)} {_beta(point)}{shown}"


def _name(point: Row) -> str:
    rate = point["learning_rate"]
    return point["method"] if rate is None else f"{point['method']} lr {rate:g}"


def _beta(point: Row) -> str:
    return "-" if point["beta"] is None else f"{point['beta']:.15g}"


def render_text(points: Sequence[Row]) -> str:
    """The table of points for a terminal, in plain characters, and the methods at equal KL."""
    equal = at_equal_kl(points)
    return f"{lay_out([HEAD, *map(cells, points)])}\n{BARS}" + (f"\n{equal}" if equal else "")


def curves(points: Sequence[Row]) -> dict[str, list[Row]]:
    """Method (and learning rate, where there are several) -> its points from near to far."""
    names = dict.fromkeys(map(_name, points))
    return {name: sorted((p for p in points if _name(p) == name), key=lambda p: p["kl_to_reference"]) for name in names}


def matched(points: Sequence[Row], kl: float) -> dict[str, tuple[float, float | None]]:
    """Method -> judge score at a distance, linear between its two neighbouring points, with the standard error over the
    seeds; methods that do not reach so near and so far are left out."""
    scores: dict[str, tuple[float, float | None]] = {}
    for name, line in curves(points).items():
        for near, far in itertools.pairwise(line):
            low, high = near["kl_to_reference"], far["kl_to_reference"]
            if name not in scores and low <= kl <= high:
                share = (kl - low) / (high - low) if high > low else 0.0
                mean = (1 - share) * near["judge_score"] + share * far["judge_score"]
                errors = [end["judge_score_se"] for end in (near, far)]
                known = None not in errors
                scores[name] = (mean, math.hypot((1 - share) * errors[0], share * errors[1]) if known else None)
    return scores


def at_equal_kl(points: Sequence[Row]) -> str:
    """The methods at three distances that all of them reach: equal betas mean different distances. Empty for one."""
    lines = [line for line in curves(points).values() if len(line) > 1]
    if len(lines) < 2:
        return ""
    low, high = max(line[0]["kl_to_reference"] for line in lines), min(line[-1]["kl_to_reference"] for line in lines)
    if low >= high:
        return "At equal KL: the methods reach no common distance; other betas would."
    places = [low + share * (high - low) for share in (0.0, 0.5, 1.0)]
    texts = [
        f"at KL {kl:.2f}: "
        + ", ".join(
            f"{name} {mean:.2f}" + ("" if error is None else f" ± {error:.2f}")
            for name, (mean, error) in sorted(matched(points, kl).items(), key=lambda item: -item[1][0])
        )
        for kl in places
    ]
    return "Judge score at equal KL, between the points:\n" + "\n".join(f"  {text}" for text in texts)


def headline(points: Sequence[Row], chosen: str = "") -> str:
    """Which point scores highest, which are clearly below it and which cannot be told from it, and the frontier.

    `chosen`: of a sweep, whose winner is chosen by this very number (as in Comparison).
    """
    best = max(points, key=lambda point: point["judge_score"])
    edge = sorted((p for p in points if p["on_frontier"]), key=lambda p: p["kl_to_reference"])
    said = (
        f"The highest mean judge score is that of {label(best)}: "
        f"{_bracketed(best, 'judge_score', 2)}, at KL {_measured(best, 'kl_to_reference')}{_level(best, points)}. "
        f"On the frontier, from near to far: {', '.join(map(label, edge))}."
    )
    said += _gained(points)
    if chosen and len(points) > 1:
        said += f" It is the highest of {len(points)} on the prompts that chose it, so its own number is optimistic"
        said += ": the test part gives another." if chosen == "tested" else "; data.*.test_fraction would give another."
    return said


def _gained(points: Sequence[Row]) -> str:
    """Which points are clearly better than SFT over seeds and prompts, and which not clearly above its baselines."""
    rated = [point for point in points if finite(point, "win_rate_vs_sft_low")]
    better = [label(point) for point in rated if point["win_rate_vs_sft_low"] > 0.5]
    said = f" Clearly better than SFT over seeds and prompts: {', '.join(better) or 'none'}." if rated else ""
    level = [label(point) for point in points if point["gain"] is not None and point["gain_low"] <= 0]
    if level:
        said += f" Not clearly more than sharpening SFT or selecting among its answers gives: {', '.join(level)}."
    return said


def logged(points: Sequence[Row]) -> dict[str, float]:
    """Metrics of a comparison over seeds: `eval/<group>/judge_score` and others, with their intervals."""
    names = [f"{name}{end}" for name in (*MEASURES, "gain") for end in ("", "_low", "_high")]
    return {f"eval/{p['group']}/{name}": p[name] for p in points for name in names if finite(p, name)}


def _level(best: Row, points: Sequence[Row]) -> str:
    """Which other points are clearly below the best, with the correction for choosing the best of all of them."""
    others = [point for point in points if point is not best]
    if not others:
        return ""
    if all(point["below"] is None for point in others):
        return "; with one seed it cannot be said which are below it"
    parts = {
        f"clearly below it, over seeds and for {len(points)} points": [p for p in others if p["below"]],
        "cannot be told apart from it": [p for p in others if p["below"] is False],
        "one seed cannot say it of": [p for p in others if p["below"] is None],
    }
    return "".join(f"; {words}: {', '.join(map(label, some))}" for words, some in parts.items() if some)


def draw(points: Sequence[Row], table: Sequence[Row], dark: bool = False, small: bool = False) -> bytes:
    """PNG: a line per method over beta, with bars over seeds; full points are on the frontier, hollow ones are not."""
    figure, axes, ink = canvas(dark, small)
    colour = colours([point["method"] for point in points])
    for name, line in curves(points).items():
        method = line[0]["method"]
        x, y = ([point[k] for point in line] for k in ("kl_to_reference", "judge_score"))
        across, up = ([point[f"{k}_se"] or 0.0 for point in line] for k in ("kl_to_reference", "judge_score"))
        axes.errorbar(x, y, up, across, fmt="-", color=colour[method], elinewidth=1.4, capsize=3, label=name)
        for point in line:
            face = colour[method] if point["on_frontier"] else axes.get_facecolor()
            place = (point["kl_to_reference"], point["judge_score"])
            axes.plot(*place, "o", color=colour[method], markerfacecolor=face, markersize=8, zorder=4)
            axes.annotate(
                label(point).removeprefix(f"{name} "),
                place,
                (7, 6),
                textcoords="offset points",
                color=colour[method],
                fontsize=9,
                zorder=5,
            )
    for row in table:
        if row["model"] == "sft":
            place = (row["kl_to_reference"], row["judge_score"])
            axes.plot(*place, "D", color=colours(["sft"])["sft"], markersize=9, linestyle="none", label="sft")
    axes.legend(frameon=False, labelcolor=ink, loc="best")
    counts = {len(point["seeds"]) for point in points}
    low, high = min(counts), max(counts)
    seeds = f"{high} seeds" if low == high else f"{low} to {high} seeds"
    over = f"bars: standard error over {seeds}" if high > 1 else "one seed, no bars"
    note = f"numbers: beta (PPO: kl_coef); {over}; hollow: another point scores as high, nearer"
    axes.set_title(note, loc="left", fontsize=9, color=ink, alpha=0.8, pad=6)
    figure.suptitle("Judge score against distance from the SFT model", x=0.02, ha="left", color=ink, fontsize=12)
    return png(figure)
