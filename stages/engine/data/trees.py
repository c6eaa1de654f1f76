"""Batches of trees: a prompt with its answers, in three layouts that mean the same.

- shared: one row; each prompt once, its answers behind it, trees end to end
- packed: one row; each answer behind a prompt of its own, sequences end to end
- padded: one row per answer, padded on the right to the longest

Shapes: B rows, T tokens of a row, N answer tokens of the batch, A answers of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from stages.engine.data.segments import Segments, Span, segments

Layout = Literal["shared", "packed", "padded"]


@dataclass(frozen=True)
class Tree:
    """A prompt with its answers, as token ids. None of them may be empty."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    masks: tuple[tuple[bool, ...], ...] | None = None
    """Per answer, which of its tokens are learned; None: all. A conversation is an answer behind its first turn."""

    def __post_init__(self) -> None:
        if not (self.prompt and self.answers and all(self.answers)):
            raise ValueError("a tree needs a prompt and answers of at least one token each")
        if self.masks is not None and [*map(len, self.masks)] != [*map(len, self.answers)]:
            raise ValueError("a tree's masks need a truth value for each token of its answers")
        if self.masks is not None and not all(map(any, self.masks)):
            raise ValueError("of each of a tree's answers a token at least has to be learned")

    @property
    def learned(self) -> int:
        """Tokens of its answers that are learned."""
        return sum(map(len, self.answers)) if self.masks is None else sum(map(sum, self.masks))


@dataclass
class Batch:
    """Trees as tensors. Flat indices point into B * T; answers count trees in order, then answers in order."""

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    attention_mask_BT: Tensor | None
    """Padded layout only: 1 on tokens, 0 on padding."""
    segments: Segments | None
    """Shared and packed layouts: what attention needs."""
    predict_N: Tensor
    """Flat index of the hidden state that predicts each answer token. Where a tree has masks, N counts what is learned.
    """
    labels_N: Tensor
    """The answer tokens themselves."""
    answer_N: Tensor
    """Number of the answer each token belongs to, 0..A-1, ascending."""
    token_N: Tensor
    """Flat index of the answer token itself."""
    last_A: Tensor
    """Flat index of each answer's last token."""
    lengths_A: Tensor
    """Tokens of each answer, where a tree has masks those that are learned."""
    tokens: int
    """Tokens of the trees, the same in every layout: a prompt once for all its answers, no padding."""

    def to(self, device: torch.device | str) -> "Batch":
        device = torch.device(device)
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: v.to(device) for name, v in values.items() if hasattr(v, "to")})

    @property
    def device(self) -> torch.device:
        return self.input_ids_BT.device

    @property
    def answers(self) -> int:
        """Answers of the batch (A)."""
        return len(self.lengths_A)


def collate(trees: Sequence[Tree], layout: Layout, pad_id: int) -> Batch:
    """Lay the trees out. Padding is known by length, never by `pad_id`, which may equal the end token."""
    tokens = sum(tree_tokens(tree, "shared") for tree in trees)
    if layout == "padded":
        return _padded(trees, pad_id, tokens)
    if layout == "packed":
        trees = [
            Tree(tree.prompt, (answer,), None if tree.masks is None else (tree.masks[number],))
            for tree in trees
            for number, answer in enumerate(tree.answers)
        ]
    return _one_row(trees, tokens)


def cut(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of rows, in order, grouped so that a group's sizes stay within `budget`; a larger row stands alone."""
    groups: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = budget
        groups[-1].append(index)
        room -= size
    return groups


def tree_tokens(tree: Tree, layout: Layout) -> int:
    """Tokens that a tree takes in a layout. Padded: up to the tree's own longest answer."""
    lengths = [len(answer) for answer in tree.answers]
    if layout == "shared":
        return len(tree.prompt) + sum(lengths)
    if layout == "packed":
        return len(tree.prompt) * len(lengths) + sum(lengths)
    return (len(tree.prompt) + max(lengths)) * len(lengths)


def _one_row(trees: Sequence[Tree], tokens: int) -> Batch:
    """Shared layout: prompt, answer, answer, ... of each tree, end to end."""
    spans, positions, before, starts, at = [], [], [], [], 0
    for tree in trees:
        prompt, start = len(tree.prompt), at
        at += prompt
        positions.append(torch.arange(prompt))
        for number, answer in enumerate(tree.answers):
            trunk = Span(start, prompt + len(answer)) if number == 0 else Span(at, len(answer), start, prompt)
            spans.append(trunk)
            before.append(start + prompt - 1)
            starts.append(at)
            positions.append(torch.arange(prompt, prompt + len(answer)))
            at += len(answer)
    row = list(chain.from_iterable(chain(tree.prompt, *tree.answers) for tree in trees))
    positions_T = torch.cat(positions)
    return Batch(
        input_ids_BT=torch.tensor(row)[None],
        position_ids_BT=positions_T[None],
        attention_mask_BT=None,
        segments=segments(spans, positions_T),
        tokens=tokens,
        **_answers(trees, torch.tensor(before), torch.tensor(starts)),
    )


def _padded(trees: Sequence[Tree], pad_id: int, tokens: int) -> Batch:
    """Padded layout: one row per answer."""
    rows = [(*tree.prompt, *answer) for tree in trees for answer in tree.answers]
    prompts_A = torch.tensor([len(tree.prompt) for tree in trees for _ in tree.answers])
    lengths_A = torch.tensor([len(row) for row in rows])
    width = int(lengths_A.max())
    steps_T = torch.arange(width)
    starts_A = torch.arange(len(rows)) * width + prompts_A
    return Batch(
        input_ids_BT=torch.tensor([row + (pad_id,) * (width - len(row)) for row in rows]),
        position_ids_BT=steps_T.expand(len(rows), -1).contiguous(),
        attention_mask_BT=(steps_T < lengths_A[:, None]).long(),
        segments=None,
        tokens=tokens,
        **_answers(trees, starts_A - 1, starts_A),
    )


def _answers(trees: Sequence[Tree], before_A: Tensor, starts_A: Tensor) -> dict[str, Tensor]:
    """The fields about answers, from the flat index of each prompt's last token and of each answer's first."""
    answers = [answer for tree in trees for answer in tree.answers]
    lengths_A = torch.tensor([len(answer) for answer in answers])
    answer_N = torch.arange(len(answers)).repeat_interleave(lengths_A)
    firsts_A = lengths_A.cumsum(0) - lengths_A
    step_N = torch.arange(len(answer_N)) - firsts_A[answer_N]
    token_N = starts_A[answer_N] + step_N
    per_token = {
        "predict_N": torch.where(step_N == 0, before_A[answer_N], token_N - 1),
        "labels_N": torch.tensor(list(chain.from_iterable(answers))),
        "answer_N": answer_N,
        "token_N": token_N,
    }
    last_A = starts_A + lengths_A - 1
    if any(tree.masks is not None for tree in trees):
        masks = (tree.masks or [[True] * len(answer) for answer in tree.answers] for tree in trees)
        learned_N = torch.tensor(list(chain.from_iterable(chain.from_iterable(masks))))
        per_token = {name: values_N[learned_N] for name, values_N in per_token.items()}
        lengths_A = torch.bincount(per_token["answer_N"], minlength=len(answers))
    return {**per_token, "last_A": last_A, "lengths_A": lengths_A}
