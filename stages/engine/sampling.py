"""Sampling answers from a policy: a decode loop of our own, so that an answer depends on its seed and on nothing else.

Shapes: B rows still running, T key positions (prompt with its left padding, then answer), V vocabulary.
"""

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from schemas.text import one_line
from stages.engine.models.policy import Policy, context_length

_SEES_AHEAD = 1e-3
"""Share of the largest logit by which a token's logits may move with the one behind it: rounding in half precision."""

Progress = Callable[[int, int], None]
"""Called with (answers finished, answers in all)."""


def seed_of(*parts: int | str) -> int:
    """A 64-bit seed that is a function of `parts` alone: seed, iteration, row and the like."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big")


def uniforms(seed: int, n: int) -> list[float]:
    """The first n of the seed's stream of numbers in [0, 1); a longer draw begins with the shorter one."""
    return np.random.Generator(np.random.Philox(key=seed)).random(n).tolist()


def draw(logits_BV: Tensor, temperature: float, uniform_B: Tensor) -> Tensor:
    """One token per row, by inverting the cumulative distribution at `uniform_B`; the likeliest at temperature 0.

    Softmax in float32, its sum in float64: the same number picks the same token whatever else is in the batch, up to
    float noise in the logits.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    probs_BV = torch.softmax(logits_BV.float() / temperature, -1)
    cumulative_BV = probs_BV.double().cumsum(-1)
    point_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, point_B1, right=True).squeeze(-1).clamp(max=logits_BV.shape[-1] - 1)


class _Decoder:
    """One batch of prompts: the cache, and which rows still run."""

    def __init__(self, hf: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> None:
        self.hf = hf
        self.device = next(hf.parameters()).device
        width = max(map(len, prompts))
        rows = [[pad_id] * (width - len(p)) + list(p) for p in prompts]
        masks = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        self.ids_BT = torch.tensor(rows, device=self.device)
        self.mask_BT = torch.tensor(masks, device=self.device)
        self.cache: Any = None
        inner = hf.get_base_model() if hasattr(hf, "get_base_model") else hf  # peft hides the signature
        self.takes_positions = "position_ids" in inspect.signature(inner.forward).parameters

    def logits(self) -> Tensor:
        """[B, V]: of the next token. The head is applied at the last position only."""
        position_BT = (self.mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -self.ids_BT.shape[1] :]
        out = self.hf(
            input_ids=self.ids_BT,
            attention_mask=self.mask_BT,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **({"position_ids": position_BT} if self.takes_positions else {}),
        )
        self.cache = out.past_key_values
        return out.logits[:, -1]

    def extend(self, token_B: Tensor) -> None:
        """Put the drawn tokens behind their rows."""
        self.ids_BT = token_B[:, None]
        self.mask_BT = torch.cat([self.mask_BT, torch.ones_like(self.ids_BT)], 1)

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows, from the cache too."""
        self.ids_BT, self.mask_BT = self.ids_BT[rows], self.mask_BT[rows]
        self.cache.reorder_cache(rows)  # takes fewer rows too; layers without keys, as in hybrids, have no other way


def _sample_batch(
    decoder: _Decoder, uniform_BL: Tensor, temperature: float, stop_ids: Tensor, finished: Callable[[int], None]
) -> list[list[int]]:
    """Decode until every row has stopped or has uniform_BL.shape[1] tokens; one transfer to the host per token."""
    answers: list[list[int]] = [[] for _ in uniform_BL]
    running = torch.arange(len(answers), device=decoder.device)
    for step in range(uniform_BL.shape[1]):
        token_B = draw(decoder.logits(), temperature, uniform_BL[running, step])
        go_on_B = ~torch.isin(token_B, stop_ids)
        for row, token, goes_on in torch.stack([running, token_B, go_on_B.long()], 1).tolist():
            answers[row].append(token)
            if not goes_on or step == uniform_BL.shape[1] - 1:
                finished(row)
        decoder.extend(token_B)
        if not go_on_B.all():
            rows = go_on_B.nonzero().squeeze(-1)
            if not len(rows):
                break
            decoder.keep(rows)
            running = running[rows]
    return answers


