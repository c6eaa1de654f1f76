"""The forms in which users bring rows, each turned into the one form of its kind (schemas/rows.py).

A row that has no such form raises `BadRow` with the column and the reason. Types are judged here, on Python values,
since a frame would have to guess them; what can be said about whole columns is left to the pandera models.

1. Prompts: text, a list of messages, or a transcript that begins with "\\n\\nHuman:".
2. sft: prompt + response, or `messages` whose last one is the answer.
3. preference: prompt + chosen + rejected; chosen + rejected as conversations or transcripts that share all but their
   last turn; or answers `a` and `b` with a `label` that names the better one.
4. ranking: prompt + responses with scores, an order, ranks or comparisons; see rankings.py.
5. feedback: prompt + completion (or response) + label: a boolean, 0 or 1, or a word for thumbs up or down.
6. prompt: prompt, or the first of `turns`, or `messages` up to the last of the user's.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import polars as pl

from schemas.config import Kind
from schemas.errors import refuse
from schemas.rows import Indices, Messages, Numbers, Strings, with_prompt_ids
from schemas.source import Generated, data_source
from stages.validate.cells import SPEAKER, BadRow, Parsed, Row, Turns, listed, number, text, turns
from stages.validate.column_advice import other_json, shown, unknown_mapping, wrong_columns
from stages.validate.context import Context, Finding, note
from stages.validate.quarantine import Quarantine
from stages.validate.rankings import generated, ranking
from stages.validate.readers import Record, records

_CHUNK = 20_000
_CHUNK_BYTES = 32 << 20  # of short rows the first counts, of long ones this
_HOPELESS = 200_000
"""Rows without a usable one among them after which the rest is not read: it is another kind of file."""
_COLUMNS = 10_000  # that the report lists
_NO_OBJECT = ("malformed_json", "not_an_object")
_UP = {"true", "1", "yes", "up", "thumbs_up", "good", "positive", "desirable", "like", "\U0001f44d"}
_DOWN = {"false", "0", "no", "down", "thumbs_down", "bad", "negative", "undesirable", "dislike", "\U0001f44e"}


def parse(kind: Kind, row: Row) -> Parsed:
    """The row in its kind's form. Raises BadRow."""
    return _PARSERS[kind](row)


def read(context: Context, quarantine: Quarantine) -> pl.DataFrame:
    """All rows of the source that have the form of their kind, as one frame; the others are put aside.

    Raises StageError when the source cannot be read, holds no rows, or not the columns of its kind.
    """
    params = context.params
    if error := unknown_mapping(params):
        raise error
    source = records(params, context.rows, context.seed)
    frames = [to_frame(params.kind, [], [])]
    usable = False
    while chunk := _next_chunk(source):
        frames.append(_read_chunk(chunk, context, quarantine))
        usable = usable or frames[-1].height > 0
        if not usable and context.read >= _HOPELESS:
            break
    if not context.read:
        raise refuse("path", params.path, "the file holds no rows", None, kind="empty_file")
    broken = sum(quarantine.checks["", reason] for reason in _NO_OBJECT)
    prompt_missing = quarantine.checks["prompt", "missing"] == context.read
    error = other_json(params, context.first_line, broken, context.read)
    if error := error or wrong_columns(params, list(context.columns), prompt_missing):
        raise error
    return pl.concat(frames)


def _next_chunk(source: Iterator[Record]) -> list[Record]:
    chunk: list[Record] = []
    size = 0
    for record in islice(source, _CHUNK):
        chunk.append(record)
        size += len(record.raw)
        if size > _CHUNK_BYTES:
            break
    return chunk


def _read_chunk(chunk: list[Record], context: Context, quarantine: Quarantine) -> pl.DataFrame:
    numbers: list[int] = []
    rows: list[Parsed] = []
    for place, record in enumerate(chunk, context.read):
        context.digest.update(record.raw + b"\n")
        if record.row is not None:
            names = record.row if context.log_text else shown(context.params, record.row)
            if len(context.columns) < _COLUMNS:
                context.columns.update(dict.fromkeys(names))
        elif place == 0 and record.line is not None and record.reason in _NO_OBJECT:
            context.first_line = record.raw
        try:
            rows.append(_form(record, context))
            numbers.append(place)
        except BadRow as bad:
            quarantine.add(Finding(place, bad.column, bad.reason, bad.value, record.line))
    context.read += len(chunk)
    # By name, so that equal rows make equal reports.
    notes = sorted((name, place) for place, row in zip(numbers, rows, strict=True) for name in row.get("notes", ()))
    for name, place in notes:
        quarantine.add(note(place, name))
    return to_frame(context.params.kind, numbers, rows)


def _form(record: Record, context: Context) -> Parsed:
    """The row in its kind's form. Raises BadRow."""
    params, row = context.params, record.row
    if row is None:
        raise BadRow("", record.reason, record.raw.decode(errors="backslashreplace"))
    if isinstance(data_source(params.path), Generated) and params.kind == "ranking":
        return generated(row)
    if params.columns:
        row = {**row, **{ours: row.get(theirs) for ours, theirs in params.columns.items()}}
    return parse(params.kind, row)


# --- sft, prompt, feedback ---


