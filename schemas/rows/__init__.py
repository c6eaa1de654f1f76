"""Tables of rows: the types of their columns, which rows ask the same, tables below each other.

Without pandera, which takes a second to import: what a row has to be is in `models`.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import polars as pl

from schemas.conversation import EXTRA, without_weight, words_of

Messages = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
MessagesWithExtra = pl.List(pl.Struct({"role": pl.String, "content": pl.String, EXTRA: pl.String}))
"""Of a table in which some message holds more than role and text (schemas/conversation.py); null where one does not."""
Strings = pl.List(pl.String)
Indices = pl.List(pl.Int64)
Numbers = pl.List(pl.Float64)


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
