"""The forms in which users bring rows, each turned into the one form of its kind (schemas/rows).

A row that has no such form raises `BadRow` with the column and the reason. Types are judged here, on Python values,
since a frame would have to guess them; what can be said about whole columns is left to the pandera models.

1. Prompts: text, a list of messages, or a transcript that begins with "\\n\\nHuman:".
2. sft: prompt + response, or `messages` whose last one is the answer.
3. preference: prompt + chosen + rejected; chosen + rejected as conversations or transcripts that share all but their
   last turn; or answers `a` and `b` with a `label` that names the better one.
4. ranking: prompt + responses with scores, an order, ranks or comparisons; see rankings.py.
5. feedback: prompt + completion (or response), or `messages`, + label: a boolean, 0 or 1, or a word for thumbs up or
   down.
6. prompt: prompt, or the first of `turns`, or `messages` up to the last of the user's.

Conversations may hold calls of tools and their results (tools.py); answers that are calls are for sft alone.

What the file calls its columns is for columns.py; conversations within one text for written.py. What a label means only
its whole column tells: it stays as it is until all rows are read (labels.py).
"""

import json
from collections.abc import Callable, Sequence

import polars as pl

from schemas.config.data import Kind, Learn
from schemas.conversation import EXTRA
from schemas.rows import Indices, Messages, MessagesWithExtra, Numbers, Strings, with_prompt_ids
from stages.validate.forms.cells import (
    SPEAKER,
    BadRow,
    Parsed,
    Row,
    Turn,
    Turns,
    extra_of_turn,
    is_learned,
    listed,
    number,
    text,
    turns,
    weighed,
    written_messages,
)
from stages.validate.forms.labels import canonical
from stages.validate.forms.rankings import ranking


def parse(kind: Kind, row: Row, learn: Learn = "last") -> Parsed:
    """The row in its kind's form; `learn`: the turns that SFT learns, which only then have weights. Raises BadRow."""
    parsed = _sft(row, learn) if kind == "sft" else _PARSERS[kind](row)
    parsed["prompt"] = weighed(parsed["prompt"], learn, "messages" if "messages" in row else "prompt")
    if _is_list(row.get("prompt")):  # it may be what a person typed, or turns that were written down as JSON
        parsed["notes"] = [*parsed.get("notes", ()), "prompt_is_a_list"]
    return parsed


def _is_list(value: object) -> bool:
    """Whether a text is a JSON list of texts."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return False
    try:
        texts = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return isinstance(texts, list) and bool(texts) and all(isinstance(text_, str) for text_ in texts)


# --- sft, prompt, feedback ---


def _sft(row: Row, learn: Learn) -> Parsed:
    notes: list[str] = []
    if row.get("messages") is None or row.get("response") is not None:
        given, column = _given(row), "response"
        before, answer = _side(row.get(column), column, given, notes)
        prompt = _one_prompt(given, [(column, before)])
    else:
        column = "messages"
        prompt, answer = _last_answer(turns(_messages(row["messages"]), column), column)
    while not is_learned(answer, column):  # what stands behind the last learned turn teaches nothing
        if learn == "last" or not any(turn[0] == "assistant" for turn in prompt):
            raise BadRow(column, "not_learned", answer[1])
        last = max(place for place, turn in enumerate(prompt) if turn[0] == "assistant")
        prompt, answer = prompt[:last], prompt[last]
    calls = extra_of_turn(answer).get("tool_calls")
    return {"prompt": prompt, "response": answer[1], **({"calls": calls} if calls else {}), **_noted(notes)}


def _text_of(answer: Turn, column: str) -> str:
    """The text of an answer that is learned or judged. Raises BadRow where it is a call, or says that it is not."""
    if extra_of_turn(answer).get("tool_calls"):
        raise BadRow(column, "answer_is_a_call", extra_of_turn(answer)["tool_calls"])
    if not is_learned(answer, column):
        raise BadRow(column, "not_learned", answer[1])
    return answer[1]


def _given(row: Row) -> Turns | None:
    return None if row.get("prompt") is None else turns(row["prompt"], "prompt")


def _messages(value: object) -> object:
    return listed(value, "messages") if isinstance(value, str) and not value.startswith("\n\nHuman:") else value


def _last_answer(conversation: Turns, column: str) -> tuple[Turns, Turn]:
    """A conversation, cut before the assistant's last turn."""
    *before, last = conversation
    if last[0] != "assistant" or not before:
        raise BadRow(column, "no_answer", last[1])
    return tuple(before), last


