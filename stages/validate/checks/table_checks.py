"""Checks of the rows as a table, which need no tokenizer. All checks have one shape: `(frame, context) -> findings`."""

from collections.abc import Iterator

import polars as pl

from schemas.config.data import Kind
from schemas.conversation import EXTRA
from schemas.rows import HIDING, IGNORED, Messages, concat, is_wide, may_repeat
from schemas.rows.models import problems
from stages.engine.tables import table
from stages.engine.tables.together import groups, joined, opposed_thumbs, pairs
from stages.validate.context import Context, Finding, note
from stages.validate.forms.rankings import has_cycle
from stages.validate.parts import part

ANSWERS: dict[Kind, tuple[str, ...]] = {
    "sft": ("response",),
    "preference": ("chosen", "rejected"),
    "ranking": ("responses",),
    "feedback": ("completion",),
    "prompt": (),
}
"""The columns that hold a kind's answers."""
IN_ANOTHER = "in_another_source"
"""Reason of a row that an earlier source of a mixture has too."""

# Without a tokenizer: text has fewer characters per token than this in any language and any vocabulary in use.
_CHARACTERS_PER_TOKEN = 16


def broken_fields(frame: pl.DataFrame, context: Context) -> Iterator[Finding]:
    """Rows that the pandera model of their kind refuses."""
    for index, column, reason in problems(context.params.kind, frame).rows():
        value = frame[column][index]
        yield Finding(frame["row"][index], column, reason, value.to_list() if isinstance(value, pl.Series) else value)


def repetitions(frame: pl.DataFrame, context: Context) -> Iterator[Finding]:
    """Rows that repeat an earlier one in all it says; those of another source have a reason of their own."""
    content = [name for name in frame.columns if name not in ("row", "prompt_id", "cluster")]
    frame = frame.filter(may_repeat(frame, content))
    again = frame.filter(~frame.select(pl.struct(content).is_first_distinct()).to_series())
    if again.height:
        firsts = frame.unique(content, keep="first", maintain_order=True).select(*content, first="row")
        pairs = again.join(firsts, on=content, nulls_equal=True, maintain_order="left").select("row", "first")
        column = _first_answer(context.params.kind)
        for row, first in pairs.rows():
            (own, _), (source, number) = context.place(row), context.place(first)
            if source == own:
                yield Finding(row, column, "duplicate", f"same as row {number}")
            else:
                yield Finding(row, column, IN_ANOTHER, f"same as row {number} of {source}")


def too_many_characters(frame: pl.DataFrame, context: Context) -> Iterator[Finding]:
    """Without a tokenizer: rows whose characters alone tell that they are too long for any."""
    kind = context.params.kind
    if context.codec is not None:
        return
    prompt = pl.col("prompt").list.eval(pl.element().struct.field("content").str.len_chars()).list.sum()
    answers = [pl.col(name).str.len_chars() for name in ANSWERS[kind]]
    if kind == "ranking":
        answers = [pl.col("responses").list.eval(pl.element().str.len_chars()).list.max().fill_null(0)]
    tools = sum((text.str.len_chars() for text in tools_of(frame)), pl.lit(0))
    sizes = frame.select("row", characters=prompt + tools + (pl.max_horizontal(answers) if answers else 0))
    longest = context.params.max_length * _CHARACTERS_PER_TOKEN
    for row, characters in sizes.filter(pl.col("characters") > longest).rows():
        yield Finding(row, _first_answer(kind), "too_long", f"{characters} characters")


def look_alikes(frame: pl.DataFrame, context: Context) -> Iterator[Finding]:
    """Notes rows that differ from an earlier one in case, marks, white space or compatible characters only."""
    labels = [name for name in ("label", "winners", "calls") if name in frame.columns]
    frame = frame.filter(may_repeat(frame, ["prompt_id"]))  # few rows, and the rest costs ten times as much
    content = ["prompt_id", *(plain_text(answer) for answer in answers_of(context.params.kind)), *labels]
    frame = frame.filter(may_repeat(frame, content))
    again = ~frame.select(content).select(pl.struct(pl.all()).is_first_distinct()).to_series()
    yield from (note(row, "look_alike") for row in frame.filter(again)["row"])


def contradictions(frame: pl.DataFrame, context: Context) -> Iterator[Finding]:
    """Notes rows that contradict another one: of two answers each is the better, or an answer is liked and disliked.

    Also those that go in a circle with others. They stay as they are; what is derived from them goes by majority.
    """
    kind = context.params.kind
    if kind == "feedback":
        yield from (note(row, "contradictory") for row in opposed_thumbs(frame)["row"])
    if kind not in ("preference", "ranking"):
        return
    reverse: list[int] = []
    circular: list[int] = []
    for group in groups(kind, frame):
        comparisons = pairs(group)
        verdicts = {(better, worse) for _, better, worse in comparisons}
        reverse += {row for row, better, worse in comparisons if (worse, better) in verdicts}
        ranking = joined(group)
        if has_cycle(zip(ranking["winners"], ranking["losers"], strict=True)):
            circular += {row["row"] for row in group}
    yield from (note(row, "contradictory") for row in sorted(reverse))
    yield from (note(row, "cycle") for row in sorted(circular))