def _sft(row: Row) -> Parsed:
    if row.get("messages") is None or row.get("response") is not None:
        return {"prompt": turns(row.get("prompt"), "prompt"), "response": _answer(row.get("response"), "response")}
    prompt, response = _last_answer(turns(_messages(row["messages"]), "messages"), "messages")
    return {"prompt": prompt, "response": response}


def _messages(value: object) -> object:
    return listed(value, "messages") if isinstance(value, str) and not value.startswith("\n\nHuman:") else value


def _answer(value: object, column: str) -> str:
    """An answer: text, or the one message of the assistant in a list."""
    if not isinstance(value, list):
        return text(value, column)
    conversation = turns(value, column)
    if len(conversation) != 1 or conversation[0][0] != "assistant":
        raise BadRow(column, "not_one_answer", value)
    return conversation[0][1]


def _last_answer(conversation: Turns, column: str) -> tuple[Turns, str]:
    """A conversation, cut before the assistant's last turn."""
    *before, (role, content) = conversation
    if role != "assistant" or not before:
        raise BadRow(column, "no_answer", content)
    return tuple(before), content


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
    column = "completion" if "completion" in row or "response" not in row else "response"
    return {
        "prompt": turns(row.get("prompt"), "prompt"),
        "completion": _answer(row.get(column), column),
        "label": _thumb(row.get("label")),
    }


def _thumb(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = value.strip().lower().replace(" ", "_") if isinstance(value, str) else value
    if word in (0, 1):
        return word == 1
    if isinstance(word, str) and (word in _UP or word in _DOWN):
        return word in _UP
    raise BadRow("label", "missing" if value is None else "not_a_label", value)


# --- preference ---


def _preference(row: Row) -> Parsed:
    row = row if "chosen" in row or "rejected" in row or "a" not in row else _named_by_label(row)
    chosen_prompt, chosen = _side(row.get("chosen"), "chosen")
    rejected_prompt, rejected = _side(row.get("rejected"), "rejected")
    given = None if row.get("prompt") is None else turns(row["prompt"], "prompt")
    prompts = [prompt for prompt in (given, chosen_prompt, rejected_prompt) if prompt is not None]
    if not prompts:
        raise BadRow("prompt", "missing")
    for other in prompts:
        if other != prompts[0]:
            raise BadRow("rejected" if other is rejected_prompt else "chosen", "prompts_differ", other[-1][1])
    margin = None if row.get("margin") in (None, "") else number(row["margin"], "margin")
    return {"prompt": prompts[0], "chosen": chosen, "rejected": rejected, "margin": margin}


def _side(value: object, column: str) -> tuple[Turns | None, str]:
    """One of two answers, and the conversation before it where the value holds that too."""
    if isinstance(value, str) and not value.startswith("\n\nHuman:"):
        return None, text(value, column)
    if isinstance(value, str):
        pieces = SPEAKER.split(value)
        if pieces[-2] == "Assistant" and not pieces[-1].strip():
            raise BadRow(column, "empty", value)
    conversation = turns(value, column)
    if len(conversation) == 1 and conversation[0][0] == "assistant":
        return None, conversation[0][1]
    return _last_answer(conversation, column)


def _named_by_label(row: Row) -> Row:
    """{a, b, label} as {chosen, rejected}; label is `a` or `b`, 1 or 2."""
    label = row.get("label")
    word = label.strip().lower() if isinstance(label, str) else label
    if word is None or isinstance(word, bool) or word not in ("a", "b", 1, 2, "1", "2"):
        raise BadRow("label", "missing" if label is None else "tie" if word == "tie" else "not_a_label", label)
    better, worse = ("a", "b") if word in ("a", 1, "1") else ("b", "a")
    return {**row, "chosen": row.get(better), "rejected": row.get(worse)}


_PARSERS: dict[Kind, Callable[[Row], Parsed]] = {
    "sft": _sft,
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
    "feedback": {"completion": pl.String, "label": pl.Boolean},
    "prompt": {},
}


def to_frame(kind: Kind, numbers: Sequence[int], parsed: Sequence[Parsed]) -> pl.DataFrame:
    """Parsed rows and their row numbers as a frame with the columns of schemas/rows.py."""
    columns = {name: pl.Series(name, [row[name] for row in parsed], dtype=t) for name, t in _TYPES[kind].items()}
    frame = pl.DataFrame({"row": pl.Series(numbers, dtype=pl.Int64), "prompt": _messages_of(parsed), **columns})
    return with_prompt_ids(frame)


def _messages_of(parsed: Sequence[Parsed]) -> pl.Series:
    """The prompts as one column of messages, made from flat columns: from lists of dicts takes 40 times as long."""
    owner = [i for i, row in enumerate(parsed) for _ in row["prompt"]]
    flat = pl.DataFrame(
        {
            "owner": pl.Series(owner, dtype=pl.Int64),
            "role": pl.Series([turn[0] for row in parsed for turn in row["prompt"]], dtype=pl.String),
            "content": pl.Series([turn[1] for row in parsed for turn in row["prompt"]], dtype=pl.String),
        }
    )
    lists = flat.group_by("owner", maintain_order=True).agg(prompt=pl.struct("role", "content"))
    return lists.get_column("prompt").cast(Messages)
