"""Checks of rows that need the tokenizer: what is too long, what leaves nothing to learn, what the template refuses."""

import copy
import gc
import os
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl
from jinja2 import TemplateError

from schemas.config.data import Kind, Learn
from schemas.conversation import has_extra
from stages.validate.checks.table_checks import ANSWERS
from stages.validate.context import Context, Finding, note

if TYPE_CHECKING:
    from stages.engine.data.codec import Codec  # importing it takes seconds, and a check without a model does without

_Rendered = str | list[int] | TemplateError

_BATCH = 1000
_AHEAD = min(os.cpu_count() or 1, 6) + 1
"""Batches that are tokenized while one is looked at: one for each core, and one for a thread that waits for Python's
lock. Rows are looked at one by one, which keeps up with six."""
_PARALLEL = "TOKENIZERS_PARALLELISM"
# Rows on which tokenizing prompt and answer in one go is compared with tokenizing them apart.
_SAMPLE = 1000


def unusable_tokens(frame: pl.DataFrame, context: Context) -> Iterator[Finding]:
    """Rows whose tokens cannot be trained on."""
    if context.codec is None:
        return
    kind = context.params.kind
    tokens = _Tokens(kind, context.codec, context.params.max_length, context.params.learn)
    further = [name for name in ("winners", "losers", "calls") if name in frame.columns]
    frame = frame.select("row", "prompt", *ANSWERS[kind], *further)
    done = 0
    collects, parallel = gc.isenabled(), os.environ.get(_PARALLEL)
    # Each thread has its own tokenizer, whose memory of words no other thread locks.
    os.environ[_PARALLEL] = "false"
    gc.disable()  # looking through all rows in memory for cycles again and again takes a fifth of the time
    try:
        for batch in tokens.batches(frame.slice(start, _BATCH) for start in range(0, frame.height, _BATCH)):
            yield from tokens.findings(batch)
            done += len(batch.rows)
            if context.progress:
                context.progress(done, frame.height, "rows tokenized")
            if not done % (100 * _BATCH):
                gc.collect(0)  # the cycles of the templates that ran
    finally:
        if collects:
            gc.enable()
        if parallel is None:
            del os.environ[_PARALLEL]
        else:
            os.environ[_PARALLEL] = parallel
    context.lengths = tokens.lengths


def prompt_tokens_differ(frame: pl.DataFrame, context: Context) -> Iterator[Finding]:
    """Notes those among the first rows in which the prompt's tokens depend on the answer that follows it.

    That is so where prompt and answer are tokenized in one go and the tokenizer merges letters across the border.
    All stages tokenize them apart, as sampling does, so it spoils nothing here; other tools may care.
    """
    kind, codec = context.params.kind, context.codec
    if codec is None:
        return
    frame = frame.filter(pl.col("calls").is_null()) if "calls" in frame.columns else frame
    for row in frame.head(_SAMPLE).select("row", "prompt", *ANSWERS[kind]).iter_rows(named=True):
        prompt = codec.render(row["prompt"])
        length = len(codec.prompt(row["prompt"]))
        joint = codec.encode_all([prompt + answer for _, answer in _answers(kind, row)])
        if len({tuple(ids[:length]) for ids in joint}) > 1:
            yield note(row["row"], "prompt_tokens_differ")


def systems_left_out(frame: pl.DataFrame, context: Context) -> Iterator[Finding]:
    """Notes the rows whose system message the chat template passes over without a word."""
    if context.codec is None or context.codec.writes_system():
        return
    role = pl.col("prompt").list.first().struct.field("role")
    yield from (note(row, "system_left_out") for row in frame.filter(role == "system")["row"])


def _answers(kind: Kind, row: dict) -> list[tuple[str, str]]:
    """(column, text) of a row's answers."""
    if kind == "ranking":
        return [("responses", answer) for answer in row["responses"]]
    return [(column, row[column]) for column in ANSWERS[kind]]


def _refusal(error: TemplateError) -> tuple[str, str]:
    """(reason, value) of a conversation that the template refuses, or of which it leaves out tools."""
    from stages.engine.data.tools import LeftOut  # late, as the codec is

    return "tools_left_out" if isinstance(error, LeftOut) else "template_refuses", str(error)


def _unknown_ids(codec: "Codec") -> frozenset[int]:
    """The token that stands for whatever the tokenizer does not know; nothing where every text has tokens."""
    tokenizer: Any = codec.tokenizer
    named = getattr(tokenizer.backend_tokenizer.model, "unk_token", None)
    ids = {tokenizer.unk_token_id, None if named is None else tokenizer.convert_tokens_to_ids(named)}
    # GPT-2 declares its end as the unknown token, and has bytes for everything.
    return frozenset(int(i) for i in ids if isinstance(i, int)) - codec.control_ids


