"""From the rows that stage `validate` publishes to token trees, and each rank's share of them."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.config.data import Kind, Learn
from schemas.conversation import EXTRA, Message
from schemas.errors import refuse
from stages.engine.data.codec import Codec
from stages.engine.data.trees import Tree
from stages.engine.data.turns import answer_ids, answer_of, learned, learned_apart
from stages.engine.tables import kinds, table

log = logging.getLogger("alignflow")

Row = dict[str, Any]


def has(folder: Path, part: str, kind: Kind) -> bool:
    """Whether a data folder holds rows of this kind in this part (`train`, `eval` or `gold`)."""
    return table(folder, part, kind) is not None


def read(folder: Path, part: str, kind: Kind) -> list[Row]:
    """All rows of one kind. Raises StageError when the data holds none."""
    rows = read_if_there(folder, part, kind)
    if not rows:
        others = ", ".join(sorted(kinds(folder, part) - {kind})) or "nothing"
        message = f"the data holds no rows of kind `{kind}` in its part `{part}`, only: {others}."
        raise refuse(f"data.{kind}", "missing", message, _fix(part, kind), kind="data")
    return rows


def read_if_there(folder: Path, part: str, kind: Kind) -> list[Row]:
    """All rows of one kind; none where the data holds none."""
    found = table(folder, part, kind)
    rows = [] if found is None else found.to_dicts()
    for row in rows:  # a table in which one row has tools has a place for them in all
        row["prompt"] = [message if message.get(EXTRA, "") else _plain(message) for message in row["prompt"]]
    return rows


def _plain(message: Message) -> Message:
    return {"role": message["role"], "content": message["content"]}


def _fix(part: str, kind: str) -> str:
    if part == "gold":
        return "set gold_fraction above 0 in the data's config"
    if part == "eval":
        return "set eval_fraction above 0 in the data's config"
    return f"give a data set of kind `{kind}`, or of a kind that `{kind}` can be derived from"


@dataclass(frozen=True)
class Example:
    """A row as read, and its tokens: the prompt with its answers."""

    row: Row
    tree: Tree


def encode(rows: Sequence[Row], answers: Callable[[Row], Sequence[str]], codec: Codec) -> list[Example]:
    """Tokenize rows. `answers` picks a row's answer texts; each gets the token that ends it."""
    return [
        Example(row, Tree(tuple(codec.prompt(row["prompt"])), tuple(tuple(codec.answer(a)) for a in answers(row))))
        for row in rows
    ]


def encode_sft(rows: Sequence[Row], learn: Learn, codec: Codec) -> list[Example]:
    """Tokenize rows of kind `sft`. `all`: every turn of the assistant is learned, in one example per row, and one more
    for each turn that the template writes otherwise once others follow (turns.py).
    """
    if learn == "last":
        return [Example(row, _last(row["prompt"], answer_of(row), codec)) for row in rows]
    return [Example(row, tree) for row in rows for tree in _conversation(row, codec)]


def _last(prompt: Sequence[Message], answer: Message, codec: Codec) -> Tree:
    return Tree(tuple(codec.prompt(prompt)), (tuple(answer_ids(codec, prompt, answer)),))


def _conversation(row: Row, codec: Codec) -> list[Tree]:
    """The whole conversation, its turns marked, and those that are learned by themselves."""
    prompt, answer = row["prompt"], answer_of(row)
    ids, mask, apart = learned(codec, prompt)
    last = answer_ids(codec, prompt, answer)
    first = next((place for place, is_learned in enumerate(mask) if is_learned), len(ids))
    if first == len(ids):  # one answer: as where the last one alone is learned
        whole = Tree(tuple(ids), (tuple(last),))
    else:
        masks = ((*mask[first:], *[True] * len(last)),)
        whole = Tree(tuple(ids[:first]), ((*ids[first:], *last),), masks)
    return [whole, *(Tree(tuple(before), (tuple(turn),)) for before, turn in learned_apart(codec, prompt, apart))]


def longest(tree: Tree) -> int:
    """Tokens of the prompt together with the longest of its answers."""
    return len(tree.prompt) + max(map(len, tree.answers))


def fitting(examples: Sequence[Example], max_length: int, positions: int | None = None) -> list[Example]:
    """The examples of at most `max_length` tokens. Raises StageError when none is left.

    `positions`: of the model; where they are no more than `max_length` it is they that say what is too long.
    """
    if positions is not None and positions <= max_length:
        max_length = positions
    kept = [example for example in examples if longest(example.tree) <= max_length]
    if left_out := len(examples) - len(kept):
        log.warning("%d of %d rows are longer than %d tokens: left out", left_out, len(examples), max_length)
    if not kept:
        shortest = min((longest(example.tree) for example in examples), default=0)
        message = f"no row is left: all {len(examples)} are too long; the shortest has {shortest} tokens."
        if max_length == positions:
            fix = f"give rows of at most {positions} tokens, or a model with at least {shortest} positions"
            raise refuse("model", f"a model of {positions} positions", message, fix, kind="data")
        fix = f"set max_length to at least {shortest}, or give shorter rows"
        raise refuse("max_length", max_length, message, fix, kind="data")
    return kept
