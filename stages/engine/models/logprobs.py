"""Log-probabilities of given tokens under a linear head, without the full logits ever standing in memory.

Shapes: N tokens, D hidden size, V vocabulary, R rows of one chunk.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stages.engine.models.cpu import product_for

Rows = Callable[[slice], Tensor]

CHUNK = 2**23
"""Logits of one chunk: 32 MB in float32."""


def linear_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    *,
    entropy: bool = False,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """log softmax((hidden @ weight.T + bias) / temperature) at the labels, float32; the entropy too, if asked.

    No gradient flows through the entropy. Products run in autocast's type where autocast is on; softmax, sums and the
    weight's gradient in float32.
    """
    kind = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
    if temperature != 1:
        hidden_ND, bias_V = hidden_ND / temperature, None if bias_V is None else bias_V / temperature
    with torch.autocast(kind, enabled=False):
        logps_N, entropy_N = _LinearLogps.apply(hidden_ND, weight_VD, bias_V, labels_N, dtype, entropy)
    return logps_N, entropy_N if entropy else None


def linear_log_probs(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float = 1.0) -> Rows:
    """All log-probs of some rows, [R, V] float32 without gradient, computed when they are asked for."""
    kind = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
    hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()

    def rows(part: slice) -> Tensor:
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            return (_logits(hidden_ND[part].to(dtype), weight_VD.to(dtype), bias_V) / temperature).log_softmax(-1)

    return rows


def exact_kl(policy: Rows, reference: Rows, tokens: int) -> Tensor:
    """KL(pi(. | prefix) || pi_ref(. | prefix)) in nats before each of N tokens: exact over the vocabulary.

    Its sum along answers drawn from pi has the mean of the sampled log-ratios and a fraction of their noise.
    """
    parts = []
    for part in _chunks(tokens, policy(slice(0, 1)).shape[-1]):
        own_RV = policy(part)
        parts.append((own_RV.exp() * (own_RV - reference(part))).sum(-1))
    return torch.cat(parts)


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    step = max(1, CHUNK // vocabulary)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _logits(hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    logits_RV = product_for(weight_VD)(hidden_RD, weight_VD).float()
    return logits_RV if bias_V is None else logits_RV.add_(bias_V.float())


class _LinearLogps(torch.autograd.Function):
    """Forward keeps one number per token; backward computes each chunk's logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        dtype: torch.dtype,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        low_ND, low_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        logps_N, normaliser_N, entropy_N = torch.empty(3, len(labels_N), device=hidden_ND.device).unbind()
        for rows in _chunks(len(labels_N), len(weight_VD)):
            logits_RV = _logits(low_ND[rows], low_VD, bias_V)
            normaliser_N[rows] = logits_RV.logsumexp(-1)
            logps_N[rows] = logits_RV.gather(-1, labels_N[rows, None]).squeeze(-1) - normaliser_N[rows]
            if entropy:
                mean_R = (logits_RV * (logits_RV - normaliser_N[rows, None]).exp_()).sum(-1)
                entropy_N[rows] = normaliser_N[rows] - mean_R
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N, normaliser_N)
        ctx.dtype = dtype
        ctx.mark_non_differentiable(entropy_N)
        return logps_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_N = grad_outputs[0]
        hidden_ND, weight_VD, bias_V, labels_N, normaliser_N = ctx.saved_tensors
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        low_ND, low_VD = hidden_ND.to(ctx.dtype), weight_VD.to(ctx.dtype)
        hidden_grad_ND = torch.empty_like(hidden_ND) if for_hidden else None
        weight_grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if for_weight else None
        bias_grad_V = torch.zeros_like(bias_V, dtype=torch.float32) if for_bias else None
        for rows in _chunks(len(labels_N), len(weight_VD)):
            # d logp / d logits = onehot(label) - softmax
            grad_RV = _logits(low_ND[rows], low_VD, bias_V).sub_(normaliser_N[rows, None]).exp_().neg_()
            grad_RV.scatter_add_(1, labels_N[rows, None], torch.ones_like(grad_RV[:, :1]))
            grad_RV *= grad_N[rows, None]
            if bias_grad_V is not None:
                bias_grad_V += grad_RV.sum(0)
            grad_RV = grad_RV.to(ctx.dtype)
            if hidden_grad_ND is not None:
                hidden_grad_ND[rows] = product_for(low_VD)(grad_RV, low_VD.T)
            if weight_grad_VD is not None:
                if low_ND.dtype == weight_grad_VD.dtype:
                    weight_grad_VD.addmm_(grad_RV.T, low_ND[rows])
                else:  # the sum in float32
                    weight_grad_VD += grad_RV.T @ low_ND[rows]
        weight_grad = None if weight_grad_VD is None else weight_grad_VD.to(weight_VD.dtype)
        bias_grad = None if bias_grad_V is None else bias_grad_V.to(bias_V.dtype)
        return hidden_grad_ND, weight_grad, bias_grad, None, None, None
