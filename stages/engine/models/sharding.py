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
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from schemas.config.training import Training
from schemas.environment import replicas
from schemas.errors import refuse
from stages.engine.distributed import patience, processes, rank, world
from stages.engine.models.pieces import origin, stand_in
from stages.engine.models.policy import Policy, Scorer, device

AnyModel = TypeVar("AnyModel", bound=Policy | Scorer)

What = Literal["a forward pass", "a backward pass", "the step's totals", "a count of passes", "dealing out weights"]
_WHATS: tuple[What, ...] = get_args(What)


def wanted(training: Training | None) -> bool:
    """Whether weights are to be sharded. One process holds the only share: there `full` is the same as `none`."""
    return training is not None and training.sharding == "full" and world() > 1


def is_sharded(model: nn.Module) -> bool:
    """Whether a model, or a part of it, is sharded."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


# --- into shards, and whole again ---


@cache
def _mesh() -> DeviceMesh:
    """The ranks; with `replicas` as rows of ranks that hold one copy of the weights together (HSDP).

    Raises:
        StageError: `replicas` does not divide the ranks.
    """
    copies = replicas()
    if world() % copies:
        fix = f"set it to a divisor of the number of processes ({world()})"
        raise refuse("replicas", copies, f"{world()} processes cannot hold so many equal copies.", fix, kind="input")
    processes()
    if copies == 1:
        return init_device_mesh(device().type, (world(),))
    return init_device_mesh(device().type, (copies, world() // copies), mesh_dim_names=("copy", "share"))


def _replace(model: nn.Module, by: Callable[[str, nn.Parameter], Tensor]) -> None:
    """Put other tensors in the place of the parameters; tied ones stay one object."""
    new = {}
    for name, p in model.named_parameters():
        value = by(name, p)
        new[id(p)] = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=p.requires_grad)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = new[id(parameter)]


def _to_meta(name: str, parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, device="meta")


def put(parameter: Tensor, whole: Tensor) -> None:
    """Copy this rank's slice of a whole tensor into a sharded one."""
    begin, end = rows_of(parameter)
    put_rows(parameter, whole[begin:end])


def put_rows(parameter: Tensor, rows: Tensor) -> None:
    """Copy this rank's slice into a sharded tensor."""
    assert isinstance(parameter, DTensor)
    parameter.to_local().detach().copy_(rows)


def rows_of(parameter: Tensor) -> tuple[int, int]:
    """Which rows of a tensor this rank holds, [begin, end): those of torch.chunk; all where it is not sharded."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    mesh = parameter.device_mesh
    return _chunk(0, parameter.shape[0], mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1))


def _chunk(begin: int, end: int, number: int, of: int) -> tuple[int, int]:
    each = -(-(end - begin) // of)
    return min(end, begin + number * each), min(end, begin + (number + 1) * each)


def rows_to_save(parameter: Tensor) -> tuple[int, int]:
    """Of the rows that this rank holds those that it saves: other copies hold them too, and each saves a part."""
    begin, end = rows_of(parameter)
    if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim == 1:
        return begin, end
    mesh = parameter.device_mesh
    return _chunk(begin, end, mesh.get_local_rank(0), mesh.size(0))


def twin(model: AnyModel) -> AnyModel:
    """A copy of a model that is not shared out yet, with stand-ins of its own."""
    own = dict(model.named_parameters())
    _replace(model, _to_meta)
    other = copy.deepcopy(model)
    _replace(model, lambda name, shape: own[name])

    def again(name: str, shape: Tensor) -> Tensor:
        value = own[name]
        place = origin(value)
        return (
            value.detach().clone()
            if place is None
            else stand_in(value.shape, place, value.dtype).requires_grad_(value.requires_grad)
        )

    _replace(other, again)
    return other


def shard(model: AnyModel, training: Training) -> AnyModel:
    """Share out a model as `loading` gives it. In place, on all ranks.

    Every rank reads its rows of weights that stand for their place in a file; the others the first rank sends.
    Nothing may be computed from the weights before, but on the first rank where it holds all. Not asked for (`wanted`):
    the model as it is.

    Raises:
        RuntimeError: the ranks do not see the same files.
    """
    if not wanted(training):
        return model
    mesh = _mesh()
    whole = dict(model.named_parameters())
    if len(set(in_step("dealing out weights", sum(origin(p) is not None for p in whole.values())))) > 1:
        raise RuntimeError("the ranks see different model files. Fix: give a folder that all machines share")
    _replace(model, _to_meta)
    shapes = copy.deepcopy(model)
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
        if place := origin(value):
            put_rows(parameter, place.rows(*rows_of(parameter)))
            continue
        empty = torch.empty(value.shape, dtype=value.dtype, device=device())
        sent = value.detach().to(device()).contiguous() if rank() == 0 else empty
        dist.broadcast(sent, 0)
        put(parameter, sent)
    model.empty = (shapes,)
    model.register_forward_pre_hook(_begin_pass, prepend=True)
    return model


@contextlib.contextmanager
def whole(model: AnyModel, *, first_rank_only: bool = False, of: str = "") -> Iterator[AnyModel]:
    """The model as one process would hold it, with copies of all weights; called on all ranks.

    Passes of the copy are not collective. `first_rank_only`: on the CPU of the first rank, shapes alone on the others.
    `of`: copies of weights with this in their names alone. A model that is not sharded is given as it is.
    """
    if not is_sharded(model):
        yield model
        return
    (one,) = model.empty
    theirs = dict(model.named_parameters())

    def gathered(name: str, shape: Tensor) -> Tensor:
        if of not in name:
            return shape
        return to_first_rank(theirs[name], shape) if first_rank_only else plain(theirs[name].detach())

    _replace(one, gathered)
    try:
        yield one
    finally:
        _replace(one, _to_meta)


def to_first_rank(value: Tensor, shape: Tensor) -> Tensor:
    """A sharded tensor whole on the CPU of the first rank, on the others its `shape`; called on all ranks."""
    gathered = plain(value.detach())
    return gathered.cpu() if rank() == 0 else shape


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
