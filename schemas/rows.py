"""What a clean row of each data kind looks like: pandera models on polars, and the names of what can be wrong with one.

A check is named after what it finds: the `reason` in quarantine files and reports. The models check types,
emptiness and what columns owe to each other; what needs a tokenizer or other rows is checked by stage `validate`.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandera.polars as pa
import polars as pl
from pandera.errors import SchemaError, SchemaErrors
from pandera.polars import PolarsData

from schemas.config.data import Kind
from schemas.conversation import EXTRA, without_weight, words_of

Messages = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
MessagesWithExtra = pl.List(pl.Struct({"role": pl.String, "content": pl.String, EXTRA: pl.String}))
"""Of a table in which some message holds more than role and text (schemas/conversation.py); null where one does not."""
Strings = pl.List(pl.String)
Indices = pl.List(pl.Int64)
Numbers = pl.List(pl.Float64)

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


def is_wide(frame: pl.DataFrame) -> bool:
    """Whether the frame's messages have the field `extra`."""
    return frame.schema.get("prompt") == MessagesWithExtra


def without_weights(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame without the weights of its messages: they say what SFT learns, and no model sees them."""
    if not is_wide(frame):
        return frame
    extras = frame["prompt"].explode().struct.field(EXTRA)
    weighed = extras.filter(extras.str.contains('"weight"', literal=True)).unique().to_list()
    if not weighed:
        return frame
    role, content, extra = (pl.element().struct.field(name) for name in ("role", "content", EXTRA))
    plain = extra.replace(weighed, pl.Series(map(without_weight, weighed), dtype=pl.String)).alias(EXTRA)
    message = pl.struct(role.alias("role"), content.alias("content"), plain)
    return frame.with_columns(prompt=pl.col("prompt").list.eval(message).cast(MessagesWithExtra))


def concat(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Frames of one kind below each other, also where only some of them hold tools."""
    if any(map(is_wide, frames)):
        role, content = (pl.element().struct.field(name) for name in ("role", "content"))
        message = pl.struct(role.alias("role"), content.alias("content"), pl.lit(None, pl.String).alias(EXTRA))
        widened = pl.col("prompt").list.eval(message).cast(MessagesWithExtra)
        narrow = [not is_wide(frame) and "prompt" in frame.columns for frame in frames]
        frames = [
            frame.with_columns(prompt=widened) if needed else frame
            for frame, needed in zip(frames, narrow, strict=True)
        ]
    return pl.concat(frames, how="diagonal")


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


_SLICE = 50_000


def may_repeat(frame: pl.DataFrame, content: Iterable[str | pl.Expr]) -> pl.Series:
    """True for every row that may equal another in its content (columns, or expressions that look at one row each).

    Equal rows have equal hashes, so whoever seeks repetitions need compare these few rows only. To compare all rows at
    once polars writes each of them out a second time, texts and all.
    """
    key = pl.struct(*content).hash()
    parts = (frame.slice(start, _SLICE) for start in range(0, frame.height or 1, _SLICE))
    hashes = pl.concat([part.select(key).to_series() for part in parts])
    ordered = hashes.sort()  # in a fraction of the time and memory that `is_duplicated` takes
    return hashes.is_in(ordered.filter(ordered == ordered.shift()).implode())


# Unicode's default ignorables: zero-width and variation marks, soft hyphens, fillers, marks of direction, tags.
IGNORED = (
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# Of these and of control characters, those that no script and no emoji needs: what hides text, or turns it around.
HIDING = (
    "[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
    "\U000e0001-\U000e007f]"
)
_IGNORED = re.compile(IGNORED)


def normalise(text: str) -> str:
    """The text without what makes look-alikes differ: characters that are not seen are dropped, the rest is NFKC and
    casefolded, every run of non-word characters one space."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", _IGNORED.sub("", text))
    return re.sub(r"\W+", " ", text.casefold()).strip()


def text_id(text: str) -> str:
    """First 16 hex digits of the sha256 of the normalised text; of the text itself where nothing is left of it."""
    return hashlib.sha256((normalise(text) or text).encode()).hexdigest()[:16]


_BREAK = "\x80"  # in no ASCII text; in UTF-8 a byte that becomes space, and one that becomes the end of a line
_WORDS = (
    bytes(
        character if chr(character).isalnum() or character == ord("_") else ord(" ")
        for character in (ord(chr(byte).lower()) for byte in range(128))
    )
    + b"\n"
).ljust(256)
"""ASCII -> what `normalise` makes of each character: these are the word characters, and casefolding is lower case."""


def text_ids(texts: pl.Series) -> pl.Series:
    """`text_id` of each text, at the speed of columns where all characters are ASCII."""
    ascii_only = texts.str.len_bytes() == texts.str.len_chars()
    plain = texts.filter(ascii_only)
    # All texts as one, since most of what is done to them is done for each call, and not for each character.
    joined = plain.str.join(_BREAK).cast(pl.Binary).item() if len(plain) else b""
    characters = np.frombuffer(joined.translate(_WORDS) + b"\n", np.uint8)
    space = characters == ord(" ")
    if (twice := space[:-1] & space[1:]).any():
        characters = characters[:-1][~twice]
    words = [words.strip(b" ") for words in characters.tobytes().split(b"\n")][: len(plain)]
    if b"" in words:
        words = [word or text.encode() for word, text in zip(words, plain.to_list(), strict=True)]
    digests = pl.Series([hashlib.sha256(word).digest()[:8] for word in words], dtype=pl.Binary).bin.encode("hex")
    if len(plain) == len(texts):
        return digests
    others = pl.Series(map(text_id, texts.filter(~ascii_only).to_list()), dtype=pl.String)
    places = pl.concat([ascii_only.arg_true(), (~ascii_only).arg_true()])
    return pl.concat([digests, others]).gather(places.arg_sort())


def prompt_id(messages: Iterable[Mapping[str, str]]) -> str:
    """`text_id` of all that the messages say, tools among it: which rows ask the same."""
    return text_id("\n".join(map(words_of, messages)))


def cluster_id(messages: Sequence[Mapping[str, str]]) -> str:
    """`text_id` of the texts up to the user's first, a system message among them; of all where no user speaks.

    Later turns of a conversation repeat what its earlier ones say, so that rows of one cluster stand on one side of the
    split, and bootstraps draw clusters.
    """
    roles = [message["role"] for message in messages]
    opening = messages[: roles.index("user") + 1] if "user" in roles else messages
    return text_id("\n".join(message["content"] for message in opening))


def with_prompt_ids(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with the columns `prompt_id` and `cluster` after `prompt`, as the functions of that name."""
    place = frame.columns.index("prompt") + 1
    prompt = pl.col("prompt")
    if not is_wide(frame) and (frame["prompt"].list.len() == 1).all():  # the same, many times as fast
        ids = text_ids(frame["prompt"].list.first().struct.field("content").fill_null(""))
        return frame.insert_column(place, ids.alias("cluster")).insert_column(place, ids.alias("prompt_id"))
    by_user = prompt.list.eval(pl.element().struct.field("role") == "user")
    opening = prompt.list.head(
        pl.when(by_user.list.any()).then(by_user.list.arg_max() + 1).otherwise(prompt.list.len())
    )
    content = pl.element().struct.field("content")
    words = content
    if is_wide(frame):
        words = content + (pl.lit("\n") + pl.element().struct.field(EXTRA)).fill_null("")
    joined = (prompt.list.eval(words).list.join("\n"), opening.list.eval(content).list.join("\n"))
    said = without_weights(frame.select("prompt"))
    whole, first = (said.select(texts).to_series() for texts in joined)
    ids = text_ids(whole).alias("prompt_id")
    # Most conversations have one turn, and a hash costs more than to compare them.
    later = whole != first
    clusters = ids.alias("cluster")
    if later.any():
        clusters = clusters.scatter(later.arg_true(), text_ids(first.filter(later)))
    for offset, digests in enumerate((ids, clusters)):
        frame = frame.insert_column(place + offset, digests)
    return frame
