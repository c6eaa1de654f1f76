"""Which tokens of a row attend to which: trees of sequences that share their prompt, as groups of equal shape."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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
    spans: list[Span]
    positions_T: Tensor
    masks: dict[tuple[int | None, torch.dtype], list[Tensor | None]] = field(default_factory=dict)
    blocks: dict[int | None, Any] = field(default_factory=dict)
    """FlexAttention's masks, by window."""

    def to(self, device: torch.device) -> "Segments":
        back_T = None if self.back_T is None else self.back_T.to(device)
        groups = [group.to(device) for group in self.groups]
        return Segments(groups, back_T, self.longest, self.spans, self.positions_T.to(device))

    def masks_for(self, window: int | None, dtype: torch.dtype) -> list[Tensor | None]:
        if window is not None and window >= self.longest:
            window = None
        if (window, dtype) not in self.masks:
            made: list[Tensor | None] = []
            for mask in (group.mask(window) for group in self.groups):
                if mask is not None:  # 0 and -inf, which the kernel would otherwise make of booleans in every layer
                    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
                    mask = zeros.masked_fill_(~mask, float("-inf"))
                made.append(mask)
            self.masks[window, dtype] = made
        return self.masks[window, dtype]


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
    return Segments(groups, None if in_order else back_T, int(positions_T.max()) + 1, spans, positions_T)


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
