"""Checks of rows that need the tokenizer: what is too long, what leaves nothing to learn, what the template refuses."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import polars as pl
from jinja2 import TemplateError

from schemas.config import Kind

if TYPE_CHECKING:
    from stages.engine.data.codec import Codec  # importing it takes seconds, and a check without a model does without

Progress = Callable[[int, int, str], None]

ANSWERS: dict[Kind, tuple[str, ...]] = {
    "sft": ("response",),
    "preference": ("chosen", "rejected"),
    "ranking": ("responses",),
    "feedback": ("completion",),
    "prompt": (),
}
"""The columns that hold a kind's answers."""

_BATCH = 1000
# Without a tokenizer: text has fewer characters per token than this in any language and any vocabulary in use.
_CHARACTERS_PER_TOKEN = 16
# Rows on which tokenizing prompt and answer in one go is compared with tokenizing them apart.
_SAMPLE = 1000


class Finding(NamedTuple):
    """What is wrong with a row: its place in the frame, the column, the reason, and what was found."""

    place: int
    column: str
    reason: str
    value: str


def too_many_characters(kind: Kind, frame: pl.DataFrame, max_length: int) -> Iterator[Finding]:
    """Rows that are too long for `max_length` tokens by any tokenizer, told from their characters alone."""
    prompt = pl.col("prompt").list.eval(pl.element().struct.field("content").str.len_chars()).list.sum()
    columns = [name for name in ANSWERS[kind] if name != "responses"]
    answers = [pl.col(name).str.len_chars() for name in columns]
    if kind == "ranking":
        answers = [pl.col("responses").list.eval(pl.element().str.len_chars()).list.max().fill_null(0)]
    characters = frame.select(prompt + (pl.max_horizontal(answers) if answers else 0)).to_series()
    for index in (characters > max_length * _CHARACTERS_PER_TOKEN).arg_true():
        yield Finding(index, (*ANSWERS[kind], "prompt")[0], "too_long", f"{characters[index]} characters")