def _prompt(row: Row) -> Parsed:
    if row.get("prompt") is not None:
        return {"prompt": turns(row["prompt"], "prompt")}
    if row.get("turns") is not None:
        asked = listed(row["turns"], "turns")
        if not asked:
            raise BadRow("turns", "empty", asked)
        return {"prompt": (("user", text(asked[0], "turns")),)}
    if row.get("messages") is None:
        raise BadRow("prompt", "missing")
    conversation = turns(_messages(row["messages"]), "messages")
    answered = conversation[-1][0] == "assistant" and len(conversation) > 1
    return {"prompt": conversation[:-1] if answered else conversation}


def _feedback(row: Row) -> Parsed:
    column, notes = "completion" if "completion" in row or "response" not in row else "response", []
    if row.get(column) is None and row.get("messages") is not None:
        column = "messages"
        prompt, answer = _last_answer(turns(_messages(row["messages"]), "messages"), "messages")
    else:
        given = _given(row)
        before, answer = _side(row.get(column), column, given, notes)
        prompt = _one_prompt(given, [(column, before)])
    completion = _text_of(answer, column)
    return {"prompt": prompt, "completion": completion, "label": canonical(row.get("label")), **_noted(notes)}


# --- preference ---


def _preference(row: Row) -> Parsed:
    names, label = ("chosen", "rejected"), {}
    if "a" in row and row.get("chosen") is None and row.get("rejected") is None:
        names, label = ("a", "b"), {"label": canonical(row.get("label"))}
    given, notes = _given(row), []
    (chosen_prompt, chosen), (rejected_prompt, rejected) = (_side(row.get(name), name, given, notes) for name in names)
    befores = [(names[0], chosen_prompt), (names[1], rejected_prompt)]
    texts = {side: _text_of(answer, name) for side, answer, name in zip(_SIDES, (chosen, rejected), names, strict=True)}
    margin = None if row.get("margin") in (None, "") else number(row["margin"], "margin")
    prompt = _one_prompt(given, befores)
    # Until all labels are read `chosen` is the first answer, a.
    return {"prompt": prompt, **texts, "margin": margin, **label, **_noted(notes)}


_SIDES = ("chosen", "rejected")


def _noted(notes: list[str]) -> Parsed:
    return {"notes": list(dict.fromkeys(notes))} if notes else {}


def _side(value: object, column: str, given: Turns | None, notes: list[str]) -> tuple[Turns | None, Turn]:
    """One of the answers, and the conversation before it where the value holds that too.

    A text that spells out another conversation than the prompt's is the answer itself: an example of one, say.
    """
    if isinstance(value, str) and not value.startswith("\n\nHuman:"):
        messages = written_messages(value, column)
        if messages is None:
            return None, ("assistant", text(value, column))
        before, answer = _side(messages, column, None, [])
        if before is None or given is None or _merged(given, before) is not None:
            return before, answer
        notes.append("looks_like_messages")
        return None, ("assistant", text(value, column))
    if isinstance(value, str):
        pieces = SPEAKER.split(value)
        if pieces[-2] == "Assistant" and not pieces[-1].strip():
            raise BadRow(column, "empty", value)
    conversation = turns([value] if isinstance(value, dict) and value.keys() & {"role", "from"} else value, column)
    if len(conversation) == 1 and conversation[0][0] == "assistant":
        return None, conversation[0]
    return _last_answer(conversation, column)


