"""Attention over trees of sequences, end to end in one row, with answers that share their prompt.

Everything but attention treats tokens one by one, so a batch may be laid out as one row of T tokens. Attention is
computed for groups of sequences of like length, padded for this product alone:
- a trunk: a prompt with its first answer, causal over itself;
- a branch: a further answer, over its prompt and causally over itself.
Which key a query may see is decided by positions (a token's place in its own prompt + answer), so sliding windows come
out as if each sequence stood alone. On CUDA one kernel does the same where it works, and is held against this.

Shapes: T tokens of the row, S sequences of a group, Q queries and K keys of each, H heads, d size of a head.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stages.engine.data.segments import Segments, Span

NAME = "alignflow"

BLOCK = 128
"""Queries, and keys, of a block."""

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query, key) -> whether the query sees the key; indices into the row."""

# Types whose every layer outside attention treats tokens one by one, whose attention is softmax(QK) over positions and
# passes keyword arguments down, and whose logits are the head's product as it is.
TREE_TYPES = frozenset(
    {"gemma", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "phi", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2"}
)

_FIXED_ROPE = frozenset({"default", "linear", "llama3", "yarn"})  # the others look at the batch's longest row


def why_padded(config: PretrainedConfig) -> str | None:
    """Why a model cannot take shared and packed layouts; None when it can."""
    if config.model_type not in TREE_TYPES:
        return f"model type {config.model_type!r} is not on the list of those whose attention takes trees"
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in _FIXED_ROPE:
        return f"rope type {kind!r} of {config.model_type!r} depends on the whole batch"
    if getattr(config, "add_cross_attention", False):
        return f"{config.model_type!r} with cross-attention is not on the list of those whose attention takes trees"
    return None


def attend(
    query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, tree: Segments, scaling: float | None, window: int | None
) -> Tensor:
    """Attention of one row, (T, H, d). Keys and values may have fewer heads (grouped queries)."""
    # On a GPU the kernels that take masks want as many key heads as query heads.
    grouped = query_THd.device.type == "cpu"
    repeats = 1 if grouped else query_THd.shape[1] // key_THd.shape[1]
    results = []
    for group, mask in zip(tree.groups, tree.masks_for(window, query_THd.dtype), strict=True):
        result_SHQd = scaled_dot_product_attention(
            _gather(query_THd, group.query_SQ),
            _gather(key_THd, group.key_SK, repeats),
            _gather(value_THd, group.key_SK, repeats),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        results.append(result_SHQd.transpose(1, 2).flatten(0, 1))
    rows_THd = torch.cat(results) if len(results) > 1 else results[0]
    return rows_THd if tree.back_T is None else rows_THd.index_select(0, tree.back_T)


def _gather(rows_THd: Tensor, index_SL: Tensor, repeats: int = 1) -> Tensor:
    """(S, H, L, d) of (T, H, d); each head `repeats` times, side by side."""
    taken_SLHd = rows_THd.index_select(0, index_SL.flatten()).unflatten(0, index_SL.shape)
    if repeats > 1:
        taken_SLHd = taken_SLHd.repeat_interleave(repeats, dim=2)
    return taken_SLHd.transpose(1, 2)


def attend_in_one_kernel(
    query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, tree: Segments, scaling: float | None, window: int | None
) -> Tensor:
    """What `attend` computes, on CUDA, by PyTorch's FlexAttention.

    One rule says which key a query sees, and a map of blocks which parts of the product are computed at all: no mask
    over all tokens is made, and no key or value is copied, be it for its heads or for the answers that share it.
    Whether it is taken is found out on the first batch (layouts.py). Its backward does not exist on CPUs.
    """
    if window is not None and window >= tree.longest:
        window = None
    if window not in tree.blocks:
        tree.blocks[window] = block_mask(tree, window)
    kind = query_THd.device.type
    one = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query_THd.dtype  # RoPE leaves float32
    query_1HTd, key_1HTd, value_1HTd = (rows.to(one).transpose(0, 1)[None] for rows in (query_THd, key_THd, value_THd))
    given: dict[str, Any] = {"block_mask": tree.blocks[window], "scale": scaling, "enable_gqa": True}
    if kind == "cuda":
        from transformers.integrations.flex_attention import compile_friendly_flex_attention  # takes seconds

        # With and without gradients, in each type, for each window and number of heads it is compiled apart; past the
        # limit, 8 by default, it would run uncompiled and make the whole product.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
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


def attention_forward(
    module: nn.Module,
    query_BHTd: Tensor,
    key_BHTd: Tensor,
    value_BHTd: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    flex: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: trees where `segments` came down from `model(...)`, else its own SDPA.

    On a CPU under bf16 autocast the product runs in float32, where its backward is faster than in bf16.
    """
    if query_BHTd.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            query_BHTd, key_BHTd, value_BHTd = query_BHTd.float(), key_BHTd.float(), value_BHTd.float()
            given = (
                module,
                query_BHTd,
                key_BHTd,
                value_BHTd,
                attention_mask,
                dropout,
                scaling,
                segments,
                sliding_window,
                flex,
            )
            return attention_forward(*given, **kwargs)
    if segments is None:
        return sdpa_attention_forward(
            module, query_BHTd, key_BHTd, value_BHTd, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError("attention dropout is not defined on shared prompts")
    query_THd, key_THd, value_THd = (t[0].transpose(0, 1) for t in (query_BHTd, key_BHTd, value_BHTd))
    given_THd = query_THd, key_THd, value_THd
    if not flex:
        return attend(*given_THd, segments, scaling, sliding_window)[None], None
    return attend_in_one_kernel(*given_THd, segments, scaling, sliding_window)[None], None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
