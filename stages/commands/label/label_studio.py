"""Label Studio: tasks and a labelling configuration for it, and its JSON export.

Formats: https://labelstud.io/tags/pairwise and https://labelstud.io/tags/ranker, recorded from Label Studio itself
(tests/support/label_studio.py).
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from schemas.conversation import shown
from schemas.text import visible
from stages.commands.label.collected import (
    Told,
    Unreadable,
    groups_of,
    mapping,
    messages_of,
    text_of,
)
from stages.commands.rank.questions import Item, Question

TIE = "Equally good"
CONFIGS = {
    "ranking": """<View>
  <Header value="Rank the answers: drag the best one to the top."/>
  <Text name="prompt" value="$prompt"/>
  <List name="answers" value="$answers" title="Answers, best first"/>
  <Ranker name="rank" toName="answers"/>
</View>
""",
    "pairs": f"""<View>
  <Header value="Click the better answer."/>
  <Text name="prompt" value="$prompt"/>
  <Pairwise name="better" toName="answer_1,answer_2"/>
  <View style="display: grid; grid-template-columns: 1fr 1fr; gap: 1em">
    <Text name="answer_1" value="$answer_1"/>
    <Text name="answer_2" value="$answer_2"/>
  </View>
  <Choices name="tie" toName="prompt" choice="single">
    <Choice value="{TIE}"/>
  </Choices>
</View>
""",
}
"""Form -> the labelling configuration of a project."""


def tasks(items: Sequence[Item], seed: int) -> list[dict[str, Any]]:
    """What a project imports: one task per item, its answers in an order that the seed draws.

    The order is the same for all people, since Label Studio shows a task to everybody alike; the ids that it shows are
    places on the screen. The rows are made of `alignflow` in a task's `meta`, which its pages do not show.
    """
    return [_task(item, seed) for item in items]


def _task(item: Item, seed: int) -> dict[str, Any]:
    question, order = item.question, list(item.places)
    random.Random(f"{seed} {item.id}").shuffle(order)
    turns = [visible(shown(turn)) for turn in question.prompt]
    roles = [turn["role"] for turn in question.prompt]
    single = len(turns) == 1
    text = turns[0] if single else "\n\n".join(f"{role}: {turn}" for role, turn in zip(roles, turns, strict=True))
    kept = {"prompt": question.prompt, "texts": question.texts, "responses": question.responses}
    data: dict[str, Any] = {"prompt": text}
    answers = [visible(question.texts[place]) for place in order]
    if len(order) == 2:
        data |= {"answer_1": answers[0], "answer_2": answers[1]}
    numbered = enumerate(answers, 1)
    data["answers"] = [{"id": f"{number}", "title": f"Answer {number}", "body": answer} for number, answer in numbered]
    return {"data": data, "meta": {"alignflow": {**kept, "beside": question.beside, "shown": order}}}


def read(records: Sequence[Any]) -> Iterator[tuple[int, list[Told]]]:
    """(number, what was told) of each task of a JSON export. Raises Unreadable, at the task that is none."""
    for number, record in enumerate(records):
        try:
            yield number, _told(record)
        except Unreadable as problem:
            raise Unreadable(f"task {number}: {problem}") from problem


def _told(record: Any) -> list[Told]:
    task = mapping(record, "it")
    data = mapping(task.get("data"), "`data`")
    question, order = _question(data, task.get("meta"))
    answers = data.get("answers")
    shown = [one.get("id") if isinstance(one, dict) else None for one in answers] if isinstance(answers, list) else []
    ids = [str(number if id is None else id) for number, id in enumerate(shown or [None] * len(order), 1)]
    if len(set(ids)) != len(order):
        raise Unreadable("the ids of its `answers` are not one for each answer")
    annotations = task.get("annotations")
    if not isinstance(annotations, list):
        raise Unreadable("it has no `annotations`: export as JSON, not as JSON-MIN or CSV")
    told = []
    for one in annotations:
        annotation = mapping(one, "an annotation")
        by = annotation.get("completed_by")
        by = by.get("email", by.get("id")) if isinstance(by, dict) else by
        nobody = f"unknown {annotation.get('id', len(told))}"  # each somebody else
        who = nobody if by is None else f"user {by}" if isinstance(by, int) else str(by)
        verdict = None if annotation.get("was_cancelled") else _verdict(annotation.get("result"), order, ids)
        lead, at = annotation.get("lead_time"), annotation.get("updated_at") or annotation.get("created_at")
        seconds = float(lead) if isinstance(lead, int | float) else 0.0
        told.append(Told(question, tuple(sorted(order)), who, verdict, seconds, str(at or "")))
    return told


def _question(data: dict[str, Any], meta: Any) -> tuple[Question, list[int]]:
    """What was asked, and the numbers of the answers as they were shown; also of tasks that were not made here."""
    if isinstance(meta, dict) and "alignflow" in meta:
        kept = mapping(meta["alignflow"], "`meta.alignflow`")
        texts, order, responses = kept.get("texts"), kept.get("shown"), kept.get("responses")
        if not (isinstance(texts, list) and isinstance(order, list) and isinstance(responses, list)):
            raise Unreadable("`meta.alignflow` was changed")
        texts = [text_of(text, "an answer") for text in texts]
        if any(type(place) is not int or not 0 <= place < len(texts) for place in order) or len(order) < 2:
            raise Unreadable("`meta.alignflow` was changed")
        turns = kept.get("prompt")
        prompt = [dict(mapping(turn, "a message")) for turn in turns] if isinstance(turns, list) else []
        if not prompt:
            raise Unreadable("`meta.alignflow` was changed")
        return Question(prompt, texts, responses, mapping(kept.get("beside"), "`beside`")), order
    answers = data.get("answers")
    if isinstance(answers, list):
        texts = [text_of(mapping(one, "an answer").get("body"), "an answer's `body`") for one in answers]
    else:
        texts = [text_of(data.get(name), f"`data.{name}`") for name in ("answer_1", "answer_2")]
    return Question(messages_of(data.get("prompt")), texts, list(texts), {}), list(range(len(texts)))


def _verdict(result: Any, order: Sequence[int], ids: Sequence[str]) -> list[list[int]] | None:
    """The groups that an annotation's result says; None where nothing was chosen. `ids`: the answers' in that order."""
    if not isinstance(result, list):
        raise Unreadable("an annotation has no `result`")
    said: list[list[list[int]]] = []
    for one in result:
        kind, value = mapping(one, "a result").get("type"), mapping(one.get("value"), "a result's `value`")
        if kind == "pairwise" and len(order) == 2:
            if value.get("selected") not in ("left", "right"):
                raise Unreadable(f"`selected` is {value.get('selected')!r}, neither left nor right")
            said.append([[place] for place in (order if value["selected"] == "left" else order[::-1])])
        if kind == "ranker":
            ranked = value.get("ranker")
            lists = [ids for ids in ranked.values() if isinstance(ids, list)] if isinstance(ranked, dict) else [ranked]
            named = lists[0] if lists else None
            if not isinstance(named, list) or not all(str(id) in ids for id in named):
                raise Unreadable("a ranking does not name the task's answers")
            said.append(groups_of([[order[ids.index(str(id))]] for id in named], order))
        if kind == "choices" and value.get("choices") == [TIE] and len(order) == 2:
            said.append([sorted(order)])
    if len(said) > 1 and any(one != said[0] for one in said):
        raise Unreadable(f"an annotation both prefers an answer and says {TIE!r}; correct it there")
    return said[0] if said else None
