"""Plain rows of JSON lines, read as columns: many times as fast as row by row, and with the same result.

A line is plain when one regular expression of its chunk describes it whole: the keys of the chunk's first row, in that
row's order, with texts where the kind has texts, and numbers or words beside them. No such line has a key twice, broken
Unicode, or a value that has to be understood first, and a text that may be more than a text (a list of messages, a
transcript, a rendered template) is not plain. All other lines go the way of every row (formats.py).
"""

import json
import re

import polars as pl

from schemas.config import Kind
from schemas.rows import Messages, with_prompt_ids
from stages.validate.cells import BadRow
from stages.validate.columns import NOTHING, Plan
from stages.validate.labels import canonical
from stages.validate.readers import Lines
from stages.validate.written import COLUMNS, may_be_written

_TEXTS: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "preference": (("prompt", "chosen", "rejected"),),
    "sft": (("prompt", "response"),),
    "feedback": (("prompt", "completion"), ("prompt", "response")),
    "prompt": (("prompt",),),
}
"""The columns of texts that make up a plain row of a kind."""

# JSON's own grammar (RFC 8259), without lone surrogates and without numbers that Python reads in another way.
_ESCAPE = (
    r'\\(?:["\\/bfnrt]|u(?:[0-9a-cefA-CEF][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}'
    r"|[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))"
)
_TEXT = rf'(?:[^"\\\x00-\x1f]|{_ESCAPE})*'
_NUMBER = r"-?(?:0|[1-9][0-9]{0,14})(?:\.[0-9]{1,15})?"
_ANYTHING = rf'(?:"{_TEXT}"|{_NUMBER}|true|false|null)'
_NOTHING = "(?:" + "|".join(re.escape(json.dumps(value)) for value in NOTHING) + ")"
_LABEL = rf'(?:"[^"\\\x00-\x1f]*"|{_NUMBER}|true|false)'
_SPACE = r"[ \t]*"
_SURROGATE = re.compile("[\ud800-\udfff]")


def take(kind: Kind, chunk: Lines, names: tuple[str, ...], plan: Plan) -> tuple[pl.DataFrame, list[int]] | None:
    """(The plain rows in the form of their kind, `row` being the place in the chunk; the places of the other lines).

    `names` are the columns of the chunk's first row, and `plan` says how they are read. None where no row is plain.
    """
    pattern = _pattern(kind, names, plan)
    if pattern is None:
        return None
    lines = _decoded(chunk.lines)
    groups = pl.Series("line", lines, dtype=pl.String).to_frame().select(pl.col("line").str.extract_groups(pattern))
    found = groups.unnest("line").with_row_index("row").drop_nulls("prompt")
    texts = [name for name in found.columns if name not in ("row", "margin", "label")]
    found = found.with_columns(_unescaped(found[name]) for name in texts)
    found = found.filter(~pl.any_horizontal(may_be_written(pl.col(name)) for name in texts))
    columns = {"prompt": pl.concat_list(pl.struct(role=pl.lit("user"), content="prompt")).cast(Messages)}
    if kind == "feedback":
        found = found.with_columns(label=_labels(found["label"])).drop_nulls("label")
        columns |= {"completion": pl.col(texts[-1]), "label": pl.col("label")}
    elif kind == "preference":
        margin = pl.col("margin") if "margin" in found.columns else pl.lit("null")
        columns |= {"chosen": pl.col("chosen"), "rejected": pl.col("rejected")}
        columns["margin"] = margin.cast(pl.Float64, strict=False)  # `null` is none
    elif kind == "sft":
        columns["response"] = pl.col("response")
    taken = with_prompt_ids(found.select(pl.col("row").cast(pl.Int64), **columns))
    others = pl.int_range(len(lines), eager=True)
    return taken, others.filter(~others.is_in(taken["row"].implode())).to_list()


def _decoded(lines: list[bytes]) -> list[str]:
    """The lines as text, an empty one in the place of each that is not UTF-8."""
    try:
        return b"\n".join(lines).decode().split("\n")
    except UnicodeDecodeError:
        return [_text_or_nothing(line) for line in lines]


def _text_or_nothing(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return ""


def count_texts(frame: pl.DataFrame) -> dict[str, int]:
    """Column -> the texts, other than empty ones, that plain rows have in it."""
    asked = frame["prompt"].list.first().struct.field("content")
    columns = {"prompt": asked, **{name: frame[name] for name in COLUMNS if name in frame.columns and name != "prompt"}}
    return {name: int((texts != "").sum()) for name, texts in columns.items()}


def _pattern(kind: Kind, names: tuple[str, ...], plan: Plan) -> str | None:
    """What a plain line looks like, with a group for each of our columns; None where the plan asks for more."""
    if plan.shape is not None and (plan.shape.row or plan.shape.whole):
        return None
    source = {ours: plan.takes.get(ours, ours) for ours in (*COLUMNS, "label", "margin", "turns", *plan.takes)}
    has = {ours: theirs for ours, theirs in source.items() if theirs in names}
    label = {"label"} if kind == "feedback" else set()
    optional = {"margin"} if kind == "preference" else set()
    needs = ((texts, {*texts, *label}) for texts in _TEXTS.get(kind, ()))
    texts = next((texts for texts, least in needs if least <= has.keys() <= least | optional), None)
    if texts is None or len(set(has.values())) < len(has) or any(map(_SURROGATE.search, names)):
        return None
    values = {has[name]: rf'"(?P<{name}>{_TEXT})"' for name in texts}
    if "label" in has:
        values[has["label"]] = f"(?P<label>{_LABEL})"
    if "margin" in has:
        values[has["margin"]] = f"(?P<margin>{_NUMBER}|null)"
    empty = {*plan.unread, *plan.refused, plan.system, plan.input, plan.history}
    pairs = [
        re.escape(json.dumps(name, ensure_ascii=False))
        + f"{_SPACE}:{_SPACE}"
        + values.get(name, _NOTHING if name in empty else _ANYTHING)
        for name in names
    ]
    return rf"^\{{{_SPACE}" + f"{_SPACE},{_SPACE}".join(pairs) + rf"{_SPACE}\}}$"


def _unescaped(texts: pl.Series) -> pl.Series:
    """What the texts of JSON stand for."""
    escaped = texts.str.contains("\\", literal=True)
    if not escaped.any():
        return texts
    read = ('"' + texts.filter(escaped) + '"').str.json_decode(pl.String)
    return texts.scatter(escaped.arg_true(), read)


def _labels(written: pl.Series) -> pl.Series:
    """Labels as `canonical` writes them; null for those that are none."""
    read: dict[str, str] = {}
    for label in written.unique().to_list():
        try:
            read[label] = canonical(json.loads(label))
        except BadRow:
            continue
    return written.replace_strict(read, default=None, return_dtype=pl.String)
