"""What makes a CPU train faster: oneDNN's products, freed memory that is kept, and the right number of threads.

PyTorch multiplies float32 matrices with MKL, which uses AVX-512 on Intel's processors alone. oneDNN, which PyTorch
brings along for other types, uses it on all that have it.

Shapes: N rows, I features in, O features out.
"""

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers import pytorch_utils

SMALL = 5_000_000
"""Parameters below which one thread is fastest."""
LARGE_MATRIX = 2**16
"""Elements of a weight from which on the choice of library matters."""
_DEFAULT_THREADS = torch.get_num_threads()
_threads = 1
_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MOST, _MOST_BEFORE_GLIBC_2_35 = 2**31 - 1, 2**25  # a higher threshold for mmap is refused


def get_ready(model: nn.Module) -> None:
    """Threads, memory and products for a model that this process has loaded. Of several models the largest counts."""
    global _threads
    _threads = max(_threads, threads_for(model))
    torch.set_num_threads(_threads)
    if not is_small(model) and not torch.cuda.is_available():
        keep_freed_memory()
    faster = {nn.Linear: Linear, pytorch_utils.Conv1D: Conv1D}
    for module in model.modules():
        if type(module) in faster:
            module.__class__ = faster[type(module)]


def is_small(model: nn.Module) -> bool:
    return sum(p.numel() for p in model.parameters()) < SMALL


def threads_for(model: nn.Module) -> int:
    """Threads to compute with: one for a small model, else what torch would take."""
    return 1 if is_small(model) else _DEFAULT_THREADS


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: gradients and logits come back at every step, and fresh pages cost time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none
        _ = mallopt(_M_MMAP_THRESHOLD, _MOST) or mallopt(_M_MMAP_THRESHOLD, _MOST_BEFORE_GLIBC_2_35)
        mallopt(_M_TRIM_THRESHOLD, _MOST)


def product_for(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The faster way to left @ right.T, (N, I) and (O, I) to (N, O), in a layer with this weight.

    Either operand may be a transposed view; no gradient flows through the product. On one machine the choice is a
    function of type and size alone, so that a resumed run computes the same bits.
    """
    large = weight.numel() >= LARGE_MATRIX and weight.device.type == "cpu" and weight.dtype == torch.float32
    return _onednn if _ONEDNN and large else _matmul


def _matmul(left_NI: Tensor, right_OI: Tensor) -> Tensor:
    return left_NI @ right_OI.T


def _onednn(left_NI: Tensor, right_OI: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left_NI, right_OI, None, "none", [], "")


def linear_by_faster(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x @ weight.T + bias over x's last dimension, by the faster library."""
    plain = product_for(weight_OI) is _matmul or torch.is_autocast_enabled("cpu")
    if plain or x.dtype != torch.float32 or not x.numel():
        return linear(x, weight_OI, bias_O)
    out_NO: Any = _LinearFunction.apply(x.reshape(-1, x.shape[-1]).contiguous(), weight_OI, bias_O)
    return out_NO.reshape(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """nn.Linear with the faster products."""

    def forward(self, input: Tensor) -> Tensor:
        return linear_by_faster(input, self.weight, self.bias)


class Conv1D(pytorch_utils.Conv1D):
    """GPT-2's layer, a linear one whose weight is transposed, with the faster products."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_by_faster(x, self.weight.T, self.bias)


class _LinearFunction(torch.autograd.Function):
    """x @ weight.T + bias and its gradient: three products of oneDNN's."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x_NI if for_weight else None, weight_OI if for_x else None)
        out_NO = _onednn(x_NI, weight_OI)
        return out_NO if bias_O is None else out_NO.add_(bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_NI, weight_OI = ctx.saved_tensors
        grad_NO = grad_outputs[0].contiguous()
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            _onednn(grad_NO, weight_OI.T) if for_x else None,
            _onednn(grad_NO.T, x_NI.T) if for_weight else None,
            grad_NO.sum(0) if for_bias else None,
        )
