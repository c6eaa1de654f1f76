"""What a comparison says in sentences: which model is ahead, what was gained beyond sharpening, what cannot be said."""

import itertools
from collections.abc import Sequence

from stages.compare import frontier, head_to_head
from stages.compare.head_to_head import STARTING_POINTS, Duel
from stages.compare.table import Comparison, verdict

PAIRS = 6  # lines of pairs under the table of a terminal
COVERS = (
    "Intervals: 95 %, over prompts. Each model is one training run, and another seed may change the order: this is "
    "about these models, not their methods; `alignflow run --seeds 0,1,2` or a sweep compares methods."
)


def findings(comparison: Comparison) -> list[str]:
    """The headline, a sentence each; what the intervals cover comes last. Of several seeds it is the frontier's."""
    if comparison.points:
        return [frontier.headline(comparison.points, comparison.chosen)]
    aligned = [row["model"] for row in comparison.table if row["model"] not in STARTING_POINTS]
    if not aligned:
        return ["No aligned model is among these yet."]
    lines = [*_ahead(comparison, aligned), _against_sft(comparison), *_beyond_sharpening(comparison, aligned)]
    if flag := head_to_head.overoptimised(comparison.first_duels, comparison.table):
        lines.append(flag)
    return [*filter(None, lines), COVERS]


def best(comparison: Comparison) -> list[str]:
    """The first aligned model, or point of the frontier, and all that cannot be told apart from it."""
    if comparison.points:
        ranked = sorted(comparison.points, key=lambda point: -point["judge_score"])
        return [frontier.label(point) for point in ranked if not point["below"]]
    aligned = [row["model"] for row in comparison.table if row["model"] not in STARTING_POINTS]
    duels = comparison.first_duels
    told = {other for one, other in duels if one in aligned[:1] and duels[one, other].beats}
    return [name for name in aligned if name not in told]


def pair_lines(comparison: Comparison) -> list[str]:
    """A line per pair of aligned models that the headline leaves out, where these are few; the report has all."""
    aligned = [row["model"] for row in comparison.table if row["model"] not in STARTING_POINTS][1:]
    pairs = list(itertools.combinations(aligned, 2))
    duels = comparison.first_duels
    return [head_to_head.sentence(duels[pair]) for pair in pairs if pair in duels] if len(pairs) <= PAIRS else []


def _ahead(comparison: Comparison, aligned: Sequence[str]) -> list[str]:
    """Which model is first, and from which it can be told apart; nothing for a single one."""
    duels = [comparison.first_duels.get((aligned[0], other)) for other in aligned[1:]]
    measured = [duel for duel in duels if duel is not None and duel.win_rate is not None]
    if not duels:
        return []
    if len(measured) < len(duels):
        why = next((duel.reason for duel in duels if duel is not None and duel.reason), "they were not compared")
        return [f"Which aligned model is best cannot be said: {why.rstrip('.')}."]
    first, beaten = aligned[0], [duel for duel in measured if duel.beats]
    level = [duel for duel in measured if not duel.clear]
    lost = [duel for duel in measured if duel.clear and not duel.beats]
    parts = []
    if beaten:
        parts.append(f"{first} beats {_listed(beaten)}")
    if level:
        parts.append(f"cannot tell {first} from {_listed(level)} apart")
    if lost:  # beats more of the others, yet not this one
        parts.append(f"{first} loses against {_listed(lost)}")
    return [f"Head to head: {'; '.join(parts)}."]


def _listed(duels: Sequence[Duel]) -> str:
    *first, last = [f"{duel.other} {head_to_head.measured(duel)}" for duel in duels]
    return f"{', '.join(first)} and {last}" if first else last


def _against_sft(comparison: Comparison) -> str:
    """How many aligned models are clearly better than SFT, at each temperature."""
    rows = [row for row in comparison.table if row["model"] not in STARTING_POINTS]
    if not any(verdict(row) for row in rows):
        return ""
    better = [row["model"] for row in rows if verdict(row) == "better"]
    who = f"{', '.join(better)}, of {len(rows)} aligned models" if better else "no aligned model"
    parts = [f"Clearly better than SFT: {'all aligned models' if len(better) == len(rows) else who}"]
    if len(rows) == 1:
        parts = [f"{rows[0]['model']} is {'' if better else 'not '}clearly better than SFT"]
    for temperature, duels in list(comparison.duels.items())[1:]:
        others = [row["model"] for row in rows if (row["model"], "sft") in duels]
        above = [name for name in others if duels[name, "sft"].beats]
        if others:
            parts.append(f"at temperature {temperature:g}: {', '.join(above) or 'none'}")
    return f"{'; '.join(parts)}."


def _beyond_sharpening(comparison: Comparison, aligned: Sequence[str]) -> list[str]:
    """Which models are not clearly above the curve of the baselines."""
    if not comparison.gains and comparison.duels and 1.0 not in comparison.duels:
        what = "baselines are measured at temperature 1, which evaluate.temperatures lacks"
        return [f"What was gained beyond sharpening SFT cannot be said: {what}."]
    if not comparison.gains:
        return []
    level = [name for name in aligned if name in comparison.gains and not comparison.gains[name].clear]
    if not level:
        return ["Every aligned model is clearly above what sharpening or selecting gives as near to SFT."]
    names = ", ".join(level)
    return [f"Nothing gained beyond sharpening SFT or selecting among its answers: {names}."]
