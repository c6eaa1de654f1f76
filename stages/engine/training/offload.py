"""Activations in the CPU's memory, from where a forward pass makes them to where the backward pass asks for them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

HOST = "cpu"
LEAST = 2**20
"""Bytes of a tensor below which moving it is not worth the while."""


def to_host(model: nn.Module) -> saved_tensors_hooks:
    """While it is entered, what autograd keeps of a pass goes to pinned memory of the host, but for the weights.

    Copies run on the stream that computes, so that each is made before its tensor's memory is used again.
    """
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Any:
        stays = tensor.device.type == HOST or tensor.nbytes < LEAST
        if stays or tensor.untyped_storage().data_ptr() in weights:
            return tensor
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
        kept.copy_(tensor, non_blocking=True)
        return tensor.device, kept

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, kept = packed
        return kept.to(device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)
