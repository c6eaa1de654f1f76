"""Weights that are only read, held in fewer bytes than they are computed with.

A weight that is held in bfloat16 or NF4 becomes the type of its product where a layer uses it, and for that long; for
the gradient it is made again. So the type costs what rounding takes away when the weight is loaded, and nothing
afterwards: a model whose files are in bfloat16 gives the same numbers as in float32.

Held so are linear layers and embeddings, by far most of a model. Vectors, reward models' heads, and layers that a type
of model has for itself stay float32.

Shapes: N rows, I features in, O features out.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel, pytorch_utils

from schemas.config.training import Held
from stages.engine import blocks
from stages.engine.models import cpu
from stages.engine.models.pieces import origin

NF4_BLOCK = 64
"""Weights that share a scale, as in the paper; the scales are bfloat16 (there 8 bits: 0.02 bytes a weight less)."""

Whole = Callable[[torch.dtype], Tensor]
"""A weight, (O, I), in the type that a product needs."""


def hold(hf: PreTrainedModel, held: Held, device: torch.device) -> None:
    """Hold a model's weights in a type, in place; adapters and a reward model's head stay as they are.

    NF4 is for linear layers below the head, and made on the `device`; all else of a model in NF4 is bfloat16.
    """
    if held == "fp32":
        return
    users: dict[int, set[type]] = {}
    for module in hf.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), set()).add(type(module))
    head = hf.get_output_embeddings()
    layers: list[tuple[str, Any]] = list(hf.named_modules())
    for name, module in layers:
        kind = _KINDS.get(type(module))
        # A weight that another kind of layer uses too stays as that one knows it.
        if kind is None or ".lora_" in name or name == "score" or not users[id(module.weight)] <= _KINDS.keys():
            continue
        if held == "nf4" and kind is Linear and module is not head:
            _to_nf4(module, device)
            continue
        module.__class__ = kind
        if module.weight.dtype == torch.float32:
            weight = module.weight
            stands_for_files = origin(weight) is not None  # one number, seen in the weight's shape
            value = torch.zeros((), dtype=torch.bfloat16).expand(weight.shape) if stands_for_files else weight.data
            weight.data = value.to(torch.bfloat16)


def _to_nf4(module: Any, device: torch.device) -> None:
    weight_OI = module.weight.data.to(device)
    codes_OI, scales_Ob = blocks.encode(weight_OI, blocks.NORMAL, NF4_BLOCK, torch.bfloat16)
    module.__class__ = Nf4
    module.weight = nn.Parameter(blocks.pack(codes_OI), requires_grad=False)
    module.register_buffer("scales_Ob", scales_Ob, persistent=False)


class Linear(cpu.Linear):
    """A linear layer whose weight is bfloat16."""

    def whole(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        return _linear(input, self.whole, self.bias)


class Nf4(Linear):
    """A linear layer whose weight is in four bits, two to a byte."""

    scales_Ob: Tensor

    def lend(self, other: Any) -> None:
        """Let another layer of this one's shape use its weight."""
        other.__class__ = Nf4
        other.weight = self.weight
        other.register_buffer("scales_Ob", self.scales_Ob, persistent=False)

    def whole(self, dtype: torch.dtype) -> Tensor:
        codes_OI = blocks.unpack(self.weight, self.in_features)
        return blocks.decode(codes_OI, self.scales_Ob, blocks.NORMAL, NF4_BLOCK).to(dtype)


class Conv1D(cpu.Conv1D):
    """GPT-2's layer in bfloat16."""

    def whole(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype).T

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.whole, self.bias)


class Embedding(nn.Embedding):
    """An embedding in bfloat16; what comes after it is float32."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()


_KINDS: dict[type, type] = {
    **dict.fromkeys((nn.Linear, cpu.Linear, Linear), Linear),
    **dict.fromkeys((pytorch_utils.Conv1D, cpu.Conv1D, Conv1D), Conv1D),
    **dict.fromkeys((nn.Embedding, Embedding), Embedding),
}


def _linear(x: Tensor, whole: Whole, bias_O: Tensor | None) -> Tensor:
    """x @ weight.T + bias over x's last dimension, in autocast's type where autocast is on."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    bias_O = None if bias_O is None else bias_O.to(dtype)
    with torch.autocast(kind, enabled=False):
        out_NO: Any = _Product.apply(x.to(dtype).reshape(-1, x.shape[-1]), bias_O, whole)
    return out_NO.reshape(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """x @ weight.T + bias; the gradient goes to x alone, since weight and bias never learn."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, bias_O: Tensor | None, whole: Whole) -> Tensor:
        ctx.whole, ctx.dtype = whole, x_NI.dtype
        return cpu.linear_by_faster(x_NI, whole(x_NI.dtype), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight_OI = ctx.whole(ctx.dtype)
        return cpu.product_for(weight_OI)(grad_outputs[0].contiguous(), weight_OI.T), None, None
