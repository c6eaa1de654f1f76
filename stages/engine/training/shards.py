"""Checkpoints of sharded weights: every rank writes its own rows, and any number of ranks reads them.

A rank's part is `shard-N.safetensors` with the rows of each tensor that it holds, and `shard-N.json` with where they
begin. torch's own distributed checkpoints say that in a pickle, which is never read here.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stages.engine.distributed import rank, world
from stages.engine.models.sharding import rows_of, rows_to_save, side_group
from stages.engine.training import checkpoint
from stages.engine.training.optimizers import sharded_like

Digests = dict[str, checkpoint.Digest]


def own_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What this rank saves of `checkpoint.model_state`, and which rows [begin, end) of how many that is.

    Of rows that several ranks hold (`replicas`) each is saved by one of them.
    """
    whole = checkpoint.model_state(model, optimizer)
    parts = {name: _own_rows(values) for name, values in whole.items()}
    parameters = checkpoint.trainable(model).items()
    return {**parts, "rows": {name: [*rows_to_save(p), p.shape[0]] for name, p in parameters}}


def _own_rows(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _own_rows(inner) for name, inner in value.items()}
    if not isinstance(value, DTensor):
        return value
    first, (begin, end) = rows_of(value)[0], rows_to_save(value)
    return value.to_local()[begin - first : end - first]


def write_together(draft: Path, taken: checkpoint.Snapshot) -> Digests:
    """Write this rank's part; once all have, the digests of all parts. Called in the side thread of every rank.

    Raises:
        OSError: a part could not be written, by this rank or another.
    """
    mine: Digests | str
    try:
        checkpoint.write(draft, f"shard-{rank()}", taken)
        mine = {name: checkpoint.digest(draft / name) for name in (f"shard-{rank()}{end}" for end in checkpoint.ENDS)}
    except Exception as error:  # the others must hear of it, whatever it is
        mine = f"rank {rank()} could not write its part of a checkpoint: {error}"
    every: list[Any] = [None] * world()
    dist.all_gather_object(every, mine, group=side_group("checkpoints"))
    for one in every:
        if isinstance(one, str):
            raise OSError(one)
    return {name: value for one in every for name, value in one.items()}


def is_mine(name: str) -> bool:
    """Whether this rank verifies a file of a checkpoint: each the parts of its number, the first one what is shared."""
    part = re.match(r"(?:rank|shard)-([0-9]+)\.", name)
    return (int(part[1]) if part else 0) % world() == rank()


def saved_ranks(folder: Path) -> int:
    """How many ranks wrote a checkpoint."""
    return len(list(folder.glob("rank-*.json")))


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read weights and the optimizer's state in place, by as many ranks as there are now, sharded or not.

    Raises ValueError when names or shapes differ.
    """
    names = [path.stem for path in sorted(folder.glob("shard-*.json"))] or ["model"]
    parts = [Part(folder, name) for name in names]
    parameters = checkpoint.trainable(model)
    saved = parts[0].state["model"]
    checkpoint.check_names(parameters, saved)
    for name, parameter in parameters.items():
        shape = (parts[0].rows(name)[2], *parts[0].shape(saved[name])[1:])
        checkpoint.check_shape(name, parameter, shape)
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        rows = rows_of(parameter)
        local.detach().copy_(read_rows(parts, name, saved[name], rows))
        state: dict[str, Any] = {}
        for key, value in parts[0].state["optimizer"][name].items():
            tensor = read_rows(parts, name, value, rows).to(local.device)
            state[key] = sharded_like(parameter, tensor) if tensor.ndim else tensor
        optimizer.state[parameter] = state


class Part:
    """One rank's part of a checkpoint, of which rows are read when they are asked for."""

    def __init__(self, folder: Path, name: str) -> None:
        self.file = safe_open(folder / f"{name}.safetensors", framework="pt")
        rest = json.loads((folder / f"{name}.json").read_text())
        self.state: Mapping[str, Any] = checkpoint.join_state(rest, {key: key for key in self.file.keys()})  # noqa: SIM118

    def shape(self, key: str) -> list[int]:
        return self.file.get_slice(key).get_shape()

    def rows(self, name: str) -> tuple[int, int, int]:
        """Where this part's rows of a weight begin and end, and how many there are in all."""
        if "rows" in self.state:
            begin, end, size = self.state["rows"][name]
            return begin, end, size
        size = self.shape(self.state["model"][name])[0]
        return 0, size, size


def read_rows(parts: list[Part], name: str, key: str, rows: tuple[int, int]) -> Tensor:
    """Some rows of a tensor, put together from the parts that hold them; a number as it is."""
    shape = parts[0].shape(key)
    if not shape:
        return parts[0].file.get_tensor(key)
    pieces: dict[int, Tensor] = {}
    for part in parts:
        first, last, _ = part.rows(name)
        begin, end = max(rows[0], first), min(rows[1], last)
        if begin < end:
            pieces[begin] = part.file.get_slice(key)[begin - first : end - first]
    in_order = [pieces[begin] for begin in sorted(pieces)]  # that of ranks differs from it with several copies
    return torch.cat(in_order) if in_order else parts[0].file.get_slice(key)[:0]
