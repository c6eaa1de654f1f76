"""Plain rows of JSON lines, read as columns: many times as fast as row by row, and with the same result.

A line is plain when one regular expression of its chunk describes it whole: the keys of the chunk's first row, in that
row's order, with texts where the kind has texts, and numbers or words beside them. No such line has a key twice, broken
Unicode, or a value that has to be understood first, and a text that may be more than a text (a list of messages, a
transcript, a rendered template) is not plain. All other lines go the way of every row (reading.py).
"""

import json
import re

import polars as pl

from schemas.config.data import Kind
from schemas.rows import Messages, with_prompt_ids
from stages.validate.forms.cells import BadRow
from stages.validate.forms.columns import NOTHING, Plan
from stages.validate.forms.labels import canonical
from stages.validate.forms.written import COLUMNS, may_be_written
from stages.validate.readers import Lines

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
_MARGIN = f"(?:{_NUMBER}|null)"
_SPACE = r"[ \t]*"
_SURROGATE = re.compile("[\ud800-\udfff]")


Taken = tuple[pl.DataFrame, list[int]]


def take(kind: Kind, chunk: Lines, names: tuple[str, ...], plan: Plan) -> Taken | None:
    """(The plain rows in the form of their kind, `row` being the place in the chunk; the places of the other lines).

    `names` are the columns of the chunk's first row, and `plan` says how they are read. None where no row is plain.
    """
    source = _sources(kind, names, plan)
    if source is None:
        return None
    plain = _text(chunk.lines).str.contains(_pattern(names, source, plan))
    places = plain.arg_true()
    lines = chunk if plain.all() else Lines(chunk.lines.filter(plain))
    types = {theirs: pl.Float64 if ours == "margin" else pl.String for ours, theirs in source.items()}
    found = pl.read_ndjson(lines.joined, schema=types) if len(places) else pl.DataFrame(schema=types)
    found = found.rename({theirs: ours for ours, theirs in source.items()}).with_columns(row=places.cast(pl.Int64))
    texts = [name for name in source if name not in ("margin", "label")]
    found = found.filter(~pl.any_horizontal(may_be_written(pl.col(name)) for name in texts))
    columns = {"prompt": pl.concat_list(pl.struct(role=pl.lit("user"), content="prompt")).cast(Messages)}
    if kind == "feedback":
        found = found.with_columns(label=_labels(found["label"])).drop_nulls("label")
        columns |= {"completion": pl.col(texts[-1]), "label": pl.col("label")}
    elif kind == "preference":
        margin = pl.col("margin") if "margin" in source else pl.lit(None, pl.Float64)
        columns |= {"chosen": pl.col("chosen"), "rejected": pl.col("rejected"), "margin": margin}
    elif kind == "sft":
        columns["response"] = pl.col("response")
    taken = with_prompt_ids(found.select("row", **columns))
    if taken.height == len(chunk.lines):
        return taken, []
    others = pl.int_range(len(chunk.lines), eager=True)
    return taken, others.filter(~others.is_in(taken["row"].implode())).to_list()


def count_texts(frame: pl.DataFrame) -> dict[str, int]:
    """Column -> the texts, other than empty ones, that plain rows have in it."""
    asked = frame["prompt"].list.first().struct.field("content")
    columns = {"prompt": asked, **{name: frame[name] for name in COLUMNS if name in frame.columns and name != "prompt"}}
    return {name: int((texts != "").sum()) for name, texts in columns.items()}


def _text(lines: pl.Series) -> pl.Series:
    """The lines as text, nothing in the place of those that are not UTF-8."""
    try:
        return lines.cast(pl.String)
    except pl.exceptions.ComputeError:
        return pl.Series([_decoded(line) for line in lines], dtype=pl.String)


def _decoded(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return ""


def _sources(kind: Kind, names: tuple[str, ...], plan: Plan) -> dict[str, str] | None:
    """Our column -> the file's, where they are those of a plain row and no more; None where the plan asks for more."""
    if plan.scored or (plan.shape is not None and (plan.shape.row or plan.shape.whole)):
        return None
    source = {ours: plan.takes.get(ours, ours) for ours in (*COLUMNS, "label", "margin", "turns", *plan.takes)}
    has = {ours: theirs for ours, theirs in source.items() if theirs in names}
    label, optional = ({"label"} if kind == "feedback" else set()), ({"margin"} if kind == "preference" else set())
    needs = ({*texts, *label} for texts in _TEXTS.get(kind, ()))
    fits = any(least <= has.keys() <= least | optional for least in needs)
    once = len(set(has.values())) == len(has)
    return has if fits and once and not any(map(_SURROGATE.search, names)) else None


def _pattern(names: tuple[str, ...], source: dict[str, str], plan: Plan) -> str:
    """What a plain line looks like."""
    empty = {*plan.unread, *plan.refused, plan.system, plan.input, plan.history, plan.tools}
    values = dict.fromkeys(names, _ANYTHING) | dict.fromkeys(empty.intersection(names), _NOTHING)
    values |= dict.fromkeys(source.values(), f'"{_TEXT}"')
    values |= {source[ours]: value for ours, value in (("label", _LABEL), ("margin", _MARGIN)) if ours in source}
    pairs = [f"{re.escape(json.dumps(name, ensure_ascii=False))}{_SPACE}:{_SPACE}{values[name]}" for name in names]
    return rf"^\{{{_SPACE}" + f"{_SPACE},{_SPACE}".join(pairs) + rf"{_SPACE}\}}$"


def _labels(written: pl.Series) -> pl.Series:
    """Labels as `canonical` writes them; null for those that are none."""
    read: dict[str, str] = {}
    for label in written.unique().to_list():
        try:
            read[label] = canonical(label)
        except BadRow:
            continue
    return written.replace_strict(read, default=None, return_dtype=pl.String)
