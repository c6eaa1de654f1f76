"""Numbers of many answers, a batch of tokens at a time."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stages.engine.data.trees import Batch, Layout, Tree, collate, cut, tree_tokens
from stages.engine.models.sharding import missing

_NOTHING = Tree((0,), ((0,),))
"""What a rank reads that has run out of trees before the others."""


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Read a model as it is, without dropout, while this holds."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def over_trees(
    model: nn.Module,
    values: Callable[[Batch], Tensor],
    trees: Sequence[Tree],
    layout: Layout,
    budget: int,
    pad_id: int,
    by_size: bool = True,
) -> Iterator[dict[int, list[Any]]]:
    """`values` (A numbers of a batch, by `model` without gradient or dropout) in batches of at most `budget` tokens.

    Yields after each batch: the trees' positions -> a number per answer, or a row where `values` has rows. `by_size`
    puts trees of like size together, so that little is padded; batches differ then, and with them the last bits. On
    sharded weights all ranks have to call it, each with its own trees or with none.
    """
    sizes = [tree_tokens(tree, layout) for tree in trees]
    order = sorted(range(len(trees)), key=sizes.__getitem__) if by_size else range(len(trees))
    device = next(model.parameters()).device
    groups = cut([sizes[i] for i in order], budget)
    for _ in range(missing(model, len(groups))):
        with undisturbed(model), torch.no_grad():
            values(collate([_NOTHING], layout, pad_id).to(device))
    for group in groups:
        positions = [order[i] for i in group]
        with undisturbed(model), torch.no_grad():
            batch = collate([trees[i] for i in positions], layout, pad_id).to(device)
            numbers = iter(values(batch).tolist())
        yield {i: [next(numbers) for _ in trees[i].answers] for i in positions}
