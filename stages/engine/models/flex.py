"""Attention over trees on CUDA: what tree_attention's groups compute, in one kernel of PyTorch's FlexAttention.

One rule says which key a query sees, and a map of blocks which parts of the product are computed at all: no mask over
all tokens is made, and no key or value is copied, be it for its heads or for the answers that share it.

Whether it is taken is found out on the first batch (layouts.py). Its backward does not exist on CPUs.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.integrations.flex_attention import compile_friendly_flex_attention

from stages.engine.data.segments import Segments, Span

BLOCK = 128
"""Queries, and keys, of a block."""

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query, key) -> whether the query sees the key; indices into the row."""


def attend(
    query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, tree: Segments, scaling: float | None, window: int | None
) -> Tensor:
    """`tree_attention.attend`: attention of one row, (T, H, d); keys and values may have fewer heads."""
    if window is not None and window >= tree.longest:
        window = None
    if window not in tree.blocks:
        tree.blocks[window] = block_mask(tree, window)
    query_1HTd, key_1HTd, value_1HTd = (rows.transpose(0, 1)[None] for rows in (query_THd, key_THd, value_THd))
    given: dict[str, Any] = {"block_mask": tree.blocks[window], "scale": scaling, "enable_gqa": True}
    if query_THd.device.type == "cuda":
        grad = torch.is_grad_enabled()
        result = compile_friendly_flex_attention(query_1HTd, key_1HTd, value_1HTd, training=grad, **given)
    else:  # for tests: uncompiled it makes the whole product
        result = flex_attention(query_1HTd, key_1HTd, value_1HTd, **given)
    return cast(Tensor, result)[0].transpose(0, 1)


def block_mask(tree: Segments, window: int | None) -> BlockMask:
    """The rule and the blocks of one row, on the device of its positions."""
    device, tokens = tree.positions_T.device, len(tree.positions_T)
    needed_NN = blocks(tree.spans, tokens)
    counts_N = needed_NN.sum(1, dtype=torch.int32)
    order_NN = (~needed_NN).to(torch.int8).argsort(dim=1, stable=True).to(torch.int32)  # the needed ones first
    return BlockMask.from_kv_blocks(
        counts_N[None, None].to(device),
        order_NN[None, None].to(device),
        BLOCK_SIZE=BLOCK,
        mask_mod=rule(tree, window),
        seq_lengths=(tokens, tokens),
    )


def blocks(spans: list[Span], tokens: int) -> Tensor:
    """(N, N) booleans: in which blocks of keys the queries of a block may see something."""
    number = -(-tokens // BLOCK)
    needed_NN = torch.zeros(number, number, dtype=torch.bool)
    for span in spans:
        first, last = span.start // BLOCK, (span.start + span.length - 1) // BLOCK
        for block in range(first, last + 1):
            needed_NN[block, first : block + 1] = True  # its own tokens, up to each query
        if span.prompt_length:
            end = span.prompt_start + span.prompt_length
            needed_NN[first : last + 1, span.prompt_start // BLOCK : (end - 1) // BLOCK + 1] = True
    return needed_NN


def rule(tree: Segments, window: int | None) -> Rule:
    """A query sees its own span and, from a further answer, the prompt, as far as positions go back to the window."""
    tokens = len(tree.positions_T)
    size = -(-tokens // BLOCK) * BLOCK  # the kernel asks about whole blocks
    own_T, prompt_T, asked_T = (torch.full((size,), -1, dtype=torch.int32) for _ in range(3))
    for number, span in enumerate(tree.spans):
        own_T[span.start : span.start + span.length] = number
        if span.prompt_length:
            # Prompts are told apart by where they begin.
            asked_T[span.start : span.start + span.length] = span.prompt_start
            prompt_T[span.prompt_start : span.prompt_start + span.prompt_length] = span.prompt_start
    device = tree.positions_T.device
    own_T, prompt_T, asked_T = own_T.to(device), prompt_T.to(device), asked_T.to(device)
    position_T = torch.nn.functional.pad(tree.positions_T, (0, size - tokens))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = position_T[query] - position_T[key]
        of_prompt = (asked_T[query] == prompt_T[key]) & (prompt_T[key] >= 0)
        seen = ((own_T[query] == own_T[key]) | of_prompt) & (distance >= 0)
        return seen if window is None else seen & (distance < window)

    return sees
