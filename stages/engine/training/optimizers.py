"""AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101): torch's own, or with moments in 8 bits.

Moments in 8 bits, by blocks of numbers with a scale each (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861), take
about 2 bytes a weight in the place of 8. Left out of the paper's method, or changed:
1. Of the second moment its square root is kept: it spans half as many decades, as many as the first moment. And a
   number that is not 0 is never kept as 0, so that no weight is divided by `eps` alone.
2. Blocks do not cross rows. That keeps the rare tokens of an embedding apart from the others, for which the paper has
   an embedding layer of its own; and any number of ranks can read the rows of a checkpoint.

The weights' update is computed from moments in float32, before they are rounded.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from schemas.config.training import Training
from stages.engine import blocks

BLOCK = 256
"""Numbers that share a scale."""
SMALL = 4096
"""Weights below which moments stay float32, as they do for vectors."""
PIECE = 2**24
"""Weights that are updated at a time: their moments are float32 for that long."""
MOMENTS = {"exp_avg": blocks.SIGNED, "exp_avg_sq_root": blocks.UNSIGNED}
SCALES = "_scales"


def optimizer_for(parts: Mapping[str, Sequence[torch.nn.Parameter]], training: Training) -> torch.optim.Optimizer:
    """AdamW, perhaps in 8 bits, with groups that carry their part's name; weight decay on matrices only."""
    groups: list[dict[str, Any]] = []
    for part, every in parts.items():
        parameters = [p for p in every if p.requires_grad]
        matrices, rest = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
        groups.append({"part": part, "params": matrices, "weight_decay": training.weight_decay})
        groups.append({"part": part, "params": rest, "weight_decay": 0.0})
    betas = (training.adam_beta1, training.adam_beta2)
    if training.optimizer == "adamw8bit":
        return AdamW8bit(groups, lr=training.learning_rate, betas=betas, eps=training.adam_eps)
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=betas, eps=training.adam_eps, fused=True)


class AdamW8bit(torch.optim.Optimizer):
    """Its state holds, per weight, tensors with as many rows as the weight; sharded as the weight is."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # there is no loss to give back
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        state: dict[str, Tensor] = self.state[weight]
        if not state:
            state |= _zeros(weight)
        state["step"] += 1
        local = {name: _local(value) for name, value in state.items()}
        values, gradient = _local(weight), _local(weight.grad)
        rows = max(1, PIECE // max(1, values[:1].numel()))
        for start in range(0, len(values), rows):
            part = slice(start, start + rows)
            own = {name: value[part] for name, value in local.items() if name != "step"}
            _update_rows(values[part], gradient[part].float(), own, float(state["step"]), group)


def _update_rows(
    weight: Tensor, gradient: Tensor, state: dict[str, Tensor], step: float, group: dict[str, Any]
) -> None:
    beta1, beta2 = group["betas"]
    first = _read(state, "exp_avg").lerp_(gradient, 1 - beta1)
    root = _read(state, "exp_avg_sq_root").square_().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2).sqrt_()
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    scale = root / (1 - beta2**step) ** 0.5
    weight.addcdiv_(first, scale.add_(group["eps"]), value=-group["lr"] / (1 - beta1**step))
    _write(state, "exp_avg", first)
    _write(state, "exp_avg_sq_root", root)


def _read(state: dict[str, Tensor], name: str) -> Tensor:
    if name + SCALES not in state:
        return state[name].clone()
    return blocks.decode(state[name], state[name + SCALES], MOMENTS[name], BLOCK)


def _write(state: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name + SCALES not in state:
        state[name].copy_(value)
        return
    codes, scales = blocks.encode(value, MOMENTS[name], BLOCK)
    if name == "exp_avg_sq_root":
        codes.clamp_(min=1).mul_(value > 0)
    state[name].copy_(codes)
    state[name + SCALES].copy_(scales)


def _zeros(weight: Tensor) -> dict[str, Tensor]:
    """The state before the first step; by the whole weight's size, so that all ranks hold alike."""
    local = _local(weight)
    state = {"step": torch.tensor(0.0)}
    for name, table in MOMENTS.items():
        if weight.ndim < 2 or weight.numel() < SMALL:
            state[name] = torch.zeros_like(weight, dtype=torch.float32)
            continue
        codes, scales = blocks.encode(torch.zeros(1, *local.shape[1:], device=local.device), table, BLOCK)
        state[name] = sharded_like(weight, codes.expand(local.shape).clone())
        state[name + SCALES] = sharded_like(weight, scales.expand(len(local), *scales.shape[1:]).clone())
    return state


def _local(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.to_local() if isinstance(value, DTensor) else value


def sharded_like(weight: Tensor, rows: Tensor) -> Tensor:
    """A tensor of this rank's rows, sharded as the weight is; it may have other columns."""
    if not isinstance(weight, DTensor):
        return rows
    whole = torch.empty(weight.shape[0], *rows.shape[1:], device="meta")
    placed = weight.device_mesh, weight.placements
    return DTensor.from_local(rows, *placed, shape=whole.shape, stride=whole.stride())
