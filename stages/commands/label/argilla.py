"""Argilla: the JSON that `dataset.records.to_json` writes (Argilla 2; a record of Argilla 1 has the same parts).

A field is `prompt`, `instruction` or `question`; the others hold answers. A ranking question's values, and a label
question's, are the names of the fields that hold them, or of a tie.

Argilla 2 keeps a ranking that was made on its pages as values with their ranks, and `to_json` writes the values alone,
in the order of the options (https://github.com/argilla-io/argilla/issues/5712). Lists that are all alike are refused.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from stages.commands.label.collected import Told, Unreadable, groups_of, mapping, messages_of, text_of
from stages.commands.rank.questions import Question

PROMPTS = ("prompt", "instruction", "question")
TIES = {"tie", "equal", "both", "same"}
SUBMITTED = "submitted"


def read(records: Sequence[Any]) -> Iterator[tuple[int, list[Told]]]:
    """(number, what was told) of each record. Raises Unreadable, at the record that is none."""
    orders: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for number, record in enumerate(records):
        try:
            yield number, _told(mapping(record, "it"), orders)
        except Unreadable as problem:
            raise Unreadable(f"record {number}: {problem}") from problem
    if orders and all(len(seen) == 1 for seen in orders.values()):
        order = ", ".join(next(iter(next(iter(orders.values())))))
        raise Unreadable(
            f"every ranking is {order}: Argilla's to_json loses the ranks that people gave; export the records over "
            "its API, where each value has its `rank`"
        )


def _told(record: dict[str, Any], orders: dict[tuple[str, ...], set[tuple[str, ...]]]) -> list[Told]:
    """What was said of a record. `orders`: names -> the orders in which lists without ranks have had them."""
    fields = mapping(record.get("fields"), "`fields`")
    prompt = next((name for name in PROMPTS if name in fields), None)
    if prompt is None:
        raise Unreadable(f"`fields` has none of {', '.join(PROMPTS)}")
    names = [name for name in fields if name != prompt]
    texts = [text_of(fields[name], f"field {name}") for name in names]
    if len(texts) < 2:
        raise Unreadable("`fields` has fewer than two answers")
    metadata = record.get("metadata")
    beside = {f"metadata_{name}": value for name, value in metadata.items()} if isinstance(metadata, dict) else {}
    question = Question(messages_of(fields[prompt]), texts, list(texts), beside)
    places, told = tuple(range(len(texts))), []
    for response in _responses(record.get("responses") or {}):
        who = text_of(response.get("user_id"), "a response's `user_id`")
        value, submitted = response.get("value"), response.get("status", SUBMITTED) == SUBMITTED
        verdict = _groups(value, names) if submitted else None
        if verdict is not None and isinstance(value, list) and not any(isinstance(one, dict) for one in value):
            orders.setdefault(tuple(sorted(map(str, value))), set()).add(tuple(map(str, value)))
        told.append(Told(question, places, who, verdict))
    return told


def _responses(value: Any) -> list[dict[str, Any]]:
    """The responses of the only question that has any."""
    if not isinstance(value, dict):
        raise Unreadable("`responses` is not an object of questions: export with records.to_json")
    asked = {name: given for name, given in value.items() if given}
    if len(asked) > 1:
        raise Unreadable(f"several questions were answered: {', '.join(asked)}; export one")
    given = next(iter(asked.values()), [])
    if not isinstance(given, list):
        raise Unreadable("the responses to a question are not a list")
    return [mapping(one, "a response") for one in given]


def _groups(value: Any, names: Sequence[str]) -> list[list[int]]:
    """A label, a list of names with the best first, or of {value, rank}, where equal ranks are ties."""
    if isinstance(value, str):
        if value.lower() in TIES and len(names) == 2:
            return [list(range(len(names)))]
        if value not in names or len(names) != 2:
            raise Unreadable(
                f"the label {value!r} is none of the two answers' fields, nor one of {', '.join(sorted(TIES))}"
            )
        return [[names.index(value)], [1 - names.index(value)]]
    if not isinstance(value, list):
        raise Unreadable("a response is neither a label nor a ranking")
    ranks: dict[int, list[int]] = {}
    for position, one in enumerate(value, 1):
        name, rank = (one.get("value"), one.get("rank")) if isinstance(one, dict) else (one, position)
        if name not in names or not isinstance(rank, int):
            raise Unreadable(f"the ranking names {name!r}, which is no field, or has no rank for it")
        ranks.setdefault(rank, []).append(names.index(name))
    return groups_of([ranks[rank] for rank in sorted(ranks)], range(len(names)))
