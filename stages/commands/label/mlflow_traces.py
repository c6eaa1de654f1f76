"""MLflow: traces as JSON (`Trace.to_json`, one a line or a list), with the assessments that people made in its review.

A person's feedback of yes or no on a trace is a thumb for the answer that the trace holds.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from stages.commands.label.collected import Told, Unreadable, mapping, messages_of, text_of
from stages.commands.rank.questions import Question

THUMBS = {
    "yes": "up",
    "true": "up",
    "up": "up",
    "good": "up",
    "pass": "up",
    "no": "down",
    "false": "down",
    "down": "down",
}
THUMBS |= {"bad": "down", "fail": "down"}
PROMPTS = ("messages", "prompt", "question", "input", "inputs", "query")
ANSWERS = ("response", "answer", "output", "outputs", "content", "completion")


def read(records: Sequence[Any], name: str | None) -> Iterator[tuple[int, list[Told]]]:
    """(number, what was told) of each trace. Raises Unreadable, at the trace that is none.

    name: the assessment that counts, where people made several.
    """
    every = [_assessments(record, number) for number, record in enumerate(records)]
    names = dict.fromkeys(one["assessment_name"] for told in every for one in told)
    if name is None and len(names) > 1:
        raise Unreadable(f"people made several assessments: {', '.join(names)}; name one with --name")
    for number, (record, told) in enumerate(zip(records, every, strict=True)):
        told = [one for one in told if name in (None, one["assessment_name"])]
        try:
            yield number, [_told(record, one) for one in told]
        except Unreadable as problem:
            raise Unreadable(f"trace {number}: {problem}") from problem


def unused(records: Sequence[Any]) -> str:
    """The inputs of traces that no row has, beside the question: a retriever's documents, for example; or empty."""
    names: dict[str, None] = {}
    for record in records:
        taken = _root(record)["Inputs"]
        if isinstance(taken, dict):
            names |= dict.fromkeys(map(str, taken.keys() - {next((one for one in PROMPTS if one in taken), None)}))
    return ", ".join(sorted(names))


def _assessments(record: Any, number: int) -> list[dict[str, Any]]:
    """A trace's feedback from people which no later one of theirs replaces."""
    try:
        info = mapping(mapping(record, "it").get("info"), "`info`")
        given = [mapping(one, "an assessment") for one in info.get("assessments") or []]
        people = [one for one in given if mapping(one.get("source"), "a source").get("source_type") == "HUMAN"]
        for one in people:
            text_of(one.get("assessment_name"), "an assessment's name")
    except Unreadable as problem:
        raise Unreadable(f"trace {number}: {problem}") from problem
    return [one for one in people if "feedback" in one and one.get("valid", True)]


def _told(record: dict[str, Any], assessment: dict[str, Any]) -> Told:
    root = _root(record)
    question = _question(root)
    value = mapping(assessment["feedback"], "a feedback").get("value")
    thumb = THUMBS.get(str(value).lower())
    if thumb is None:
        raise Unreadable(f"the assessment {assessment['assessment_name']} is {value!r}, neither yes nor no")
    who = text_of(mapping(assessment["source"], "a source").get("source_id"), "an assessment's source_id")
    note = assessment.get("rationale")
    at = str(assessment.get("last_update_time") or assessment.get("create_time", ""))
    return Told(question, (0,), who, thumb, 0.0, at, note if isinstance(note, str) else "")


def _root(record: dict[str, Any]) -> dict[str, Any]:
    """What the trace's first span took and gave."""
    spans = mapping(record.get("data"), "`data`").get("spans")
    for span in spans if isinstance(spans, list) else []:
        if not mapping(span, "a span").get("parent_span_id"):
            attributes = mapping(span.get("attributes"), "a span's attributes")
            return {side: _plain(attributes.get(f"mlflow.span{side}")) for side in ("Inputs", "Outputs")}
    raise Unreadable("it has no span without a parent")


def _plain(value: Any) -> Any:
    """An attribute, which MLflow writes as JSON in a text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _question(root: dict[str, Any]) -> Question:
    taken, given = root["Inputs"], root["Outputs"]
    if isinstance(taken, dict):
        taken = next((taken[name] for name in PROMPTS if name in taken), None)
    if isinstance(given, dict) and isinstance(given.get("choices"), list) and given["choices"]:
        given = mapping(given["choices"][0], "a choice").get("message")  # as OpenAI's clients answer
    while isinstance(given, dict):
        given = next((given[name] for name in ANSWERS if name in given), None)
    answer = text_of(given, "its output")
    return Question(messages_of(taken), [answer], [answer], {})
