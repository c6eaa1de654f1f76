"""The processes that train together: their ranks, and each one's share of the work."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from schemas.environment import rank_minutes

T = TypeVar("T")


def rank() -> int:
    """Number of this process among those that train together; torchrun sets it."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def share(items: Sequence[T], rank: int, world: int) -> list[T]:
    """Every `world`-th item from `rank` on: the shares of all ranks are disjoint and make up the whole."""
    return list(items[rank::world])


def patience() -> timedelta:
    """How long a rank waits for the others in a collective (ALIGNFLOW_RANK_MINUTES)."""
    return timedelta(minutes=rank_minutes())


def processes() -> PartialState:
    """The processes that train together, connected. Raises RuntimeError when torchrun started more than were found."""
    # Unasked, Accelerate connects no processes on CPUs. gloo's own patience is half an hour.
    several = {"timeout": patience()} if world() > 1 else {}
    state = PartialState(cpu=not torch.cuda.is_available(), **several)
    if state.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise RuntimeError(
            f"{os.environ['WORLD_SIZE']} processes were started, but {state.num_processes} are connected"
        )
    return state


def gather_in_order(mine: dict[int, Any]) -> list[Any]:
    """What all ranks have worked out, keyed by position, as one list in order of position."""
    return [value for _, value in sorted(gather_object(list(mine.items())), key=lambda item: item[0])]