def _check(hf: nn.Module, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_new_tokens: int) -> None:
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: one seed per prompt is needed")
    lengths = [len(p) for p in prompts]
    if min(lengths, default=1) == 0:
        raise ValueError("an empty prompt has no last position to continue from; give it at least one token")
    limit = context_length(hf)
    if limit is not None and max(lengths, default=0) + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {max(lengths)} tokens and {max_new_tokens} new ones exceed the model's {limit} positions"
        )


@torch.no_grad()
def why_not_sampled(model: PreTrainedModel) -> str | None:
    """Why `sample` cannot run a model, tried on a few tokens; None where it can.

    A token that sees what follows it gives other logits when that changes: so do encoders, and those that attend to a
    whole prompt both ways.
    """
    rows: int = next(model.get_input_embeddings().parameters()).shape[0]
    prompt = [token % rows for token in (3, 4, 5, 6)]
    was_training = model.training
    model.eval()
    try:
        texts = [torch.tensor([[*prompt, last]], device=model.device) for last in (7 % rows, 8 % rows)]
        one_TV, other_TV = (model(input_ids=ids_1T, use_cache=False).logits[0].float() for ids_1T in texts)
        difference_T = (one_TV - other_TV).abs().amax(-1)
        if difference_T[:-1].max() > _SEES_AHEAD * one_TV.abs().max():
            return "its tokens see what follows them"
        # The short one ends first, so that the cache is tried without it.
        for stop in (-1, *(ids[0] for ids in _tried(model, prompt, -1))):
            _tried(model, prompt, stop)
    except Exception as error:  # whatever a model without such a cache raises
        return f"{type(error).__name__}: {one_line(error, 200)}"
    finally:
        model.train(was_training)
    return None


def _tried(model: PreTrainedModel, prompt: Sequence[int], stop: int) -> list[list[int]]:
    """Two answers of two tokens, to prompts of unequal length."""
    settings: dict[str, Any] = {"max_new_tokens": 2, "temperature": 0, "seeds": [0, 0], "pad_id": 0}
    return sample(model, [prompt, prompt[:2]], stop_ids=[stop], **settings)


@torch.no_grad()
def sample(
    policy: Policy | PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seeds: Sequence[int],
    stop_ids: Collection[int],
    pad_id: int,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> list[list[int]]:
    """The answers' token ids, in the order of `prompts`, with the stop token where one was reached.

    policy: a Policy, or a bare Hugging Face causal LM. Row i's randomness is a function of seeds[i] alone.
    Rows are batched by prompt length to spare padding, and leave their batch once they have ended. Temperature 0 takes
    the likeliest token. Raises ValueError when prompt and answer would exceed the model's positions.
    """
    hf = policy if isinstance(policy, PreTrainedModel) else policy.hf
    _check(hf, prompts, seeds, max_new_tokens)
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    answers: list[list[int]] = [[] for _ in prompts]
    stops = torch.tensor(sorted(stop_ids), device=next(hf.parameters()).device)
    done = 0

    def finished(row: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(prompts))

    was_training = hf.training
    hf.eval()  # with gradient checkpointing a model in training mode keeps no cache
    precision = contextlib.nullcontext() if isinstance(policy, PreTrainedModel) else policy.autocast()
    try:
        for start in range(0, len(by_length), batch_size):
            rows = by_length[start : start + batch_size]
            decoder = _Decoder(hf, [prompts[i] for i in rows], pad_id)
            numbers = [uniforms(seeds[i], max_new_tokens) for i in rows]
            uniform_BL = torch.tensor(numbers, dtype=torch.float64, device=decoder.device)
            with precision:
                drawn = _sample_batch(decoder, uniform_BL, temperature, stops, finished)
            for i, answer in zip(rows, drawn, strict=True):
                answers[i] = answer
    finally:
        hf.train(was_training)
    return answers
