"""Rows of kind `ranking`: several answers to a prompt, and which of them is better.

prompt + responses (texts, or objects with `text` and `model`), with one of `scores` (higher is better), `order`
(indices or models, best first; a list within is a tie), `ranks` (1 is best) or `comparisons` ({a, b, winner}: indices
or models; winner null, 0 or "tie" is a tie); or answers that carry `rank` or `score` within themselves. Where they are
empty, nobody has ranked the answers yet: such a row is noted, and gives its prompt only. Where several are filled in
they must agree; against `scores`, which a judge gives, what people said counts, and the row is noted.
Identical answers become one. Answers that contradict each other on one pair are outvoted or tie. Longer cycles stay:
independent noisy judgements make them, and a Bradley-Terry loss over single comparisons is fit for them.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from stages.validate.forms.cells import BadRow, Parsed, Row, listed, number, text, turns
from stages.validate.forms.columns import with_tools
from stages.validate.forms.labels import side_of

_TIES = (None, 0, "")
_EMPTY = (None, [], "")
_TEXTS = ("text", "content", "answer", "response", "completion", "output", "value")
_WITHIN = {"ranks": ("rank",), "scores": ("score", "overall_score", "rating", "reward")}
"""Ranking -> the keys under which answers carry it within themselves."""


def ranking(row: Row) -> Parsed:
    """Different answers and the pairs (better, worse) of them. Raises BadRow."""
    prompt = turns(row.get("prompt"), "prompt")
    answers = listed(row.get("responses"), "responses")
    texts, names = _responses(answers)
    row = _with_levels(row, answers)
    different = {answer.strip(): answer for answer in reversed(texts)}  # reversed: the first of equals stays
    places = {answer: place for place, answer in enumerate(dict.fromkeys(answer.strip() for answer in texts))}
    merged = [places[answer.strip()] for answer in texts]
    if not row.keys() & {"comparisons", *_LEVELS}:
        raise BadRow("scores", "missing")
    notes = ["identical_answers"] * (len(places) < len(texts))
    by, pairs, margins, odd = _verdict(row, names, merged)
    notes += odd
    if not pairs:
        notes.append("not_ranked" if by is None else "all_tied")
    sides = {"winners": [pair[0] for pair in pairs], "losers": [pair[1] for pair in pairs]}
    responses = [different[answer] for answer in places]
    return {"prompt": prompt, "responses": responses, **sides, "margins": margins, "notes": notes}


def _verdict(
    row: Row, names: Sequence[str | None], merged: list[int]
) -> tuple[str | None, list[tuple[int, int]], list[float] | None, list[str]]:
    """The column that decides, the pairs (better, worse) that it tells of, their margins, and what is odd about it."""
    given = [name for name in ("comparisons", *_LEVELS) if row.get(name) not in _EMPTY]
    told: dict[str, list[tuple[int, int]]] = {}
    margins: list[float] | None = None
    odd: list[str] = []
    for name in given:
        values = listed(row[name], name)
        if name == "comparisons":
            told[name], odd = _from_comparisons(values, names, merged)
        else:
            told[name], levels = _from_levels(_LEVELS[name](values, names, name), merged)
            margins = levels if name == "scores" else margins
    if not given:
        return None, [], None, []
    by = next((name for name in ("order", "ranks", "comparisons") if name in told), "scores")
    for name in given:
        if name != "scores" and not set(told[name]) <= set(told[by]):
            raise BadRow(name, "verdicts_differ", row[name])
    if "scores" in told and set(told["scores"]) != set(told[by]):
        return by, told[by], None, [*odd, "scores_overruled"]
    return by, told.get("scores", told[by]), margins, odd  # the margins are in the scores' order of the pairs


def generated(row: Row) -> Parsed:
    """A ranking that stage `generate` made: empty answers are left out with their scores and comparisons, and noted.

    A model sometimes answers nothing, which does not make its rows bad.
    """
    prompt = with_tools(turns(row["prompt"], "prompt"), row.get("tools"), "tools")
    texts = row["responses"]
    used = [place for place, answer in enumerate(texts) if not _unusable(answer)]
    notes = ["empty_answers"] * (len(used) < len(texts))
    if len(used) < 2:
        nothing = {"responses": [texts[i] for i in used], "winners": [], "losers": [], "margins": None}
        return {"prompt": prompt, **nothing, "notes": [*notes, "all_tied"]}
    places = {old: new for new, old in enumerate(used)}
    fewer: dict[str, Any] = {**row, "responses": [texts[i] for i in used]}
    if row.get("scores"):
        fewer["scores"] = [row["scores"][i] for i in used]
    if row.get("comparisons"):
        fewer["comparisons"] = [
            {side: places.get(c[side]) for side in ("a", "b", "winner")}
            for c in row["comparisons"]
            if c["a"] in places and c["b"] in places
        ]
        if not fewer["comparisons"]:
            fewer["scores"] = [0] * len(used)
    parsed = ranking(fewer)
    return {**parsed, "prompt": prompt, "notes": [*notes, *parsed["notes"]]}


def _unusable(answer: str) -> bool:
    invisible = all(letter.isspace() or unicodedata.category(letter) in ("Cc", "Cf") for letter in answer)
    return invisible or "\x00" in answer


def _responses(values: list[Any]) -> tuple[list[str], list[str | None]]:
    """The answers' texts, and the models they came from where that is given."""
    if len(values) < 2:
        raise BadRow("responses", "fewer_than_two", values)
    texts: list[str] = []
    names: list[str | None] = []
    for value in values:
        named = isinstance(value, dict)
        said = next((value[key] for key in _TEXTS if value.get(key) is not None), None) if named else value
        texts.append(text(said, "responses"))
        names.append(value.get("model") if named and isinstance(value.get("model"), str) else None)
    return texts, names


