"""Two processes that train together over gloo, as torchrun starts them."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch

from tests.support.live_servers import free_port


def on_two_ranks(work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(rank, *arguments)` in both, a function that a module has by its name; both have to end well."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    ranks = [context.Process(target=_as_rank, args=(rank, port, work, arguments)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    for process in ranks:  # one that waits for the other
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]


def _as_rank(rank: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    work(rank, *arguments)
    torch.distributed.destroy_process_group()
