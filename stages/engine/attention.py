"""Attention over trees of sequences that lie end to end in one row, with answers that share their prompt.

Everything but attention treats tokens one by one, so a batch may lie in memory as one row of T tokens. Attention is
computed for groups of sequences of like length, padded for this product alone:
- a trunk: a prompt with its first answer, causal over itself;
- a branch: a further answer, over its prompt and causally over itself.
Which key a query may see is decided by positions (a token's place in its own prompt + answer), so sliding windows come
out as if each sequence stood alone.

Shapes: T tokens of the row, S sequences of a group, Q queries and K keys of each, H heads, d size of a head.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "alignflow"
_NEVER = 1 << 30  # the position of a key that only pads: after every query
_SLACK = 64 * 64  # query-key products that padding may waste per sequence; about the cost of one more call


@dataclass(frozen=True)
class Span:
    """A stretch of the row that asks: its own tokens, and those of the prompt before it (none for a trunk)."""

    start: int
    length: int
    prompt_start: int = 0
    prompt_length: int = 0

    @property
    def keys(self) -> int:
        return self.prompt_length + self.length


@dataclass
class Group:
    """Spans computed by one product. Positions and flat indices into the row."""

    query_SQ: Tensor
    key_SK: Tensor
    query_position_SQ: Tensor
    key_position_SK: Tensor
    trunk: bool
    """Queries and keys are the same tokens, padding at the end: plain causal attention unless a window is set."""

    def to(self, device: torch.device) -> "Group":
        moved = (self.query_SQ, self.key_SK, self.query_position_SQ, self.key_position_SK)
        return Group(*(t.to(device) for t in moved), trunk=self.trunk)

    def mask(self, window: int | None) -> Tensor | None:
        """(S, 1, Q, K) booleans, True where a query sees a key; None for plain causal attention."""
        if self.trunk and window is None:
            return None
        distance_SQK = self.query_position_SQ[:, :, None] - self.key_position_SK[:, None, :]
        seen_SQK = distance_SQK >= 0
        if window is not None:
            seen_SQK &= distance_SQK < window
        return seen_SQK[:, None]


@dataclass
class Segments:
    """How the tokens of one row attend to each other. Masks are made once per window and kept."""

    groups: list[Group]
    back_T: Tensor | None
    """Where each token's result stands among the groups' results laid end to end; None: where the token stands."""
    longest: int
    """Positions of the longest sequence: a window at least as large hides nothing."""
    masks: dict[tuple[int | None, torch.dtype], list[Tensor | None]] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Segments":
        back_T = None if self.back_T is None else self.back_T.to(device)
        return Segments([group.to(device) for group in self.groups], back_T, self.longest)

    def masks_for(self, window: int | None, dtype: torch.dtype) -> list[Tensor | None]:
        if window is not None and window >= self.longest:
            window = None
        if (window, dtype) not in self.masks:
            booleans = [group.mask(window) for group in self.groups]
            self.masks[window, dtype] = [m if m is None else _additive(m, dtype) for m in booleans]
        return self.masks[window, dtype]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where True, -inf where False: what the kernel would otherwise make of booleans in every layer."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def segments(spans: list[Span], positions_T: Tensor) -> Segments:
    """Group the spans, which together cover the row, and index them."""
    groups, back_T, offset = [], torch.empty_like(positions_T), 0
    for chosen in _alike(spans):
        group = _group(chosen, positions_T)
        queries = group.query_SQ.shape[1]
        for row, span in enumerate(chosen):
            first = offset + row * queries
            back_T[span.start : span.start + span.length] = torch.arange(first, first + span.length)
        offset += len(chosen) * queries
        groups.append(group)
    in_order = offset == len(back_T) and torch.equal(back_T, torch.arange(offset))
    return Segments(groups, None if in_order else back_T, int(positions_T.max()) + 1)


def _alike(spans: list[Span]) -> list[list[Span]]:
    """Cut the spans, longest first, into groups in which padding wastes little."""
    groups: list[list[Span]] = []
    for trunk in (True, False):
        queries = keys = 0
        members = [span for span in spans if (span.prompt_length == 0) is trunk]
        for span in sorted(members, key=lambda span: (span.keys, span.length), reverse=True):
            queries = max(queries, span.length)
            if keys and queries * keys - span.length * span.keys <= _SLACK:
                groups[-1].append(span)
                continue
            queries, keys = span.length, span.keys
            groups.append([span])
    return groups


def _group(spans: list[Span], positions_T: Tensor) -> Group:
    """Padded queries repeat the span's last token, so that no row of the mask is empty; their results are dropped."""
    query_SQ = _padded([torch.arange(s.start, s.start + s.length) for s in spans])
    if spans[0].prompt_length == 0:
        key_SK, key_lengths = query_SQ, [s.length for s in spans]
    else:
        prompts = [torch.arange(s.prompt_start, s.prompt_start + s.prompt_length) for s in spans]
        own = [torch.arange(s.start, s.start + s.length) for s in spans]
        key_SK = _padded([torch.cat(pair) for pair in zip(prompts, own, strict=True)])
        key_lengths = [s.keys for s in spans]
    pads_SK = torch.arange(key_SK.shape[1]) >= torch.tensor(key_lengths)[:, None]
    key_position_SK = positions_T[key_SK].masked_fill(pads_SK, _NEVER)
    return Group(query_SQ, key_SK, positions_T[query_SQ], key_position_SK, trunk=spans[0].prompt_length == 0)


def _padded(rows: list[Tensor]) -> Tensor:
    """Stack index rows, each padded with its own last index."""
    width = max(len(row) for row in rows)
    steps = torch.arange(width)
    return torch.stack([row[steps.clamp(max=len(row) - 1)] for row in rows])


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
            )
            return attention_forward(*given, **kwargs)
    if segments is None:
        return sdpa_attention_forward(
            module, query_BHTd, key_BHTd, value_BHTd, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError("attention dropout is not defined on shared prompts")
    query_THd, key_THd, value_THd = (t[0].transpose(0, 1) for t in (query_BHTd, key_BHTd, value_BHTd))
    return attend(query_THd, key_THd, value_THd, segments, scaling, sliding_window)[None], None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