def _one_prompt(given: Turns | None, befores: Sequence[tuple[str, Turns | None]]) -> Turns:
    """The prompt, told by column `prompt`, by the conversations before the answers, or by both.

    Conversations count before a `prompt` that says a part of them, such as the first user turn alone.
    """
    prompt = None
    for column, before in befores:
        if before is not None and prompt is not None and before != prompt:
            raise BadRow(column, "prompts_differ", before[-1][1])
        prompt = prompt or before
    if prompt is None or prompt == given:
        if given is None:
            raise BadRow("prompt", "missing")
        return given
    if given is None:
        return prompt
    merged = _merged(given, prompt)
    if merged is None:
        raise BadRow(next(column for column, before in befores if before is not None), "prompts_differ", prompt[-1][1])
    return merged


def _merged(given: Turns, prompt: Turns) -> Turns | None:
    """The conversation of which one says a part and the other more; None where they are different ones."""
    part, whole = (
        [(turn[0], turn[1].strip(), *turn[2:]) for turn in turns_[turns_[0][0] == "system" :]]
        for turns_ in (given, prompt)
    )
    if any(whole[place : place + len(part)] == part for place in range(len(whole))):
        return given[:1] + prompt if given[0][0] == "system" and prompt[0][0] != "system" else prompt
    return given if part[-len(whole) :] == whole and prompt[0][0] != "system" else None


_PARSERS: dict[Kind, Callable[[Row], Parsed]] = {
    "preference": _preference,
    "ranking": ranking,
    "feedback": _feedback,
    "prompt": _prompt,
}


# --- to a frame ---

_TYPES: dict[Kind, dict[str, pl.DataType | type[pl.DataType]]] = {
    "sft": {"response": pl.String},
    "preference": {"chosen": pl.String, "rejected": pl.String, "margin": pl.Float64},
    "ranking": {"responses": Strings, "winners": Indices, "losers": Indices, "margins": Numbers},
    "feedback": {"completion": pl.String, "label": pl.String},
    "prompt": {},
}


def to_frame(kind: Kind, numbers: Sequence[int], parsed: Sequence[Parsed]) -> pl.DataFrame:
    """Parsed rows and their row numbers as a frame with the columns of schemas/rows, their labels still as given."""
    columns = {name: pl.Series(name, [row[name] for row in parsed], dtype=t) for name, t in _TYPES[kind].items()}
    if kind == "sft" and any("calls" in row for row in parsed):
        calls = [json.dumps(row["calls"], ensure_ascii=False) if "calls" in row else None for row in parsed]
        columns["calls"] = pl.Series("calls", calls, dtype=pl.String)
    if kind == "preference" and any("label" in row for row in parsed):
        columns["label"] = pl.Series("label", [row.get("label") for row in parsed], dtype=pl.String)
    frame = pl.DataFrame({"row": pl.Series(numbers, dtype=pl.Int64), "prompt": _messages_of(parsed), **columns})
    return with_prompt_ids(frame)


def _messages_of(parsed: Sequence[Parsed]) -> pl.Series:
    """The prompts as one column of messages, made from flat columns: from lists of dicts takes 40 times as long."""
    owner = [i for i, row in enumerate(parsed) for _ in row["prompt"]]
    every = [turn for row in parsed for turn in row["prompt"]]
    columns = {
        "owner": pl.Series(owner, dtype=pl.Int64),
        "role": pl.Series([turn[0] for turn in every], dtype=pl.String),
        "content": pl.Series([turn[1] for turn in every], dtype=pl.String),
    }
    wide = any(len(turn) > 2 for turn in every)
    if wide:
        extras = [turn[2] if len(turn) > 2 else None for turn in every]
        columns[EXTRA] = pl.Series(extras, dtype=pl.String)
    _, *fields = columns
    lists = pl.DataFrame(columns).group_by("owner", maintain_order=True).agg(prompt=pl.struct(fields))
    return lists.get_column("prompt").cast(MessagesWithExtra if wide else Messages)
