"""What a clean row of each data kind looks like: pandera models on polars, and the names of what can be wrong with one.

A check is named after what it finds: the `reason` in quarantine files and reports. The models check types,
emptiness and what columns owe to each other; what needs a tokenizer or other rows is checked by stage `validate`.
"""

from collections.abc import Callable

import pandera.polars as pa
import polars as pl
from pandera.errors import SchemaError, SchemaErrors
from pandera.polars import PolarsData

from schemas.config.data import Kind
from schemas.conversation import EXTRA
from schemas.rows import Indices, Messages, Numbers, Strings, is_wide

# Blank: nothing but white space and invisible characters (controls, zero-width marks, lone combining formats).
_BLANK = r"^[\s\p{Cc}\p{Cf}]*$"
_NUL = "\x00"
_TEXTS = r"^(prompt|response|responses|chosen|rejected|completion)$"
# An optional system message, then user and assistant in turn, between them what tools gave; the user or a tool last.
_TURNS = r"^(system )?user( assistant( tool)+)*( assistant user( assistant( tool)+)*)*$"


def _no_text(column: str, wrong: Callable[[pl.Expr], pl.Expr]) -> pl.Expr:
    """True where none of the texts that a row has in a column is wrong."""
    if column == "prompt":
        return ~pl.col(column).list.eval(wrong(pl.element().struct.field("content"))).list.any()
    if column == "responses":
        return ~pl.col(column).list.eval(wrong(pl.element())).list.any()
    return ~wrong(pl.col(column))


class PromptRow(pa.DataFrameModel):
    """A prompt to answer: messages that end with the user's, or a tool's. Every other kind has these columns too."""

    row: pl.Int64 = pa.Field(ge=0)
    """Number of the source row, from 0. Rows of a mixture are published with the column `source` beside it."""
    prompt: Messages  # type: ignore[valid-type]
    prompt_id: pl.String = pa.Field(str_matches=r"^[0-9a-f]{16}$")
    """`prompt_id()` of the messages: equal for prompts that differ in case, marks, space and unseen characters."""
    cluster: pl.String = pa.Field(str_matches=r"^[0-9a-f]{16}$")
    """`cluster_id()` of the messages: equal for all prompts that begin alike, which stand on one side of the split."""

    class Config:
        strict = True

    # pandera loses a check's `name` in the second model that inherits it, so the functions bear the reasons' names.

    @pa.check(_TEXTS, regex=True)
    def empty_text(cls, data: PolarsData) -> pl.LazyFrame:
        """No message and no answer is empty."""
        return data.lazyframe.select(_no_text(str(data.key), lambda text: text.str.contains(_BLANK)))

    @pa.check(_TEXTS, regex=True)
    def contains_nul(cls, data: PolarsData) -> pl.LazyFrame:
        """No text holds a NUL character."""
        return data.lazyframe.select(_no_text(str(data.key), lambda text: text.str.contains(_NUL, literal=True)))

    @pa.check("prompt")
    def roles_out_of_order(cls, data: PolarsData) -> pl.LazyFrame:
        """System first if at all, then user and assistant in turn, results after calls, the user or a result last."""
        roles = pl.col(str(data.key)).list.eval(pl.element().struct.field("role")).list.join(" ")
        return data.lazyframe.select(roles.str.contains(_TURNS))


class SFTRow(PromptRow):
    """A prompt and the answer to imitate.

    A table in which an answer calls tools has the column `calls` too: the calls as JSON, null where there are none.
    """

    response: pl.String


class PreferenceRow(PromptRow):
    """A prompt and two answers, of which people preferred the first."""

    chosen: pl.String
    rejected: pl.String
    margin: pl.Float64 = pa.Field(nullable=True, ge=0)
    """How much better `chosen` is, on the annotators' scale; null where not given."""

    @pa.check("margin")
    def not_finite(cls, data: PolarsData) -> pl.LazyFrame:
        """NaN and infinity are not margins."""
        return data.lazyframe.select(pl.col(str(data.key)).is_finite())

    @pa.dataframe_check
    def chosen_equals_rejected(cls, data: PolarsData) -> pl.LazyFrame:
        """The answers differ by more than the white space around them."""
        chosen, rejected = (pl.col(name).str.strip_chars() for name in ("chosen", "rejected"))
        return data.lazyframe.select(chosen != rejected)