class Tokens:
    """Walks over the rows of a frame in batches; `findings` are what makes a row unusable, `differ` is worth a note."""

    def __init__(self, codec: "Codec", max_length: int) -> None:
        self.codec, self.max_length = codec, max_length
        # No token is longer, so that longer texts need not be tokenized to be found too long.
        self._most_characters = max_length * max(map(len, codec.tokenizer.get_vocab()))
        self._written: dict[tuple[str, ...], int] = {}
        self.longest = 0
        """Tokens of the longest row that is not too long."""

    def findings(self, kind: Kind, frame: pl.DataFrame, progress: Progress | None = None) -> Iterator[Finding]:
        """Rows that cannot be trained on."""
        columns = ["prompt", *ANSWERS[kind]]
        rows = enumerate(frame.select(columns).iter_rows(named=True))
        for done, batch in enumerate(_batches(rows)):
            yield from self._check(kind, batch)
            if progress:
                progress(min((done + 1) * _BATCH, frame.height), frame.height, "rows tokenized")

    def _check(self, kind: Kind, batch: list[tuple[int, dict]]) -> Iterator[Finding]:
        lengths: dict[int, int] = {}
        for (index, _), found in zip(batch, self._prompts(kind, batch), strict=True):
            if isinstance(found, int):
                lengths[index] = found
            else:
                yield Finding(index, "prompt", *found)
        answers = [(i, column, said) for i, row in batch if i in lengths for column, said in _answers(kind, row)]
        if kind == "prompt":
            self.longest = max(self.longest, *lengths.values(), 0)
        for (index, column, said), ids in zip(answers, self._encode([a[2] for a in answers]), strict=True):
            found = self._answer(lengths[index], said, ids)
            if found:
                yield Finding(index, column, *found)

    def _prompts(self, kind: Kind, batch: list[tuple[int, dict]]) -> Iterator[int | tuple[str, str]]:
        """Tokens of each prompt, or (reason, value) of what is wrong with it."""
        reason = "too_long" if kind == "prompt" else "no_label_survives"
        characters = [sum(len(message["content"]) for message in row["prompt"]) for _, row in batch]
        tried = [n <= self._most_characters for n in characters]
        ids = iter(
            self.codec.prompts([row["prompt"] for (_, row), is_tried in zip(batch, tried, strict=True) if is_tried])
        )
        for (_, row), size, is_tried in zip(batch, characters, tried, strict=True):
            found = next(ids) if is_tried else None
            if found is None:
                yield reason, f"{size} characters"
            elif isinstance(found, TemplateError):
                yield "template_refuses", str(found)
            elif (forged := self._controls(found) - self._written_by_template(row["prompt"])) > 0:
                yield "control_tokens", f"{forged} more than the template writes"
            else:
                yield (reason, f"{len(found)} tokens") if len(found) >= self.max_length else len(found)

    def _controls(self, ids: Sequence[int]) -> int:
        return sum(map(self.codec.control_ids.__contains__, ids))

    def _written_by_template(self, messages: list[dict[str, str]]) -> int:
        """Control tokens of a conversation of the same roles that says nothing of its own.

        `Codec` keeps spelled-out special tokens text. A normalizer, or a vocabulary that has one as a plain word, may
        make it one still: a row could then end its own turn and speak as another role.
        """
        roles = tuple(message["role"] for message in messages)
        if roles not in self._written:
            plain = [{"role": role, "content": "a"} for role in roles]
            self._written[roles] = self._controls(self.codec.prompt(plain))
        return self._written[roles]

    def _answer(self, prompt: int, said: str, ids: Sequence[int] | None) -> tuple[str, str] | None:
        """(reason, value) of what is wrong with an answer after a prompt of so many tokens."""
        if ids is None:
            return "too_long", f"{len(said)} characters"
        length = prompt + len(ids) + 1  # and the token that ends the answer
        if not ids:
            return "no_tokens", said
        if not self.codec.stop_ids.isdisjoint(ids):
            return "ends_midway", said
        if self._controls(ids):
            return "control_tokens", said
        if length > self.max_length:
            return "too_long", f"{length} tokens"
        self.longest = max(self.longest, length)
        return None

    def _encode(self, texts: list[str]) -> list[list[int] | None]:
        """Ids of answers, as `Codec.answer` has them without its end; None where the text is too long to be tried."""
        short = [text for text in texts if len(text) <= self._most_characters]
        ids = iter(self.codec.encode_all(short, split_special_tokens=True))
        return [next(ids) if len(text) <= self._most_characters else None for text in texts]

    def differ(self, kind: Kind, frame: pl.DataFrame) -> Iterator[int]:
        """Numbers of those among the first rows in which the prompt's tokens depend on the answer that follows it.

        That is so where prompt and answer are tokenized in one go and the tokenizer merges letters across the border.
        All stages tokenize them apart, as sampling does, so it spoils nothing here; other tools may care.
        """
        columns = ["row", "prompt", *ANSWERS[kind]]
        for row in frame.head(_SAMPLE).select(columns).iter_rows(named=True):
            prompt = self.codec.render(row["prompt"])
            length = len(self.codec.prompt(row["prompt"]))
            joint = self.codec.encode_all([prompt + said for _, said in _answers(kind, row)])
            if len({tuple(ids[:length]) for ids in joint}) > 1:
                yield row["row"]


def _answers(kind: Kind, row: dict) -> list[tuple[str, str]]:
    """(column, text) of a row's answers."""
    if kind == "ranking":
        return [("responses", said) for said in row["responses"]]
    return [(column, row[column]) for column in ANSWERS[kind]]


def _batches(rows: Iterable[tuple[int, dict]]) -> Iterator[list[tuple[int, dict]]]:
    rows = iter(rows)
    while batch := list(islice(rows, _BATCH)):
        yield batch
