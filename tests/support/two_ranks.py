"""Processes that train together over gloo, as torchrun starts them; forks of one that has imported torch already."""

import os
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch
from torch.distributed import TCPStore

from tests.support.forks import start

_stores: list[TCPStore] = []
"""Kept, since ranks look for theirs as long as they run."""


def on_two_ranks(work: Callable[..., None], *arguments: Any) -> None:
    """`on_ranks` with two of them."""
    on_ranks(2, work, *arguments)


def on_ranks(number: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(rank, *arguments)` in all, a function that a module has by its name; all have to end well."""
    ranks = start_ranks(number, work, *arguments)
    for process in ranks:
        process.join(600)  # a loaded machine takes minutes
    for process in ranks:  # one that waits for another
        process.kill()
    assert [process.exitcode for process in ranks] == [0] * number


def start_ranks(number: int, work: Callable[..., None], *arguments: Any) -> list[ForkServerProcess]:
    """The processes, which run now. They meet at a store of this process, as torchrun's ranks do at its agent's."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _stores.append(store)
    return [start(_as_rank, rank, number, store.port, dict(os.environ), work, arguments) for rank in range(number)]


def _as_rank(
    rank: int,
    number: int,
    port: int,
    environment: Mapping[str, str],
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    """Be one of the processes: its environment, then its work. `environment`: of the tests, which may differ by now."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_PORT": port}
    os.environ.update(environment)
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    torch.set_num_threads(1)
    work(rank, *arguments)
    torch.distributed.destroy_process_group()