class RankingRow(PromptRow):
    """A prompt, K different answers, and which of them beat which."""

    responses: Strings  # type: ignore[valid-type]
    winners: Indices  # type: ignore[valid-type]
    """Per comparison, the index of the better answer in `responses`. Ties have no entry."""
    losers: Indices  # type: ignore[valid-type]
    margins: Numbers = pa.Field(nullable=True)  # type: ignore[valid-type]
    """Per comparison, the difference of the scores; null where there are none."""

    @pa.dataframe_check
    def comparisons_do_not_fit(cls, data: PolarsData) -> pl.LazyFrame:
        """As many winners as losers (and margins), all of them indices of answers."""
        winners, losers, margins = (pl.col(name) for name in ("winners", "losers", "margins"))
        most = pl.max_horizontal(winners.list.max(), losers.list.max()).fill_null(0)
        least = pl.min_horizontal(winners.list.min(), losers.list.min()).fill_null(0)
        pairs, answers = winners.list.len(), pl.col("responses").list.len()
        fits = (pairs == losers.list.len()) & (least >= 0) & ((most < answers) | (pairs == 0))
        return data.lazyframe.select(fits & (margins.is_null() | (margins.list.len() == pairs)))


class FeedbackRow(PromptRow):
    """A prompt, an answer, and a thumb up (true) or down (false)."""

    completion: pl.String
    label: pl.Boolean


ROWS: dict[Kind, type[PromptRow]] = {
    "sft": SFTRow,
    "preference": PreferenceRow,
    "ranking": RankingRow,
    "feedback": FeedbackRow,
    "prompt": PromptRow,
}


def problems(kind: Kind, frame: pl.DataFrame) -> pl.DataFrame:
    """What is wrong with a frame of rows: (`index` into the frame, `column`, `reason`), one line per failed check.

    Raises pandera's SchemaError when the frame has other columns or types than the kind: that is a bug, not bad data.
    """
    failures: list[pl.DataFrame] = []
    try:
        ROWS[kind].validate(_without_extra(frame), lazy=True)
    except SchemaErrors as errors:
        failures = [_failures(kind, error) for error in errors.schema_errors]
    empty = pl.DataFrame(schema={"index": pl.Int64, "column": pl.String, "reason": pl.String})
    return pl.concat([empty, *failures])


def _without_extra(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame in the columns and types of its kind alone, with words where tools make up for an empty text."""
    if "calls" in frame.columns:
        said = pl.when(pl.col("calls").is_not_null() & (pl.col("response") == "")).then(pl.lit("calls"))
        frame = frame.with_columns(response=said.otherwise("response")).drop("calls")
    if not is_wide(frame):
        return frame
    role, content, extra = (pl.element().struct.field(name) for name in ("role", "content", EXTRA))
    silent = (content == "") & ((role == "tool") | extra.str.contains('"tool_calls"', literal=True).fill_null(False))
    words = pl.when(silent).then(pl.lit("calls")).otherwise(content)
    return frame.with_columns(prompt=pl.col("prompt").list.eval(pl.struct(role=role, content=words)))


# Names of checks that are not their reasons: pandera's own, and one that pandera keeps for itself.
_REASONS = {"empty_text": "empty", "not_nullable": "missing", "greater_than_or_equal_to": "negative"}
# A check of the whole row -> the column to name.
_COLUMNS = {"chosen_equals_rejected": "rejected", "comparisons_do_not_fit": "winners"}


def _failures(kind: Kind, error: SchemaError) -> pl.DataFrame:
    if error.check is None or error.check_output is None:
        raise error
    check = error.check if isinstance(error.check, str) else str(error.check.name)
    passed = error.check_output.get_column("check_output")
    reason = _REASONS.get(check, check)
    return pl.DataFrame({"index": (~passed).arg_true().cast(pl.Int64)}).with_columns(
        column=pl.lit(_COLUMNS.get(check, error.schema.name)), reason=pl.lit(reason)
    )