def _with_levels(row: Row, answers: list[Any]) -> Row:
    """The row with the ranks or scores that its answers carry, where it says nothing else of them."""
    if any(row.get(name) not in _EMPTY for name in ("comparisons", *_LEVELS)):
        return row
    for name, keys in _WITHIN.items():
        for key in keys:
            levels = [answer.get(key) if isinstance(answer, dict) else None for answer in answers]
            if all(level is not None for level in levels):
                return {**row, name: levels}
    return row


def _place(value: object, names: Sequence[str | None], column: str) -> int:
    """Which answer a value names: its index from 0, or its model."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return value
    if isinstance(value, str) and names.count(value) == 1:
        return names.index(value)
    raise BadRow(column, "unknown_answer", value)


def _numbers(values: list[Any], names: Sequence[str | None], column: str) -> list[float]:
    """The level of each answer, from scores or ranks."""
    if len(values) != len(names):
        raise BadRow(column, f"wrong_number_of_{column}", values)
    return [-number(value, column) if column == "ranks" else number(value, column) for value in values]


def _order(values: list[Any], names: Sequence[str | None], column: str) -> list[float]:
    """The level of each answer, from the answers' numbers or models, best first."""
    level: dict[int, float] = {}
    for rank, value in enumerate(values):
        for tied in value if isinstance(value, list) else [value]:
            place = _place(tied, names, column)
            if place in level:
                raise BadRow(column, "not_a_permutation", values)
            level[place] = -rank
    if len(level) != len(names):
        raise BadRow(column, "not_a_permutation", values)
    return [level[place] for place in range(len(names))]


_LEVELS = {"scores": _numbers, "order": _order, "ranks": _numbers}


def _from_levels(levels: list[float], merged: list[int]) -> tuple[list[tuple[int, int]], list[float]]:
    """All pairs (better, worse) of a full ranking and their differences. Identical answers take their mean."""
    groups: list[list[float]] = [[] for _ in range(max(merged) + 1)]
    for place, level in zip(merged, levels, strict=True):
        groups[place].append(level)
    # Equal levels are taken as they are: their mean may round to another number, and so make a pair of a tie.
    mean = [group[0] if len(set(group)) == 1 else fmean(group) for group in groups]
    pairs = [
        (i, j) if mean[i] > mean[j] else (j, i) for i, j in combinations(range(len(mean)), 2) if mean[i] != mean[j]
    ]
    return pairs, [mean[i] - mean[j] for i, j in pairs]


def _from_comparisons(
    values: list[Any], names: Sequence[str | None], merged: list[int]
) -> tuple[list[tuple[int, int]], list[str]]:
    """The pairs (better, worse) that the comparisons tell of, by majority where one pair was compared repeatedly."""
    votes: dict[tuple[int, int], list[int]] = {}
    for value in values:
        winner, loser = _judgement(value, names)
        if winner is not None and merged[winner] != merged[loser]:
            i, j = sorted((merged[winner], merged[loser]))
            votes.setdefault((i, j), []).append(1 if merged[winner] == i else -1)
    contradictory = any(min(vote) < 0 < max(vote) for vote in votes.values())
    pairs = [(i, j) if sum(vote) > 0 else (j, i) for (i, j), vote in votes.items() if sum(vote)]
    return pairs, ["contradictory"] * contradictory + ["cycle"] * has_cycle(pairs)


def _judgement(value: object, names: Sequence[str | None]) -> tuple[int | None, int]:
    """(winner, loser) of one comparison; the winner is None in a tie."""
    if not isinstance(value, dict):
        raise BadRow("comparisons", "not_a_comparison", value)
    if value.get("a") is None or value.get("b") is None or "winner" not in value:
        raise BadRow("comparisons", "not_a_comparison", value)
    a, b = (_place(value[side], names, "comparisons") for side in ("a", "b"))
    if a == b:
        raise BadRow("comparisons", "compared_with_itself", value)
    winner = value["winner"]
    if isinstance(winner, bool):
        raise BadRow("comparisons", "winner_not_compared", value)
    # A model may be called "b" and be on side a: names go before sides. An index 0 goes before 0 for a tie.
    for first, second in ((value["a"], value["b"]), ("a", "b")):
        if winner is not None and winner in (first, second):
            return (a, b) if winner == first else (b, a)
    side = side_of(winner)
    if winner in _TIES or side == "tie":
        return None, b
    if side is not None:
        return (a, b) if side == "a" else (b, a)
    raise BadRow("comparisons", "winner_not_compared", winner)


def has_cycle(pairs: Iterable[tuple[int, int]]) -> bool:
    """Whether some answer beats, over others, itself: taking away unbeaten answers one by one leaves something."""
    beaten_by: dict[int, list[int]] = {}
    losses: Counter[int] = Counter()
    for winner, loser in set(pairs):
        beaten_by.setdefault(winner, []).append(loser)
        losses[loser] += 1
    unbeaten = [answer for answer in beaten_by if not losses[answer]]
    while unbeaten:
        for loser in beaten_by.pop(unbeaten.pop(), ()):
            losses[loser] -= 1
            if not losses[loser]:
                unbeaten.append(loser)
    return bool(beaten_by)
