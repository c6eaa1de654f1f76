"""Weights shared out among the processes that train together (FSDP: Zhao et al. 2023, https://arxiv.org/abs/2304.11277).

Every process holds a slice of each weight, of its gradient and of the optimizer's state, and gathers a layer's weights
where they are used. The units are the layers, the heads that stay float32, and the rest as the root. torch's own
`fully_shard` does it; what is here decides the units, brings the weights there, and holds the ranks in step:
gathering is collective, so every rank has to make as many passes as the others.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from schemas.config.training import Training
from stages.engine.distributed import patience, processes, rank, world
from stages.engine.models.policy import Policy, Scorer, device

AnyModel = TypeVar("AnyModel", bound=Policy | Scorer)

What = Literal["a forward pass", "a backward pass", "the step's totals", "a count of passes"]
_WHATS: tuple[What, ...] = ("a forward pass", "a backward pass", "the step's totals", "a count of passes")


def wanted(training: Training | None) -> bool:
    """Whether weights are to be sharded. One process holds the only share: there `full` is the same as `none`."""
    return training is not None and training.sharding == "full" and world() > 1


def is_sharded(model: nn.Module) -> bool:
    """Whether a model, or a part of it, is sharded."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


# --- into shards, and whole again ---


@cache
def _mesh() -> DeviceMesh:
    processes()
    return init_device_mesh(device().type, (world(),))


def _replace(model: nn.Module, by: Callable[[str, nn.Parameter], Tensor]) -> None:
    """Put other tensors in the place of the parameters; tied ones stay one object."""
    new = {id(p): nn.Parameter(by(name, p), requires_grad=p.requires_grad) for name, p in model.named_parameters()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = new[id(parameter)]


def _to_meta(name: str, parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, device="meta")


def put(parameter: Tensor, whole: Tensor) -> None:
    """Copy this rank's slice of a whole tensor into a sharded one."""
    assert isinstance(parameter, DTensor)
    begin, end = rows_of(parameter)
    parameter.to_local().detach().copy_(whole[begin:end])


def rows_of(parameter: Tensor) -> tuple[int, int]:
    """Which rows of a tensor this rank holds, [begin, end): those of torch.chunk; all where it is not sharded."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    each = -(-parameter.shape[0] // parameter.device_mesh.size())
    begin, end = (min(parameter.shape[0], (parameter.device_mesh.get_local_rank() + i) * each) for i in (0, 1))
    return begin, end


def shard(model: AnyModel, training: Training) -> AnyModel:
    """Share out a model that the first rank holds on its CPU and the others as shapes alone. In place, on all ranks.

    Nothing may be computed from the weights between loading and this but on the first rank. Not asked for
    (`wanted`): the model as it is.
    """
    if not wanted(training):
        return model
    mesh = _mesh()
    whole = {name: p.detach() for name, p in model.named_parameters()}
    _replace(model, _to_meta)
    empty = copy.deepcopy(model)
    # Without an entry for the heads all is gathered as it is stored. Sums over ranks are float32 in any case.
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if training.gather == "bf16" else MixedPrecisionPolicy()
    kinds = set(model.plain._no_split_modules or ())
    for layer in [module for module in model.plain.modules() if type(module).__name__ in kinds]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    for head in (model.value_head if isinstance(model, Policy) else model.plain.get_submodule("score"),):
        if head is not None:
            fully_shard(head, mesh=mesh)
    # True on the root too: weights that are written after a pass without gradient would be lost in its gathered copy.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    buffers = [buffer.clone() for buffer in model.buffers()]
    model.to_empty(device=device())
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(value)
    for name, parameter in model.named_parameters():
        value = whole.pop(name)
        sent = value.to(device()).contiguous() if rank() == 0 else torch.empty(value.shape, device=device())
        dist.broadcast(sent, 0)
        put(parameter, sent)
    model.empty = (empty,)
    model.register_forward_pre_hook(_begin_pass, prepend=True)
    return model


@contextlib.contextmanager
def whole(model: AnyModel, *, first_rank_only: bool = False) -> Iterator[AnyModel]:
    """The model as one process would hold it, with copies of all weights; called on all ranks.

    Passes of the copy are not collective. `first_rank_only`: on the CPU of the first rank, shapes alone on the others.
    A model that is not sharded is given as it is.
    """
    if not is_sharded(model):
        yield model
        return
    (one,) = model.empty
    theirs = dict(model.named_parameters())

    def gathered(name: str, shape: Tensor) -> Tensor:
        value = theirs[name].detach()
        assert isinstance(value, DTensor)
        value = value.full_tensor()
        if not first_rank_only:
            return value
        return value.cpu() if rank() == 0 else shape

    _replace(one, gathered)
    try:
        yield one
    finally:
        _replace(one, _to_meta)


def plain(value: Tensor) -> Tensor:
    """A sharded tensor whole, called on all ranks; another as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


# --- in step ---


@cache
def side_group(purpose: str) -> Any:
    """Connections of their own on CPUs, for each purpose: collectives of one group must not overtake each other."""
    processes()
    return dist.new_group(backend="gloo", timeout=patience()) if world() > 1 else None


def in_step(what: What, number: int = 0) -> list[int]:
    """Every rank's number, once all ranks are about to do the same thing.

    Without this, ranks that make different numbers of passes would wait for each other until a timeout.

    Raises:
        RuntimeError: a rank is about to do another thing.
    """
    every = [torch.empty(2, dtype=torch.long) for _ in range(world())]
    group = side_group("steps")
    dist.all_gather(every, torch.tensor([_WHATS.index(what), number]), group=group)
    doings = [_WHATS[int(one[0])] for one in every]
    if len(set(doings)) > 1:
        told = ", ".join(f"rank {i} {doing}" for i, doing in enumerate(doings))
        raise RuntimeError(
            f"the ranks are not in step on sharded weights: {told} comes next. Fix: let every rank make equally many "
            "passes of the model; `missing` says how many a rank has to add"
        )
    return [int(one[1]) for one in every]


def _begin_pass(module: nn.Module, inputs: Any) -> None:
    in_step("a forward pass")


def missing(model: nn.Module, passes: int) -> int:
    """How many passes a rank has to add to its own, so that all make equally many; 0 where nothing is sharded."""
    return max(in_step("a count of passes", passes)) - passes if is_sharded(model) else 0