class _Batch(NamedTuple):
    """Rows, and what their tokens are."""

    rows: list[dict]
    characters: list[int]
    """Of each prompt."""
    prompts: list[list[int] | TemplateError]
    """Ids of the prompts that are short enough to be tried, or the template's refusal."""
    said: list[list[tuple[str, str]]]
    """(column, text) of each row's answers."""
    answers: list[list[list[int] | None]]
    """Ids of each row's answers; None in the place of a text that is too long to be tried."""


class _Tokens:
    """Looks at batches of rows through a tokenizer."""

    def __init__(self, kind: Kind, codec: "Codec", max_length: int, learn: Learn = "last") -> None:
        self.kind: Kind = kind
        self.learn: Learn = learn
        self.codec, self.max_length = codec, min(max_length, codec.positions or max_length)
        # One for each thread: how a tokenizer reads special tokens is a state of it.
        self._spare = [copy.copy(codec) for _ in range(_AHEAD)]
        for spare in self._spare:
            spare.tokenizer = copy.deepcopy(codec.tokenizer)
        # No token is longer, so that longer texts need not be tokenized to be found too long.
        self._most_characters = self.max_length * max(map(len, codec.tokenizer.get_vocab()))
        self._template_controls: dict[tuple[tuple[str, ...], ...], int] = {}
        self._unknown = _unknown_ids(codec)
        self._odd = self._unknown | codec.control_ids
        self._unknown_prompts: set[int] = set()
        """Rows whose prompts hold words that the tokenizer does not know, beside others."""
        self.lengths = array("Q")
        """Tokens of each prompt with each of its answers, of those that are not too long."""

    def batches(self, frames: Iterator[pl.DataFrame]) -> Iterator[_Batch]:
        """Each frame's rows with their ids, tokenized while the rows before are looked at: the tokenizer works outside
        of Python's lock. Templates run in this thread, the only one where they are bounded.
        """
        coming: deque[Future[_Batch]] = deque()
        with ThreadPoolExecutor(_AHEAD) as threads:
            for frame in frames:
                rows = frame.to_dicts()
                characters = pl.col("prompt").list.eval(pl.element().struct.field("content").str.len_chars())
                sizes = frame.select(characters.list.sum()).to_series().to_list()
                short = [row["prompt"] for row, size in zip(rows, sizes, strict=True) if size <= self._most_characters]
                coming.append(threads.submit(self._encode, rows, sizes, self.codec.render_all(short)))
                if len(coming) > _AHEAD:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()

    def findings(self, batch: _Batch) -> Iterator[Finding]:
        """What makes the rows of a batch unusable: first its prompts, then its answers."""
        usable: list[dict] = []
        lengths: list[int] = []
        for row, verdict in zip(batch.rows, self._prompts(batch), strict=True):
            if isinstance(verdict, int):
                usable.append(row)
                lengths.append(verdict)
            else:
                yield Finding(row["row"], "prompt", *verdict)
        if self.kind == "prompt":
            self.lengths.extend(lengths)
        if self.kind == "sft":
            yield from self._turns(usable, lengths)
        both = zip(batch.said, batch.answers, strict=True)
        of_answers = {
            id(row): answers for row, answers in zip(batch.rows, both, strict=True)
        }  # rows may share a number
        for row, length in zip(usable, lengths, strict=True):
            number = row["row"]
            of_row, every = of_answers[id(row)]
            odd = not all(self._odd.isdisjoint(ids or ()) for ids in every)
            problems = [self._answer(length, text, ids, odd) for (_, text), ids in zip(of_row, every, strict=True)]
            for (column, _), problem in zip(of_row, problems, strict=True):
                if problem:
                    yield Finding(number, column, *problem)
            equal = None if any(problems) else self._equal_answers(row, of_row, every)
            if equal:
                yield equal
            if any(problems) or (equal and not equal.kept):
                continue
            if number in self._unknown_prompts or (
                odd and any(not self._unknown.isdisjoint(ids or ()) for ids in every)
            ):
                yield note(number, "unknown_tokens")

    def _turns(self, usable: list[dict], lengths: list[int]) -> Iterator[Finding]:
        """What is wrong with, or odd about, turns whose tokens the template writes: calls as answers, and earlier
        answers that are learned. Rows with a call as their answer are taken out of both lists.
        """
        from stages.engine.data.turns import answer_ids, answer_of, learned, learned_apart  # late, as the codec is

        kept: list[tuple[dict, int]] = []
        for row, length in zip(usable, lengths, strict=True):
            several = any(message["role"] == "assistant" for message in row["prompt"])
            if not row.get("calls") and not (several and self.learn == "all"):
                kept.append((row, length))
                continue
            column = "prompt"
            try:
                if self.learn == "all" and (places := learned(self.codec, row["prompt"]).apart):
                    learned_apart(self.codec, row["prompt"], places)  # raises where training could not
                    yield note(row["row"], "turns_learned_apart")
                if not row.get("calls"):
                    kept.append((row, length))
                    continue
                column = "response"
                length += len(answer_ids(self.codec, row["prompt"], answer_of(row)))
            except TemplateError as error:
                yield Finding(row["row"], column, *_refusal(error))
                continue
            if length > self.max_length:
                yield Finding(row["row"], "response", "too_long", f"{length} tokens")
            else:
                self.lengths.append(length)
        usable[:], lengths[:] = [row for row, _ in kept], [length for _, length in kept]

    def _equal_answers(
        self, row: dict, answers: list[tuple[str, str]], every: list[list[int] | None]
    ) -> Finding | None:
        """Answers that differ as texts and are the same tokens: a model cannot prefer one of them to the other.

        The tokenizer has one token for all words that it does not know, or takes case, marks or space away.
        """
        if len(every) < 2 or (len(every) == 2 and every[0] != every[1]):
            return None
        distinct = {tuple(ids or ()) for ids in every}
        compared = list(zip(row.get("winners", [0]), row.get("losers", [1]), strict=True))
        same = sum(every[winner] == every[loser] for winner, loser in compared)
        if same and same == len(compared):
            column, text = answers[compared[0][1]]
            return Finding(row["row"], column, "equal_tokens", text)
        return note(row["row"], "equal_tokens") if len(distinct) < len(every) else None

    def _prompts(self, batch: _Batch) -> Iterator[int | tuple[str, str]]:
        """Tokens of each prompt, or (reason, value) of what is wrong with it."""
        reason = "too_long" if self.kind == "prompt" else "no_label_survives"
        prompts = iter(batch.prompts)
        for row, size in zip(batch.rows, batch.characters, strict=True):
            if size > self._most_characters:
                yield reason, f"{size} characters"
                continue
            ids = next(prompts)
            if isinstance(ids, TemplateError):
                yield _refusal(ids)
            elif (forged := self._controls(ids) - self._written_by_template(row["prompt"])) > 0:
                yield "control_tokens", f"{forged} more than the template writes"
            elif len(ids) >= self.max_length:
                yield reason, f"{len(ids)} tokens"
            elif self._unknown.isdisjoint(ids):
                yield len(ids)
            else:
                said = row["prompt"][-1]["content"]
                [last] = self.codec.encode_all([said], split_special_tokens=True)
                if self._unknown.issuperset(last):
                    yield "unknown_tokens", said
                else:
                    self._unknown_prompts.add(row["row"])
                    yield len(ids)

    def _controls(self, ids: Sequence[int]) -> int:
        return sum(map(self.codec.control_ids.__contains__, ids))

    def _written_by_template(self, messages: list[dict[str, str]]) -> int:
        """Control tokens of a conversation of the same roles that says nothing of its own.

        `Codec` keeps spelled-out special tokens text. A normalizer, or a vocabulary that has one as a plain word, may
        make it one still: a row could then end its own turn and speak as another role.
        """
        from stages.engine.data.tools import stand_in  # late, as the codec is

        if has_extra(messages):
            kind = tuple(tuple(message.values()) for message in stand_in(messages)[0])
        else:
            kind = tuple((message["role"], str(bool(message["content"].strip()))) for message in messages)
        if kind not in self._template_controls:
            self._template_controls[kind] = self._controls(self.codec.prompt(stand_in(messages)[0]))
        return self._template_controls[kind]

    def _answer(self, prompt: int, answer: str, ids: Sequence[int] | None, odd: bool) -> tuple[str, str] | None:
        """(reason, value) of what is wrong with an answer after a prompt of that many tokens.

        `odd`: it, or another of its row, holds a token that is no word, or stands for words that are not known.
        """
        if ids is None:
            return "too_long", f"{len(answer)} characters"
        length = prompt + len(ids) + 1  # and the token that ends the answer
        if not ids:
            return "no_tokens", answer
        if odd:
            if not self.codec.stop_ids.isdisjoint(ids):
                return "ends_midway", answer
            if not self.codec.control_ids.isdisjoint(ids):
                return "control_tokens", answer
            if self._unknown.issuperset(ids):
                return "unknown_tokens", answer
        if length > self.max_length:
            return "too_long", f"{length} tokens"
        self.lengths.append(length)
        return None

    def _encode(self, rows: list[dict], characters: list[int], rendered: list[_Rendered]) -> _Batch:
        """A batch; ids of answers as `Codec.answer` has them without its end."""
        codec = self._spare.pop()
        of_rows = [_answers(self.kind, row) for row in rows]
        texts = [text for of_row in of_rows for _, text in of_row]
        ids = iter(codec.answers([text for text in texts if len(text) <= self._most_characters]))
        every = iter([next(ids) if len(text) <= self._most_characters else None for text in texts])
        answers = [[next(every) for _ in of_row] for of_row in of_rows]
        batch = _Batch(rows, characters, codec.encode_rendered(rendered), of_rows, answers)
        self._spare.append(codec)
        return batch