_ESCAPED = r"(?:^|[^\\])(?:\\\\)*\\u00(?:0[1-8bef]|1[0-9a-f])"
"""Those of HIDING that JSON writes as escapes; after an even number of backslashes, which stand for themselves."""


def hidden_characters(frame: pl.DataFrame, context: Context) -> Iterator[Finding]:
    """Notes rows whose texts hold characters that cannot be seen, or that turn around what is seen."""
    hides = [pl.col("prompt").list.eval(pl.element().struct.field("content").str.contains(HIDING)).list.any()]
    hides += [text.str.contains(HIDING) for text in answers_of(context.params.kind)]
    hides += [text.str.contains(rf"{HIDING}|{_ESCAPED}") for text in tools_of(frame)]
    yield from (note(row, "hidden_characters") for row in frame.filter(pl.any_horizontal(hides))["row"])


def leaks(frame: pl.DataFrame, context: Context) -> Iterator[Finding]:
    """Rows to train on whose prompts begin like prompts of the evaluation, or of its test part.

    Notes rows that are left out since other data may hold their prompts out.
    """
    frame = frame.with_columns(part=part(context.params))
    side = pl.col("part")
    yield from (note(row, "held_out_elsewhere") for row in frame.filter(side == "none")["row"])
    yield from (note(row, "shared_first_turn") for row in _shared_first_turns(frame))
    if context.evaluation is None:
        return
    clusters = evaluation_prompts(context, "cluster")["cluster"].unique()
    leaking = frame.filter(side.is_in(["train", "gold"]) & pl.col("cluster").is_in(clusters.to_list()))
    for row, prompt in leaking.select("row", "prompt").iter_rows():
        yield Finding(row, "prompt", "leaks_into_evaluation", prompt[-1]["content"])


def evaluation_prompts(context: Context, column: str) -> pl.DataFrame:
    """A column of the prompts of `context.evaluation`, held out and of its test part; no rows without one."""
    types = {"prompt": Messages, "cluster": pl.String}
    folder = context.evaluation
    tables = [] if folder is None else [table(folder, name, "prompt") for name in ("eval", "test")]
    found = [frame.select(column) for frame in tables if frame is not None]
    return concat([pl.DataFrame(schema={column: types[column]}), *found])


def _shared_first_turns(frame: pl.DataFrame) -> pl.Series:
    """Rows to train on whose first user turn is held out too, under another system message.

    The split goes by both: where a system message says what is asked, a first turn as `Hello` is no conversation.
    """
    roles, contents = (pl.col("prompt").list.eval(pl.element().struct.field(name)) for name in ("role", "content"))
    if not frame.select(roles.list.contains("system").any()).item():
        return pl.Series([], dtype=pl.Int64)  # then rows of one first turn are one cluster
    first = contents.list.get((roles.list.first() == "system").cast(pl.Int64), null_on_oob=True)
    turns = frame.select("row", "part", first=plain_text(first))
    held_out = turns.filter(pl.col("part").is_in(["eval", "test"]))["first"].unique()
    return turns.filter(pl.col("part").is_in(["train", "gold"]) & pl.col("first").is_in(held_out.implode()))["row"]


def _first_answer(kind: Kind) -> str:
    return (*ANSWERS[kind], "prompt")[0]


def tools_of(frame: pl.DataFrame) -> list[pl.Expr]:
    """Tools, their calls and whose results there are, as JSON, one text per row; nothing in most frames."""
    extra = pl.col("prompt").list.eval(pl.element().struct.field(EXTRA).fill_null("")).list.join("\n")
    calls = [pl.col("calls").fill_null("")] if "calls" in frame.columns else []
    return [extra, *calls] if is_wide(frame) else calls


def answers_of(kind: Kind) -> list[pl.Expr]:
    """The answers' columns, each as one text per row."""
    return [pl.col(name).list.join("\n") if name == "responses" else pl.col(name) for name in ANSWERS[kind]]


def plain_text(text: pl.Expr) -> pl.Expr:
    """schemas.rows.normalise, near enough, at the speed of columns."""
    return (
        text.str.replace_all(IGNORED, "")
        .str.normalize("NFKC")
        .str.to_lowercase()
        .str.replace_all(r"\W+", " ")
        .str.strip_chars()
    )
