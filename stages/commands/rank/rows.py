"""Rows to train on, made of what people said; and what is worth saying about their work.

What several people said of one prompt becomes one row. As rows of their own, equal rankings would count once, as any
repeated row does, and one person against two would weigh as much as they.

- one verdict: `order`
- several, or pairs: all their `comparisons`, of which `validate` takes the majority; a tie there is no vote
- thumbs: the majority; an answer with as many up as down gets no row
"""

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from schemas.commands import RankForm
from stages.commands.rank.agreement import alpha
from stages.commands.rank.questions import Item, Question
from stages.commands.rank.verdicts import Groups, Verdict
from stages.runtime.workspace import write_whole


def rows_of(items: Sequence[Item], verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    """Rows of kind `ranking`, of thumbs `feedback`, in the order of the file; items that nobody judged give none."""
    judged: dict[str, list[Any]] = {}
    for one in verdicts:
        if one.verdict is not None:
            judged.setdefault(one.item, []).append(one.verdict)
    rows: list[dict[str, Any]] = []
    rankings: dict[str, tuple[Question, list[Groups]]] = {}
    for item in items:
        told = judged.get(item.id, [])
        if any(isinstance(one, str) for one in told):
            net = told.count("up") - told.count("down")
            text = item.question.texts[item.places[0]]
            rows += [item.question.row(completion=text, label=net > 0)] if net else []
        elif told:
            rankings.setdefault(item.question.id, (item.question, []))[1].extend(told)
    for question, told in rankings.values():
        if len(told) == 1 and sum(map(len, told[0])) == len(question.texts):
            verdict: dict[str, Any] = {"order": [group if group[1:] else group[0] for group in told[0]]}
        else:
            verdict = {"comparisons": [one for groups in told for one in _comparisons(groups)]}
        rows.append(question.row(responses=question.responses, **verdict))
    return rows


def _comparisons(groups: Groups) -> list[dict[str, int | None]]:
    """A verdict as comparisons of every two of its answers."""
    level = {place: number for number, group in enumerate(groups) for place in group}
    return [
        {"a": a, "b": b, "winner": None if level[a] == level[b] else min(a, b, key=level.__getitem__)}
        for a, b in combinations(sorted(level), 2)
    ]


def write(rows: Iterable[dict[str, Any]], file: Path) -> None:
    """One JSON object per line; the whole file or nothing."""
    lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    write_whole(file, lines.encode("utf-8", "backslashreplace").decode())  # half an emoji as JSON escapes it


def units(verdicts: Iterable[Verdict]) -> list[list[float]]:
    """What `alpha` takes: per answer its ranks, per pair who won, per thumb up or down, one value from each person."""
    values: dict[tuple[str, int], list[float]] = {}
    for one in verdicts:
        if isinstance(one.verdict, str):
            values.setdefault((one.item, 0), []).append(float(one.verdict == "up"))
        elif one.verdict is not None:
            rank, places = {}, sum(map(len, one.verdict))
            for group in one.verdict:
                rank |= dict.fromkeys(group, len(rank) + (len(group) + 1) / 2)
            for place in sorted(rank)[: None if places > 2 else 1]:  # of two the one says what the other does
                values.setdefault((one.item, place), []).append(rank[place])
    return [told for told in values.values() if len(told) > 1]


def numbers(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """For programs: what each has judged and in which time, and how far they agree; null where nothing is shared."""
    known = {item.id for item in items}
    others = sum(one.item not in known for one in verdicts)
    verdicts = [one for one in verdicts if one.item in known]
    people = {}
    for name in dict.fromkeys(one.annotator for one in verdicts):
        own = [one for one in verdicts if one.annotator == name]
        skipped = sum(one.verdict is None for one in own)
        time = round(median(one.seconds for one in own), 1)
        people[name] = {"judged": len(own) - skipped, "skipped": skipped, "median_seconds": time}
    shared = Counter(one.item for one in verdicts if one.verdict is not None)
    several = sum(count > 1 for count in shared.values())
    value = alpha(units(verdicts)) if several else None
    return {"items": len(items), "people": people, "shared": several, "alpha": value, "left_out": others}


def summary(items: Sequence[Item], verdicts: Sequence[Verdict]) -> list[str]:
    """The numbers as lines for people."""
    told = numbers(items, verdicts)
    others, several, value = told["left_out"], told["shared"], told["alpha"]
    lines = [f"{others} verdicts are on items that the file does not have: left out"] if others else []
    for name, own in told["people"].items():
        time = f"median {own['median_seconds']:.1f} s per item"
        lines.append(f"{name}: {own['judged']} of {told['items']} judged, {own['skipped']} skipped, {time}")
    if several:
        how = "not defined, all values are equal" if value is None else f"{value:.2f} (1 is full, 0 that of chance)"
        lines.append(f"agreement on the {several} items that several judged: Krippendorff's alpha {how}")
    return lines


def next_command(output: Path, form: RankForm) -> str:
    """The command that checks the rows."""
    kind = "feedback" if form == "thumbs" else "ranking"
    return shlex.join(["alignflow", "validate", str(output), "--kind", kind, "--out", str(output.with_suffix(""))])
