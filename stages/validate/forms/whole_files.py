"""Public data sets whose rows speak of one thing only together: the answers to one prompt, the messages of one tree."""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any

from schemas.config.data import Kind
from stages.validate.forms.cells import BadRow, Row, number, text

Numbered = tuple[int, Row | BadRow | str]
"""A row, what is wrong with it, or a note on why it gives none, and the number of its source row."""

_STEERED = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def steered(prompt: object) -> object:
    """HelpSteer's prompts of several turns: "Hi\\n<extra_id_1>Assistant\\nHello.\\n<extra_id_1>User\\nWho are you?"."""
    if not isinstance(prompt, str) or "<extra_id_1>" not in prompt:
        return prompt
    first, *rest = _STEERED.split(prompt)
    said = [("User", first), *zip(rest[::2], rest[1::2], strict=True)]
    return [{"role": role.lower(), "content": words} for role, words in said if words.strip()]


def helpsteer(rows: Iterable[tuple[int, Row]], kind: Kind) -> Iterator[Numbered]:
    """{"prompt": "Why?", "response": "So.", "helpfulness": 3, "correctness": 4, ...}: rows of one prompt are ranked."""
    answers: dict[str, list[tuple[int, Row]]] = {}
    for place, row in rows:
        prompt = row.get("prompt")
        if not isinstance(prompt, str):
            yield place, BadRow("prompt", "missing" if prompt is None else "not_text", prompt)
        else:
            answers.setdefault(prompt, []).append((place, row))
    for prompt, group in answers.items():
        places = [place for place, _ in group]
        texts, scores = ([row.get(name) for _, row in group] for name in ("response", "helpfulness"))
        yield from _ranked(places, steered(prompt), texts, scores, "scores", kind)


def _ranked(
    places: list[int], prompt: object, texts: list[Any], levels: list[Any], by: str, kind: Kind
) -> Iterator[Numbered]:
    """The answers to one prompt as one ranking, or as all pairs of different levels. One answer alone gives none.

    An answer without a text or a level is put aside by itself.
    """
    judged: list[tuple[int, str, float]] = []
    for place, answer, level in zip(places, texts, levels, strict=True):
        try:
            judged.append((place, text(answer, "response"), number(level, by)))
        except BadRow as bad:
            yield place, bad
    heights = [level if by == "scores" else -level for _, _, level in judged]
    if len(judged) < 2:
        yield from ((place, BadRow("prompt", "one_answer", prompt)) for place, _, _ in judged)
    elif kind == "ranking":
        answers = [answer for _, answer, _ in judged]
        yield judged[0][0], {"prompt": prompt, "responses": answers, by: [level for _, _, level in judged]}
    elif len(set(heights)) == 1:
        yield from ((place, BadRow(by, "tie", level)) for place, _, level in judged)
    else:
        for (height, (place, a, _)), (other, (_, b, _)) in combinations(zip(heights, judged, strict=True), 2):
            if height != other:
                yield place, {"prompt": prompt, "a": a, "b": b, "label": "a" if height > other else "b"}


_DELETED = (True, "true", "True", "TRUE", "1")  # in CSV all cells are texts
_DEEPEST = 1000
"""Messages before a reply; a message that is among its own parents would go on for ever."""


def oasst(rows: Iterable[tuple[int, Row]], kind: Kind) -> Iterator[Numbered]:
    """{"message_id": "2", "parent_id": "1", "text": "Kiwi.", "role": "assistant", "rank": 0}: rank 0 is the best."""
    nodes: dict[str, tuple[int, Row]] = {}
    replies: dict[str, list[str]] = {}
    for place, row in rows:
        name, parent = row.get("message_id"), row.get("parent_id")
        if not isinstance(name, str) or not isinstance(row.get("text"), str) or name in nodes:
            yield place, BadRow("message_id" if name in (None, "") or name in nodes else "text", "missing", name)
            continue
        nodes[name] = place, row
        if isinstance(parent, str) and parent:
            replies.setdefault(parent, []).append(name)
    for name, (place, row) in nodes.items():
        if row.get("role") == "prompter":
            yield from _replies(name, [nodes[child] for child in replies.get(name, ())], nodes, place, kind)


def _replies(
    name: str, children: list[tuple[int, Row]], nodes: Mapping[str, tuple[int, Row]], place: int, kind: Kind
) -> Iterator[Numbered]:
    """The replies to one message of a user, with the conversation before it."""
    path: list[dict[str, Any]] = []
    at: object = name
    while isinstance(at, str) and at:
        if at not in nodes or len(path) == _DEEPEST:
            yield place, BadRow("parent_id", "missing_parent" if at not in nodes else "too_deep", at)
            return
        row = nodes[at][1]
        path.append({"role": row.get("role"), "content": row["text"]})
        at = row.get("parent_id")
    prompt = path[::-1]
    if kind == "prompt":
        yield place, {"prompt": prompt}
        return
    answers: list[tuple[int, str, float | None]] = []
    for reply, row in children:
        if row.get("role") == "assistant" and row.get("deleted") not in _DELETED:
            try:
                rank = None if row.get("rank") in (None, "") else number(row["rank"], "rank")
            except BadRow as bad:
                yield reply, bad
            else:
                answers.append((reply, row["text"], rank))
    ranked = [answer for answer in answers if answer[2] is not None]
    if kind == "sft":
        best = min(ranked, key=lambda answer: answer[2] or 0.0) if ranked else next(iter(answers), None)
        if best is None:
            yield place, "no_answer"
        else:
            yield best[0], {"prompt": prompt, "response": best[1]}
    elif len(ranked) < 2:
        yield place, "fewer_than_two_ranked"
    else:
        places, texts, ranks = (list(column) for column in zip(*ranked, strict=True))
        yield from _ranked(places, prompt, texts, ranks, "ranks", kind)


def oasst_trees(rows: Iterable[tuple[int, Row]], kind: Kind) -> Iterator[Numbered]:
    """{"message_tree_id": "1", "prompt": {"text": "Name a fruit.", "role": "prompter", "replies": [...]}}

    A branch that gives nothing is noted where others of its tree give rows.
    """
    for place, row in rows:
        flat: list[tuple[int, Row]] = []
        waiting: list[tuple[Any, str | None]] = [(row.get("prompt"), None)]
        while waiting:
            node, parent = waiting.pop()
            if not isinstance(node, dict) or not isinstance(node.get("replies") or [], list):
                yield place, BadRow("prompt", "not_a_message", node)
                flat = []
                break
            name = str(len(flat))
            flat.append((place, {**node, "message_id": name, "parent_id": parent}))
            waiting += [(reply, name) for reply in reversed(node.get("replies") or [])]
        given = [item for _, item in oasst(flat, kind)]
        useful = any(isinstance(item, Mapping) for item in given)
        yield from ((place, item.reason if useful and isinstance(item, BadRow) else item) for item in given)
